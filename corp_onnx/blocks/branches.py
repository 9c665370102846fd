"""From the linear layers above an MLP down to where each hidden channel is first in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Int64

from corp_onnx import shapes
from corp_onnx.blocks.movement import MOVING_OPS, PASSING_OPS, element_numbers
from corp_onnx.blocks.region import Region, line
from corp_onnx.blocks.view import View
from corp_onnx.shapes import Facts

SILENT_OPS = PASSING_OPS - {"Cast"}
"""Operators on the way of data movement that change neither values nor type."""


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A tensor that holds all hidden channels, and the way there from a linear layer's output."""

    source: gs.Tensor
    whole: gs.Tensor
    """Where the layer's channels are still all in order: its output, or the same reshaped."""
    tensor: gs.Tensor
    channels: Int64[np.ndarray, "..."]
    """Channel of the layer at every hidden channel."""
    lost: tuple[gs.Node, ...] = ()
    """Data movement between both, which goes when the layer is written anew."""


@dataclass(frozen=True, slots=True)
class _Start:
    """A tensor that holds all channels of a layer in order, on ``axis``, and tokens in theirs."""

    tensor: gs.Tensor
    shape: tuple[int, ...]
    axis: int

    def channels(self, numbers: np.ndarray) -> np.ndarray:
        """The layer's channel at every channel of a tensor; none if tokens moved."""
        if (
            np.delete(numbers.shape, self.axis).tolist()
            != np.delete(self.shape, self.axis).tolist()
        ):
            return np.empty(0, int)
        return self.order(numbers)

    def order(self, numbers: np.ndarray) -> np.ndarray:
        """The same whatever axes the tokens lie on, as long as they follow each other."""
        width = self.shape[self.axis]
        rows = np.moveaxis(numbers, self.axis, -1).reshape(-1, numbers.shape[self.axis])
        order, tokens = rows[0] % width, np.arange(len(rows))[:, None] * width
        return order if np.array_equal(rows, tokens + order) else np.empty(0, int)


def branches_of(view: View, region: Region, facts: Facts) -> list[Branch] | str:
    """Where each layer's channels are first in order: at its output, or behind some movement.

    From there on all movement must leave the order of channels alone.
    """
    found: list[Branch] = []
    above: set[int] = set()
    for source in region.sources:
        shape = facts.shape(source)
        assert shape is not None, "it was labelled"
        start = _Start(source, shape, view.linears[source.name].axis)
        ways, passed = _ways(view, region, facts, start)
        if not ways:
            return f"the channels of {source.name!r} do not reach its input one to one, in place"
        found += [replace(way, source=source) for way in ways]
        above.update(passed)
    lost = {id(node) for branch in found for node in branch.lost} | above
    width = len(found[0].channels)
    for node in region.nodes:
        if node.op in MOVING_OPS and id(node) not in lost:
            ends = [line(region.labels[tensor.name]) for tensor in (node.inputs[0], *node.outputs)]
            if any(along is None or not along.is_whole(width) for along in ends):
                return f"{node.op} ({node.name}) rearranges the hidden channels"
    return found


def same_places(one: list[Branch], other: list[Branch]) -> bool:
    """Whether two sets of sizes show the same branches."""

    def places(ways: list[Branch]) -> list[tuple[str, str, list[int]]]:
        return [(way.whole.name, way.tensor.name, way.channels.tolist()) for way in ways]

    return places(one) == places(other)


def _ways(view: View, region: Region, facts: Facts, start: _Start) -> tuple[list[Branch], set[int]]:
    """The branches of one layer, and the movement in front of them that leaves it whole."""
    passed: set[int] = set()
    while True:
        way = Branch(start.tensor, start.tensor, start.tensor, _numbers(start))
        ways = list(_descend(view, region, facts, start, way))
        below = None if ways else _reshaped(view, region, facts, start)
        if below is None:
            return ways, passed
        node, start = below
        passed.add(id(node))


def _numbers(start: _Start) -> np.ndarray:
    return element_numbers(start.shape, start.axis)


def _reshaped(
    view: View, region: Region, facts: Facts, start: _Start
) -> tuple[gs.Node, _Start] | None:
    """A Reshape that moves tokens of a layer to other axes, and does nothing else."""
    readers = [node for node in start.tensor.outputs if any(node is own for own in region.nodes)]
    if len(readers) != 1 or readers[0].op != "Reshape":
        return None
    (node,) = readers
    (moved,) = _run(view, facts, node, start.tensor, _numbers(start))
    size = start.shape[start.axis]
    if moved.ndim <= start.axis or moved.shape[start.axis] != size:
        return None
    if not np.array_equal(start.order(moved), np.arange(size)):
        return None
    return node, _Start(node.outputs[0], moved.shape, start.axis)


def _descend(
    view: View, region: Region, facts: Facts, start: _Start, way: Branch
) -> Iterator[Branch]:
    """Walk down from a layer's output to the tensors that hold the hidden axis, tokens in place.

    ``channels`` holds element numbers of the layer's output on the way.
    """
    along = line(region.labels[way.tensor.name])
    if along is not None and along.is_whole(len(along.channels)):
        channels = start.channels(way.channels)
        if channels.size:
            yield replace(way, channels=channels)
            return
    for node in way.tensor.outputs:
        if not any(node is other for other in region.nodes):
            continue
        if node.op not in MOVING_OPS | SILENT_OPS:
            return
        moved = _run(view, facts, node, way.tensor, way.channels)
        for tensor, numbers in zip(node.outputs, moved, strict=False):
            if tensor.name in region.labels:
                step = replace(way, tensor=tensor, channels=numbers, lost=(*way.lost, node))
                yield from _descend(view, region, facts, start, step)


def _run(
    view: View, facts: Facts, node: gs.Node, tensor: gs.Tensor, numbers: np.ndarray
) -> tuple[np.ndarray, ...]:
    """What a movement makes of a tensor's numbers."""
    inputs = {other.name: facts.value(other) for other in node.inputs if other.name}
    return shapes.run(node, inputs | {tensor.name: numbers}, view.opset)
