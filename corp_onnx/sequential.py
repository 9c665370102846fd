"""Block by block: each is fitted behind those before it, as they were cut, to the dense stream."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from corp_onnx.blocks import Attention, Axis, Block, Catalog, Mlp
from corp_onnx.blocks.records import linears_of
from corp_onnx.calibrate import gather, require_enough, summed
from corp_onnx.errors import DataError
from corp_onnx.extracts import extract
from corp_onnx.graph import Model
from corp_onnx.masks import seen_rows
from corp_onnx.moments import Collector, Moments
from corp_onnx.plan import Cut, Plan
from corp_onnx.segments import Segment, segments_of
from corp_onnx.session import Runtime, open_session
from corp_onnx.shapes import evaluate
from corp_onnx.sites import Site, Thinning
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import Fold, Solution
from corp_onnx.solve.joint import Joint, merged
from corp_onnx.solve.narrow import Heads, narrow_mlp, narrow_output, narrow_values
from corp_onnx.solve.solver import Solver
from corp_onnx.statistics import Batch, Statistics
from corp_onnx.streams import Stream, stream_behind
from corp_onnx.surgery import carried_out
from corp_onnx.tape import Tape

TOKENS_PER_CHANNEL = 48
"""Of more tokens only so many, for every channel that the last layer of a block reads, count."""


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """The folds of every cut, and those of cutting alike without repair."""

    solution: Solution
    bare: Solution


def fit_in_sequence(
    model: Model,
    catalog: Catalog,
    plan: Plan,
    parts: Sequence[Iterable[Batch]],
    recipe: Recipe,
    *,
    runtime: Runtime | None = None,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda samples: None,
    on_block: Callable[[str], None] = lambda block: None,
) -> Fitted:
    r"""Cut a model block by block, and refit every block to what the dense model has behind it.

    The model is cut open at the streams behind its blocks. Of every segment the dense part runs
    once, for the stream ``X`` behind the block. The pruned part runs on what the segments before
    it, as they were cut, have made of the same samples: once for what there is to fit, and once
    more as it was cut, for the next. Its stream is ``x + g y``, with the branch ``y = f W + b``; so
    the target of ``g y`` is ``X - x``, in which this block can undo what earlier ones got wrong, as
    far as `refit` finds that to hold on other samples.

    Blocks that share their weights with others are solved from the dense model alone, once for
    all of them.

    Args:
        model: The dense model.
        catalog: Its blocks.
        plan: How wide every axis will be.
        parts: Batches of disjoint sets of samples; how much to refit is decided by how a fit to
            the others does on each. With one part nothing is refitted.
        recipe: Method and ridge.
        runtime: How models are run.
        seed: Decides which tokens count, where there are more than `TOKENS_PER_CHANNEL`.
        on_batch: Called after every batch that was read with its number of samples.
        on_block: Called with the id of every block that is done.

    Raises:
        CorpError: As `calibrate`, `solve` and `operate`.
    """
    with tempfile.TemporaryDirectory(prefix="corp_onnx.") as folder:
        dense, pruned = Tape(Path(folder) / "dense"), Tape(Path(folder) / "pruned")
        of_part: list[int] = []
        samples = 0
        for part, batches in enumerate(parts):
            for batch in batches:
                dense.write(len(of_part), batch)
                pruned.write(len(of_part), batch)
                of_part.append(part)
                size = len(next(iter(batch.values())))
                samples += size
                on_batch(size)
        line = _Line(model, catalog, recipe, runtime, dense, pruned, tuple(of_part), samples, seed)
        given = line.solve_shared(plan)
        folds, bare = [], []
        for segment in line.segments(plan):
            found, unrepaired = line.fit(segment, plan, given)
            folds += found
            bare += unrepaired
            for stream in segment.streams:
                on_block(stream.block)
    return Fitted(
        Solution(recipe.method, tuple(folds), in_sequence=True), Solution("none", tuple(bare))
    )


Folds = tuple[list[Fold], list[Fold]]
"""Repaired, and cut alike without repair."""


@dataclass(frozen=True, slots=True, eq=False)
class _Line:
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
        masks = {block.id: block.padding.tensor for block in blocks if block.padding}
        layers = {block.id: [each.output for each in linears_of(block)] for block in blocks}
        return segments_of(self.model, streams, masks, layers)

    def solve_shared(self, plan: Plan) -> Mapping[str, Folds]:
        """Folds of all blocks that share their weights with others, from the dense model."""
        blocks = tuple(block for block in self.catalog.blocks if block.twins)
        cuts = tuple(cut for cut in plan.cuts if cut.block in {block.id for block in blocks})
        if not cuts:
            return {}
        catalog = replace(self.catalog, blocks=blocks)
        batches = (self.dense.read(batch) for batch in range(len(self.of_part)))
        statistics = gather(self.model, catalog, batches, runtime=self.runtime)
        found, bare = (
            solve(self.model, self.catalog, Plan(cuts), statistics, recipe)
            for recipe in (self.recipe, Recipe("none"))
        )
        return {
            block.id: (
                [fold for fold in found.folds if fold.block == block.id],
                [fold for fold in bare.folds if fold.block == block.id],
            )
            for block in blocks
        }

    def fit(self, segment: Segment, plan: Plan, given: Mapping[str, Folds]) -> Folds:
        """The folds of the blocks of a segment; afterwards both tapes are behind it."""
        part = self._part(segment)
        self._advance(self.dense, part, also=tuple(stream.tensor for stream in segment.streams))
        folds: list[Fold] = []
        bare: list[Fold] = []
        for stream in segment.streams:
            cuts = {cut.axis: cut for cut in plan.cuts if cut.block == stream.block}
            fitter = _Fitter(self, part, stream, self._block(stream.block), folds)
            found, unrepaired = given.get(stream.block) or fitter.fit(cuts)
            folds = [*folds, *found]
            bare += unrepaired
        if segment.outputs:
            self._advance(self.pruned, self.cut(part, folds))
        self.dense.forget(segment.later)
        self.pruned.forget(segment.later)
        return folds, bare

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

    def _part(self, segment: Segment) -> Part:
        first = self.dense.read(0, segment.inputs)
        types = {name: tensor.dtype for name, tensor in first.items()}
        return Part(segment, extract(self.model, segment.inputs, segment.ends, types))

    def _advance(self, tape: Tape, part: Part, also: tuple[str, ...] = ()) -> None:
        """Go on to the border behind a part."""
        wanted = (*part.segment.outputs, *also)
        for batch, tensors in self.run(tape, part, wanted):
            tape.write(batch, {name: tensors[name] for name in wanted})

    def _block(self, name: str) -> Block:
        return next(block for block in self.catalog.blocks if block.id == name)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A segment as a model of its own."""

    segment: Segment
    model: Model


@dataclass(frozen=True, slots=True, eq=False)
class _Fitter:
    """One block at work: reads what flows through it, and solves its cuts."""

    line: _Line
    part: Part
    stream: Stream
    block: Block
    before: Sequence[Fold]
    """Of blocks of the same segment that come before it."""

    def fit(self, cuts: Mapping[Axis, Cut]) -> Folds:
        """All folds of the block."""
        if isinstance(self.block, Mlp):
            return self._mlp(self.block, cuts["mlp"])
        return self._attention(self.block, cuts)

    def _mlp(self, block: Mlp, cut: Cut) -> Folds:
        joints = self._joints((), block.hidden)
        statistics = self._statistics({"hidden": merged(joints).features})
        solver = self._solver(statistics)
        kept = solver.channels(block, cut.to, merged(joints).features)
        branch = solver.branch(block.id, block.down, self.stream.gain)
        ridge = self.line.recipe.ridge
        fold = narrow_mlp(joints, branch, cut.to, ridge=ridge, kept=kept)
        return [fold], [self._solver(statistics, Recipe("none")).fold(block, cut)]

    def _attention(self, block: Attention, cuts: Mapping[Axis, Cut]) -> Folds:
        """Queries and keys first: what is mixed then follows the narrower logits."""
        folds: list[Fold] = []
        bare: list[Fold] = []
        if "qk" in cuts:
            statistics = self._query_key(block)
            folds.append(self._solver(statistics).fold(block, cuts["qk"]))
            bare.append(self._solver(statistics, Recipe("none")).fold(block, cuts["qk"]))
        if block.output is None:
            return folds, bare
        linear = block.output.linear
        joints = self._joints(folds, linear.input)
        statistics = self._statistics({"context": merged(joints).features})
        solver = self._solver(statistics)
        branch = solver.branch(block.id, linear, self.stream.gain)
        if "vo" not in cuts:
            return [*folds, narrow_output(joints, branch)], bare
        bare.append(self._solver(statistics, Recipe("none")).fold(block, cuts["vo"]))
        if not self.line.recipe.truncate:
            return [*folds, solver.fold(block, cuts["vo"])], bare
        heads, width = Heads.of(block.output), cuts["vo"].to
        fold = narrow_values(joints, branch, heads, width, ridge=self.line.recipe.ridge)
        return [*folds, fold], bare

    def _query_key(self, block: Attention) -> Statistics:
        """What queries and keys are, behind the blocks that are cut."""
        site = Site(block, ("qk",))
        part = self.line.cut(self.part, self.before)
        for _, tensors in self.line.run(self.line.pruned, part, site.tensors()):
            site.add(tensors)
        return self._enough(summed([site], self.line.samples, "", self._sha256))

    def _joints(self, folds: Sequence[Fold], features: str) -> list[Joint]:
        """What the last layer reads, with what it should add to the stream, by part of samples."""
        stream, line, linear = self.stream, self.line, self.stream.linear
        assert linear is not None, "a block whose last layer is known"
        totals = [
            Collector((linear.width_in + linear.width_out,)) for _ in range(max(line.of_part) + 1)
        ]
        mask = [self.block.padding.tensor] if self.block.padding else []
        wanted = (features, linear.output, stream.tensor, *mask)
        part = line.cut(self.part, [*self.before, *folds])
        with self._named(features), np.errstate(over="ignore", invalid="ignore"):
            for batch, tensors in line.run(line.pruned, part, wanted):
                x = np.moveaxis(tensors[features], linear.axis, -1)
                rows = self._rows(x, tensors, batch)
                (dense,) = line.dense.read(batch, [stream.tensor]).values()
                before = stream.vectors(dense)[rows] - stream.vectors(tensors[stream.tensor])[rows]
                target = before + stream.gain * stream.vectors(tensors[linear.output])[rows]
                totals[line.of_part[batch]].add(
                    np.concatenate(
                        [x.reshape(-1, x.shape[-1])[rows], target], axis=1, dtype=np.float32
                    )
                )
            return [Joint.of(total.moments(), linear.width_in) for total in totals]

    @contextmanager
    def _named(self, features: str) -> Iterator[None]:
        """Say of an error where it was found."""
        try:
            yield
        except DataError as error:
            raise DataError(f"at {features} of {self.block.id}: {error}") from error

    def _rows(self, tokens: np.ndarray, tensors: Batch, batch: int) -> np.ndarray:
        """Which tokens count: no padding, and of many only so many as are needed."""
        numbers = np.arange(int(np.prod(tokens.shape[:-1])))
        seen = numbers[seen_rows(self.block.padding, tokens, tensors)]
        enough = TOKENS_PER_CHANNEL * tokens.shape[-1] / len(self.line.of_part)
        step = max(1, int(len(seen) // enough))
        return Thinning.drawn(step, self.line.seed, batch).of(seen)

    def _statistics(self, sites: Mapping[str, Moments]) -> Statistics:
        named = {f"{self.block.id}.{role}": moments for role, moments in sites.items()}
        return self._enough(Statistics(named, {}, {}, self.line.samples, "", self._sha256))

    def _enough(self, statistics: Statistics) -> Statistics:
        require_enough(statistics)
        return statistics

    def _solver(self, statistics: Statistics, recipe: Recipe | None = None) -> Solver:
        return Solver.of(self.line.model, statistics, recipe or self.line.recipe)

    @property
    def _sha256(self) -> str:
        return self.line.model.fingerprint.sha256
