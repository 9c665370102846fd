"""From the linear layers above an MLP down to where each hidden channel is first in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Int64

from corp_onnx.blocks.movement import MOVING_OPS, PASSING_OPS, element_numbers
from corp_onnx.blocks.region import Region, line
from corp_onnx.blocks.view import View
from corp_onnx.graph import reference
from corp_onnx.graph.facts import Facts


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A tensor that holds all hidden channels, and the way there from a linear layer's output."""

    source: gs.Tensor
    whole: gs.Tensor
    """Where the layer's channels are still all in order: its output, or the same reshaped."""
    tensor: gs.Tensor
    channels: Int64[np.ndarray, "..."]
    """Channel of the layer at every hidden channel."""
    reshapes: tuple[gs.Node, ...] = ()
    """From the layer's output to ``whole``; they stay."""
    nodes: tuple[gs.Node, ...] = ()
    """Data movement from there on, which goes when the layer is written anew."""

    def above(self) -> Iterator[gs.Tensor]:
        """The layer's output and whatever else is moved on the way."""
        yield self.source
        for node in (*self.reshapes, *self.nodes):
            yield from (tensor for tensor in node.outputs if tensor is not self.tensor)


@dataclass(frozen=True, slots=True)
class _Start:
    """A tensor that holds all channels of a layer in order, on ``axis``, and tokens in theirs."""

    tensor: gs.Tensor
    shape: tuple[int, ...]
    axis: int

    def numbers(self) -> np.ndarray:
        """Numbers of its elements, by which they are known wherever they are moved."""
        return element_numbers(self.shape, self.axis)

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
    for source in region.sources:
        ways = _ways(view, region, facts, source)
        if not ways:
            return f"the channels of {source.name!r} do not reach its input one to one, in place"
        found += ways
    above = {id(node) for branch in found for node in (*branch.reshapes, *branch.nodes)}
    width = len(found[0].channels)
    for node in region.nodes:
        if node.op in MOVING_OPS and id(node) not in above:
            ends = [line(region.labels[tensor.name]) for tensor in (node.inputs[0], *node.outputs)]
            if any(along is None or not along.is_whole(width) for along in ends):
                return f"{node.op} ({node.name}) rearranges the hidden channels"
    return found


def same_places(one: list[Branch], other: list[Branch]) -> bool:
    """Whether two sets of sizes show the same branches."""

    def places(ways: list[Branch]) -> list[tuple[str, str, list[int]]]:
        return [(way.whole.name, way.tensor.name, way.channels.tolist()) for way in ways]

    return places(one) == places(other)


def _ways(view: View, region: Region, facts: Facts, source: gs.Tensor) -> list[Branch]:
    """The branches of one layer: from its output, or from a Reshape of all of it."""
    shape = facts.shape(source)
    assert shape is not None, "it was labelled"
    start = _Start(source, shape, view.linears[source.name].axis)
    reshapes: tuple[gs.Node, ...] = ()
    while True:
        way = Branch(source, start.tensor, start.tensor, start.numbers(), reshapes)
        ways = list(_descend(view, region, facts, start, way))
        below = None if ways else _reshaped(view, region, facts, start)
        if below is None:
            return ways
        node, start = below
        reshapes = (*reshapes, node)


def _reshaped(
    view: View, region: Region, facts: Facts, start: _Start
) -> tuple[gs.Node, _Start] | None:
    """A Reshape that moves tokens of a layer to other axes, and does nothing else."""
    readers = [node for node in view.readers(start.tensor) if _is_inside(region, node)]
    if len(readers) != 1 or readers[0].op != "Reshape":
        return None
    (node,) = readers
    (moved,) = _moved(view, facts, node, start.tensor, start.numbers())
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
        width = start.shape[start.axis]
        channels = start.channels(way.channels) if way.nodes else np.arange(width)
        if channels.size:
            yield replace(way, channels=channels)
            return
    for node in view.readers(way.tensor):
        if not _is_inside(region, node):
            continue
        if not _only_moves(facts, node):
            return
        moved = _moved(view, facts, node, way.tensor, way.channels)
        for tensor, numbers in zip(node.outputs, moved, strict=False):
            if tensor.name in region.labels:
                step = replace(way, tensor=tensor, channels=numbers, nodes=(*way.nodes, node))
                yield from _descend(view, region, facts, start, step)


def _is_inside(region: Region, node: gs.Node) -> bool:
    return any(node is other for other in region.nodes)


def _only_moves(facts: Facts, node: gs.Node) -> bool:
    """Whether a node changes neither values nor their type."""
    same = facts.dtype(node.inputs[0]) == facts.dtype(node.outputs[0])
    return node.op in MOVING_OPS or (node.op in PASSING_OPS and same)


def _moved(
    view: View, facts: Facts, node: gs.Node, tensor: gs.Tensor, numbers: np.ndarray
) -> tuple[np.ndarray, ...]:
    """What a node makes of the elements of a tensor; nothing if others join them."""
    if node.op in PASSING_OPS:
        return (numbers,)
    inputs = {other.name: facts.value(other) for other in node.inputs if other.name}
    inputs[tensor.name] = numbers
    known = {name: value for name, value in inputs.items() if value is not None}
    return reference.run(node, known, view.opset) if len(known) == len(inputs) else ()
