"""MLPs: a hidden axis with nothing between linear layers but operators that keep channels apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Int64

from corp_onnx import shapes
from corp_onnx.blocks.movement import MOVING_OPS, PASSING_OPS, Blocked, element_numbers
from corp_onnx.blocks.records import (
    Linear,
    Mlp,
    Refusal,
    SizeReader,
    Source,
    Target,
    Vector,
)
from corp_onnx.blocks.region import (
    Region,
    constant_axes,
    explore,
    line,
)
from corp_onnx.blocks.view import View, constant_value, serves_only
from corp_onnx.shapes import Facts

SILENT_OPS = PASSING_OPS - {"Cast"}
"""Operators on the way of data movement that change neither values nor type."""


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A tensor that holds all hidden channels, and the way there from a linear layer's output."""

    source: gs.Tensor
    tensor: gs.Tensor
    channels: Int64[np.ndarray, "..."]
    """Channel of the layer at every hidden channel."""
    nodes: tuple[gs.Node, ...]
    """Data movement on the way, which goes when the layer is written anew."""


def match_mlp(view: View, down: Linear, hidden: gs.Tensor, block_id: str) -> Mlp | Refusal | None:
    """The MLP whose down projection is ``down``; None if its input is no hidden axis."""
    regions = [explore(view, facts, hidden, down.axis) for facts in view.probes]
    if any(isinstance(region, Blocked) for region in regions):
        return None
    read = _read(view, down, hidden, regions, block_id)
    return Refusal(down.node, "Linear", read) if isinstance(read, str) else read


def _read(
    view: View,
    down: Linear,
    hidden: gs.Tensor,
    regions: Sequence[Region | Blocked | str],
    block_id: str,
) -> Mlp | str:
    """The MLP whose regions, one for every set of sizes, are known; or why it is none."""
    explored = [region for region in regions if isinstance(region, Region)]
    if len(explored) < len(regions):
        return next(reason for reason in regions if isinstance(reason, str))
    region = explored[0]
    branches = _other_reader(view, region, down, hidden) or _lasting(view, explored, down)
    if isinstance(branches, str):
        return branches
    lost = {id(node) for branch in branches for node in branch.nodes}
    kept = [node for node in region.nodes if id(node) not in lost]
    vectors, readers = _vectors(view, region, kept), _size_readers(view, region, lost)
    if isinstance(vectors, str) or isinstance(readers, str):
        return vectors if isinstance(vectors, str) else str(readers)
    sources = [
        Source(view.linears[branch.source.name], branch.channels, branch.tensor.name)
        for branch in branches
    ]
    return Mlp(
        block_id,
        tuple(sources),
        hidden.name,
        vectors,
        _targets(region, kept),
        down,
        down.width_in,
        readers,
        depthwise=tuple(node.name for node in kept if node.op == "Conv"),
    )


def _lasting(view: View, regions: Sequence[Region], down: Linear) -> list[Branch] | str:
    """The branches, if they are the same at all sizes and fit the down projection."""
    first, *others = (
        _branches(view, region, facts) for region, facts in zip(regions, view.probes, strict=True)
    )
    if isinstance(first, str):
        return first
    width = len(first[0].channels)
    if width != down.width_in:
        return f"its input has {width} channels, its weight {down.width_in} rows"
    if any(isinstance(other, str) or not _same(first, other) for other in others):
        return "its channels move when batch or sequence size changes"
    return first


def why_not_hidden(view: View, linear: Linear, tensor: gs.Tensor) -> str:
    """What stands above a linear layer that is no down projection, for the catalog."""
    found = explore(view, view.probes[0], tensor, linear.axis)
    node = found.node if isinstance(found, Blocked) else None
    above = (
        f"follows from {tensor.name!r}, which no layer computes"
        if node is None
        else f"comes through {node.op} ({node.name}), which mixes channels"
    )
    return f"its input {above}, and its {linear.width_out} outputs end in no other linear layer"


def _other_reader(view: View, region: Region, down: Linear, hidden: gs.Tensor) -> str | None:
    """Who else reads the hidden channels."""
    inside = {id(node) for node in region.nodes}
    for tensor in region.tensors():
        if view.is_output(tensor):
            return f"its hidden tensor {tensor.name!r} is an output of the model"
        for node in tensor.outputs:
            goes_down = tensor is hidden and node.name == down.node
            if id(node) not in inside and not goes_down and node.op != "Shape":
                return f"its hidden tensor {tensor.name!r} is also read by {node.op} ({node.name})"
    return None


def _branches(view: View, region: Region, facts: Facts) -> list[Branch] | str:
    """Where each layer's channels are first in order: at its output, or behind some movement.

    From there on all movement must leave the order of channels alone.
    """
    found: list[Branch] = []
    for source in region.sources:
        shape, axis = facts.shape(source), view.linears[source.name].axis
        assert shape is not None, "it was labelled"
        start = Branch(source, source, element_numbers(shape, axis), ())
        ways = list(_descend(view, region, facts, start))
        if not ways:
            return f"the channels of {source.name!r} do not reach its input one to one, in place"
        found += [replace(way, channels=_channels(way, shape, axis)) for way in ways]
    lost = {id(node) for branch in found for node in branch.nodes}
    width = len(found[0].channels)
    for node in region.nodes:
        if node.op in MOVING_OPS and id(node) not in lost:
            ends = [line(region.labels[tensor.name]) for tensor in (node.inputs[0], *node.outputs)]
            if any(along is None or not along.is_whole(width) for along in ends):
                return f"{node.op} ({node.name}) rearranges the hidden channels"
    return found


def _descend(view: View, region: Region, facts: Facts, way: Branch) -> Iterator[Branch]:
    """Walk down from a layer's output to the tensors that hold the hidden axis, tokens in place.

    ``channels`` holds element numbers of the layer's output on the way.
    """
    shape, axis = facts.shape(way.source), view.linears[way.source.name].axis
    along = line(region.labels[way.tensor.name])
    if (
        along is not None
        and along.is_whole(len(along.channels))
        and _channels(way, shape or (), axis).size
    ):
        yield way
        return
    for node in way.tensor.outputs:
        if not any(node is other for other in region.nodes):
            continue
        if node.op not in MOVING_OPS | SILENT_OPS:
            return
        inputs = {other.name: facts.value(other) for other in node.inputs if other.name}
        moved = shapes.run(node, inputs | {way.tensor.name: way.channels}, view.opset)
        for tensor, numbers in zip(node.outputs, moved, strict=False):
            if tensor.name in region.labels:
                step = Branch(way.source, tensor, numbers, (*way.nodes, node))
                yield from _descend(view, region, facts, step)


def _channels(way: Branch, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The layer's channel at every channel of a tensor; none if tokens are not where they were."""
    numbers = way.channels
    if not way.nodes:
        return np.arange(shape[axis])
    if np.delete(numbers.shape, axis).tolist() != np.delete(shape, axis).tolist():
        return np.empty(0, int)
    rows = np.moveaxis(numbers, axis, -1).reshape(-1, numbers.shape[axis])
    order, tokens = rows[0] % shape[axis], np.arange(len(rows))[:, None] * shape[axis]
    return order if np.array_equal(rows, tokens + order) else np.empty(0, int)


def _same(one: list[Branch], other: list[Branch]) -> bool:
    def places(ways: list[Branch]) -> list[tuple[str, list[int]]]:
        return [(way.tensor.name, way.channels.tolist()) for way in ways]

    return places(one) == places(other)


def _vectors(view: View, region: Region, kept: list[gs.Node]) -> tuple[Vector, ...] | str:
    """The constants with a value for every hidden channel, or one that cannot be written anew."""
    found = []
    for node in kept:
        for slot, axis in constant_axes(view, region, node):
            if constant_value(node.inputs[slot], view.opset) is None:
                return f"{node.op} ({node.name}) meets {node.inputs[slot].name!r}, made at run time"
            found.append(Vector(node.name, slot, axis))
    return tuple(found)


def _targets(region: Region, kept: list[gs.Node]) -> tuple[Target, ...]:
    """The entry of every Reshape or Expand inside that says how many channels there are."""
    targets = []
    for node in kept:
        if node.op in {"Reshape", "Expand"}:
            labels = region.labels[node.outputs[0].name]
            along = line(labels)
            assert along is not None, "movement that stays leaves the channels on one axis"
            targets.append(Target(node.name, along.axis, labels.ndim, 1))
    return tuple(targets)


def _size_readers(view: View, region: Region, lost: set[int]) -> tuple[SizeReader, ...] | str:
    """Shape nodes on hidden tensors: all axes but that of the channels stay as they are.

    Those that only say where data is to move within the region go along with it.
    """
    moving = {id(node) for node in region.nodes if node.op in MOVING_OPS}
    readers = []
    for tensor in region.tensors():
        for node in tensor.outputs:
            if node.op != "Shape" or serves_only(node, moving):
                continue
            along = line(region.labels[tensor.name]) if tensor.name in region.labels else None
            if along is None or (lost and tensor.name not in view.linears):
                return f"the shape of {tensor.name!r} is read ({node.name})"
            shape = view.shape(tensor) or ()
            sizes: list[int | str] = [
                size if axis == along.axis else f"t{axis}" for axis, size in enumerate(shape)
            ]
            read = slice(node.attrs.get("start", 0), node.attrs.get("end"))
            readers.append(SizeReader(node.name, tuple(sizes[read]), tensor.name))
    return tuple(readers)
