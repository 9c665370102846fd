"""A model cut open from segment to segment, and what flows there: dense, and as it was cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from corp_onnx.blocks import Block, Catalog
from corp_onnx.blocks.padding import masks_of
from corp_onnx.blocks.records import linears_of
from corp_onnx.data.batching import Batch
from corp_onnx.graph.extracts import extract
from corp_onnx.graph.model import Model
from corp_onnx.graph.shapes import evaluate
from corp_onnx.plan import Plan
from corp_onnx.sequential.segments import Segment, segments_of
from corp_onnx.sequential.streams import stream_behind
from corp_onnx.sequential.tape import Tape
from corp_onnx.session import Runtime, open_session
from corp_onnx.solve import Recipe
from corp_onnx.solve.folds import Fold
from corp_onnx.surgery.operate import carried_out


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A segment as a model of its own."""

    segment: Segment
    model: Model


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A model, and what flows across the border that was reached: dense, and as it was cut."""

    model: Model
    catalog: Catalog
    recipe: Recipe
    runtime: Runtime | None
    dense: Tape
    pruned: Tape
    of_part: tuple[int, ...]
    """The part that every batch belongs to."""
    samples: int
    seed: int

    def segments(self, plan: Plan) -> tuple[Segment, ...]:
        """The model cut at the streams behind every block that is to be cut."""
        facts = evaluate(self.model.graph, self.catalog.sizes)
        wanted = {cut.block for cut in plan.cuts}
        blocks = [block for block in self.catalog.blocks if block.id in wanted]
        streams = [stream_behind(self.model, facts, block) for block in blocks]
        masks = {block.id: masks_of(block) for block in blocks}
        layers = {block.id: [each.output for each in linears_of(block)] for block in blocks}
        return segments_of(self.model, streams, masks, layers)

    def run(self, tape: Tape, part: Part, outputs: Iterable[str]) -> Iterator[tuple[int, Batch]]:
        """Run a part of the model on every batch of a tape: the batch's number and its tensors."""
        inputs = part.segment.inputs
        names = [name for name in dict.fromkeys(outputs) if name not in inputs]
        session = open_session(extract(part.model, inputs, names), self.runtime)
        for batch in range(len(self.of_part)):
            fed = tape.read(batch, inputs)
            yield batch, {**fed, **session.run(fed)}

    def cut(self, part: Part, folds: Sequence[Fold]) -> Part:
        """The part with folds carried out."""
        graph = carried_out(part.model, self.catalog, folds)
        return replace(part, model=part.model.with_graph(graph))

    def part(self, segment: Segment) -> Part:
        """A segment as a model of its own, with inputs of the types that flow there."""
        first = self.dense.read(0, segment.inputs)
        return Part(segment, extract(self.model, segment.inputs, segment.ends, first))

    def advance(self, tape: Tape, part: Part, also: tuple[str, ...] = ()) -> None:
        """Go on to the border behind a part."""
        wanted = (*part.segment.outputs, *also)
        for batch, tensors in self.run(tape, part, wanted):
            tape.write(batch, {name: tensors[name] for name in wanted})

    def block(self, name: str) -> Block:
        """A block by its id."""
        return next(block for block in self.catalog.blocks if block.id == name)
