"""Whether blocks are what they were read as: written in another basis they compute the same.

Blocks are found in the graph at a few sizes of its inputs. What holds at these need not hold at
those of the data, and so every block is put to the test before anything is removed: a random
rotation of every head, a shuffled hidden axis, and the output of its last layer must stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from corp_onnx.blocks import Axis, Block, Catalog, axes_of
from corp_onnx.blocks.records import Linear, linears_of
from corp_onnx.blocks.withheld import withheld
from corp_onnx.data.batching import Batch, samples_in
from corp_onnx.errors import DataError, GraphError, SurgeryError
from corp_onnx.graph.extracts import computed, exposed, extract
from corp_onnx.graph.model import Model
from corp_onnx.sequential.streams import end_of, last_layer
from corp_onnx.session import Runtime, open_session
from corp_onnx.surgery.operate import carried_out
from corp_onnx.verify.basis import turned
from corp_onnx.verify.checks import types_in
from corp_onnx.verify.meters import OutputMeter

AXES: tuple[Axis, ...] = get_args(Axis)

SAMPLES, SHAPES = 8, 3
"""How many are run of how many shapes of inputs, in the batches that they come in."""

TOLERANCES: Mapping[str, tuple[float, float]] = {"float16": (4e-3, 1e-3), "bfloat16": (3e-2, 1e-2)}
EXACT_TOLERANCE = 1e-6, 1e-7
"""By stored type, how much of an output is lost to rounding, and the relative squared error that
another basis may make of its variation: float32 itself makes 1e-10, a scale that is wrong by one
percent 1e-6 or more. In narrow types the weights in another basis are rounded anew."""

DOUBT = "written in another basis, which should change nothing,"


def confirmed(
    model: Model, catalog: Catalog, batches: Iterable[Batch], runtime: Runtime | None = None
) -> Catalog:
    """Refuse what computes something else in another basis: it was read for what it is not.

    What is wrong with a block is tried again axis by axis; where no axis alone shows it, all are
    refused.

    Args:
        model: The dense model.
        catalog: Its blocks.
        batches: Some of the data.
        runtime: How models are run.

    Raises:
        GraphError: If the dense model cannot be loaded.
        DataError: If it cannot be run on these data.
    """
    dense = Dense.of(model, catalog, _few(batches), runtime)
    doubts = dense.doubts(catalog)
    doubtful = [one for one in catalog.blocks if one.id in doubts and dense.repeats(one)]
    reasons: dict[str, dict[Axis, str]] = {}
    for axis in AXES:
        for name, doubt in dense.doubts(_only(catalog, doubtful, axis)).items():
            reasons.setdefault(name, {})[axis] = doubt
    for block in doubtful:
        reasons.setdefault(block.id, dict.fromkeys(axes_of(block), doubts[block.id]))
    shared: dict[str, dict[Axis, str]] = {}
    for block in catalog.blocks:
        for twin in block.twins or (block.id,):
            shared.setdefault(block.id, {}).update(reasons.get(twin, {}))
    return withheld(catalog, shared)


def _few(batches: Iterable[Batch]) -> list[Batch]:
    """A few samples of every shape, of those shapes that have most."""
    by_shape: dict[tuple[tuple[int, ...], ...], list[Batch]] = {}
    for batch in batches:
        alike = by_shape.setdefault(tuple(array.shape[1:] for array in batch.values()), [])
        if sum(map(samples_in, alike)) < SAMPLES:
            alike.append(batch)
    most = sorted(by_shape.values(), key=lambda alike: -sum(map(samples_in, alike)))
    return [batch for alike in most[:SHAPES] for batch in alike]


def _only(catalog: Catalog, blocks: Iterable[Block], axis: Axis) -> Catalog:
    """Some blocks, and nothing but one of their axes."""
    others = dict.fromkeys(set(AXES) - {axis}, "")
    left = (replace(block, refused={**others, **block.refused}) for block in blocks)
    return replace(catalog, blocks=tuple(block for block in left if axes_of(block)))


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A model as it computes without optimisations, which round what they fuse, and what it gave.

    Attributes:
        model: Where products round none of their inputs.
        runtime: How models are run.
        tensors: Batch by batch, inputs of the model and of all blocks, and what these give.
    """

    model: Model
    runtime: Runtime
    tensors: tuple[Batch, ...]

    @staticmethod
    def of(
        model: Model, catalog: Catalog, batches: Sequence[Batch], runtime: Runtime | None = None
    ) -> Dense:
        """The model, run once."""
        graph = model.graph.copy()
        for node in graph.nodes:
            node.attrs.pop("accuracy_level", None)
        plain = model.with_graph(graph)
        given = replace(runtime or Runtime(), graph_level="none")
        blocks = [block for block in catalog.blocks if axes_of(block)]
        if not blocks:
            return Dense(plain, given, ())
        session = open_session(exposed(plain, _borders(plain, blocks)), given)
        return Dense(plain, given, tuple({**batch, **session.run(batch)} for batch in batches))

    def doubts(self, catalog: Catalog) -> dict[str, str]:
        """What is wrong, by block. Where something fails, it is found out by halves what that is.

        Blocks of which either half does well are left to the cut, which fails if they do together.
        """
        try:
            errors = self.errors(catalog)
        except (DataError, GraphError, SurgeryError) as failure:
            if len(catalog.blocks) == 1:
                return {catalog.blocks[0].id: f"{DOUBT} it fails: {failure}"}
            half = len(catalog.blocks) // 2
            first, second = catalog.blocks[:half], catalog.blocks[half:]
            return self.doubts(replace(catalog, blocks=first)) | self.doubts(
                replace(catalog, blocks=second)
            )
        _, limit = _tolerance(self.model)
        return {
            name: f"{DOUBT} its output changes by {error:.1e} (relative squared error): it was "
            "misread, or follows from the sizes of these inputs; give them with --shapes"
            for name, error in errors.items()
            if not error <= limit  # nor is it a number
        }

    def repeats(self, block: Block) -> bool:
        """Whether a block as it is gives the same again; what draws random numbers does not."""
        twice = replace(self, tensors=2 * self.tensors)
        try:
            errors = twice._compared(self.model, [block])
        except (DataError, GraphError):
            return False
        return errors[block.id] <= _tolerance(self.model)[1]

    def errors(self, catalog: Catalog) -> dict[str, float]:
        """``Σ‖ŷ - y‖² / Σ‖y - mean(y)‖²`` of every block's output ``y`` in another basis.

        Each block gets what the dense model gives it.
        """
        found: dict[str, float] = {}
        for part in _apart(catalog):
            graph = carried_out(self.model, part, turned(self.model, part).folds)
            found |= self._compared(self.model.with_graph(graph), part.blocks)
        return found

    def _compared(self, other: Model, blocks: Sequence[Block]) -> dict[str, float]:
        rounding, _ = _tolerance(self.model)
        meters = {block.id: OutputMeter(rounding) for block in blocks}
        ends = {block.id: end_of(self.model, block) for block in blocks}
        entries, given = _borders(self.model, blocks), self.runtime
        session, misshapen = None, set[str]()
        for before in self.tensors:
            if session is None:
                small = extract(other, entries, map(computed, ends.values()), before)
                session = open_session(small, given)
            after = session.run(before)
            for block in blocks:
                y, z = before[ends[block.id]], after[computed(ends[block.id])]
                if y.shape != z.shape:
                    misshapen.add(block.id)
                    continue
                y, z = (_vectors(block, tensor) for tensor in (y, z))
                known = np.isfinite(y).all(axis=1)  # of what nobody may attend to, all may be lost
                meters[block.id].compare(y[known], z[known])
        errors = {name: meter.error() for name, meter in meters.items()}
        return errors | dict.fromkeys(misshapen, np.inf)


def _tolerance(model: Model) -> tuple[float, float]:
    """What rounding takes of an output, and the error that is allowed."""
    return max(TOLERANCES.get(name, EXACT_TOLERANCE) for name in types_in(model))


def _borders(model: Model, blocks: Iterable[Block]) -> list[str]:
    """The tensors through which activations enter blocks and leave them."""
    names = (
        name
        for block in blocks
        for name in (*(linear.input for linear in _first_layers(block)), end_of(model, block))
    )
    return list(dict.fromkeys(names))


def _apart(catalog: Catalog) -> Iterator[Catalog]:
    """All blocks with something to cut; those of which one ends where the other begins by turns."""
    left = [block for block in catalog.blocks if axes_of(block)]
    while left:
        taken: dict[str, Block] = {}
        ends: set[str] = set()
        begins: set[str] = set()
        for block in left:
            last = last_layer(block)
            firsts = {linear.node for linear in _first_layers(block)}
            if ends.isdisjoint(firsts) and (last is None or last.node not in begins):
                taken[block.id] = block
                begins |= firsts
                ends |= {last.node} if last else set()
        yield replace(catalog, blocks=tuple(taken.values()))
        left = [block for block in left if block.id not in taken]


def _first_layers(block: Block) -> list[Linear]:
    last = last_layer(block)
    return [linear for linear in linears_of(block) if linear != last]


def _vectors(block: Block, tensor: np.ndarray) -> np.ndarray:
    """A block's output as one vector per token."""
    last = last_layer(block)
    y = tensor if last is None else np.moveaxis(tensor, last.axis, -1)
    vectors: np.ndarray = y.reshape(-1, y.shape[-1]).astype(np.float64)
    return vectors
