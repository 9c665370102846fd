"""MLPs: a hidden axis with nothing between linear layers but operators that keep channels apart."""

from __future__ import annotations

from collections.abc import Sequence, Set

import onnx_graphsurgeon as gs

from corp_onnx.blocks.branches import Branch, branches_of, same_places
from corp_onnx.blocks.linear import LEAVES_TOKENS_OUT
from corp_onnx.blocks.movement import MOVING_OPS, Blocked
from corp_onnx.blocks.packed import Packing, packing_of
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

_DONE = {
    "Concat": "joins several tensors",
    "Gather": "looks rows up",
    "Pad": "adds rows",
    "ScatterND": "writes over rows",
    "Slice": "leaves a part out",
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "MaxPool", "Resize"), "mixes rows"),
}
"""What operators do that mix no channels, and yet end the way to a layer."""


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
    if down.strided:
        return LEAVES_TOKENS_OUT
    explored = [region for region in regions if isinstance(region, Region)]
    if len(explored) < len(regions):
        return next(reason for reason in regions if isinstance(reason, str))
    region = explored[0]
    branches = _lasting(view, explored, down)
    packing = _packing(view, region, branches)
    gone = packing.tensors if isinstance(packing, Packing) else frozenset()
    reason = _other_reader(view, region, down, hidden, gone)
    if reason or isinstance(branches, str):
        return packing if reason and isinstance(packing, str) else reason or str(branches)
    assert isinstance(packing, Packing), "somebody reads what cannot be taken apart"
    kept = _kept(region, branches, gone)
    vectors, readers = _vectors(view, region, kept), _size_readers(view, region, branches, gone)
    if isinstance(vectors, str) or isinstance(readers, str):
        return vectors if isinstance(vectors, str) else str(readers)
    sources = [
        Source(
            view.linears[branch.source.name],
            branch.channels,
            branch.tensor.name,
            branch.whole.name,
        )
        for branch in branches
    ]
    return Mlp(
        block_id,
        tuple(sources),
        hidden.name,
        vectors,
        _targets(region, kept, down.width_in),
        down,
        down.width_in,
        (*readers, *packing.readers),
        fragments=packing.fragments,
        depthwise=tuple(node.name for node in kept if node.op == "Conv"),
    )


def _packing(view: View, region: Region, branches: Sequence[Branch] | str) -> Packing | str:
    """What the layers above compute beside hidden channels, or why they cannot be taken apart."""
    if isinstance(branches, str):
        return Packing()
    return packing_of(view, branches, {id(node) for node in region.nodes})


def _lasting(view: View, regions: Sequence[Region], down: Linear) -> list[Branch] | str:
    """The branches, if they are the same at all sizes and fit the down projection."""
    first, *others = (
        branches_of(view, region, facts) for region, facts in zip(regions, view.probes, strict=True)
    )
    if isinstance(first, str):
        return first
    width = len(first[0].channels)
    if width != down.width_in:
        return f"its input has {width} channels, its weight {down.width_in} rows"
    if any(isinstance(other, str) or not same_places(first, other) for other in others):
        return "its channels move when batch or sequence size changes"
    return first


def why_not_hidden(view: View, linear: Linear, tensor: gs.Tensor) -> str:
    """What stands above a linear layer that is no down projection, for the catalog."""
    explored = (explore(view, facts, tensor, linear.axis) for facts in view.probes)
    ends = (each for each in explored if isinstance(each, Blocked))
    found = next(ends, Blocked(None, tensor.name))
    if found.reason:
        above = found.reason
    elif found.node is None:
        above = f"its input follows from {found.tensor!r}, which no layer computes"
    else:
        does = _DONE.get(found.node.op, "mixes channels")
        above = f"its input comes through {found.node.op} ({found.node.name}), which {does}"
    return f"{above}, and its {linear.width_out} outputs are the hidden channels of no other layer"


def _other_reader(
    view: View, region: Region, down: Linear, hidden: gs.Tensor, gone: Set[str]
) -> str | None:
    """Who else reads the hidden channels, but for tensors that are ``gone`` with their layer."""
    inside = {id(node) for node in region.nodes}
    for tensor in (tensor for tensor in region.tensors() if tensor.name not in gone):
        if view.is_output(tensor):
            return f"its hidden tensor {tensor.name!r} is an output of the model"
        for node in view.readers(tensor):
            goes_down = tensor is hidden and node.name == down.node
            if id(node) not in inside and not goes_down and node.op != "Shape":
                return f"its hidden tensor {tensor.name!r} is also read by {node.op} ({node.name})"
    return None


def _vectors(view: View, region: Region, kept: list[gs.Node]) -> tuple[Vector, ...] | str:
    """The constants with a value for every hidden channel, or one that cannot be written anew."""
    found = []
    for node in kept:
        for slot, axis in constant_axes(view, region, node):
            if constant_value(node.inputs[slot], view.opset) is None:
                return f"{node.op} ({node.name}) meets {node.inputs[slot].name!r}, made at run time"
            found.append(Vector(node.name, slot, axis))
    return tuple(found)


def _kept(region: Region, branches: Sequence[Branch], gone: Set[str]) -> list[gs.Node]:
    """What stays when the layers are written anew; of those taken apart no Reshape does."""
    lost = {id(node) for branch in branches for node in branch.nodes}
    for branch in branches:
        lost.update(id(node) for node in branch.reshapes if node.outputs[0].name in gone)
    return [node for node in region.nodes if id(node) not in lost]


def _targets(region: Region, kept: list[gs.Node], width: int) -> tuple[Target, ...]:
    """The entry of every Reshape or Expand inside that says how many channels there are.

    Above the point where a packed layer is taken apart that is a multiple of the width.
    """
    targets = []
    for node in kept:
        if node.op in {"Reshape", "Expand"}:
            labels = region.labels[node.outputs[0].name]
            along = line(labels)
            assert along is not None, "movement that stays leaves the channels on one axis"
            multiple = len(along.channels) // width
            targets.append(Target(node.name, along.axis, labels.ndim, multiple))
    return tuple(targets)


def _size_readers(
    view: View, region: Region, branches: Sequence[Branch], gone: Set[str]
) -> tuple[SizeReader, ...] | str:
    """Shape nodes on hidden tensors: all axes but that of the channels stay as they are.

    Those that only say where data is to move within the region go along with it.
    """
    moving = {id(node) for node in region.nodes if node.op in MOVING_OPS}
    lost = {t.name for branch in branches for node in branch.nodes for t in node.outputs}
    lost -= {branch.tensor.name for branch in branches}
    readers = []
    for tensor in (tensor for tensor in region.tensors() if tensor.name not in gone):
        for node in view.readers(tensor):
            if node.op != "Shape" or serves_only(node, moving):
                continue
            along = line(region.labels[tensor.name]) if tensor.name in region.labels else None
            if along is None or tensor.name in lost:
                return f"the shape of {tensor.name!r} is read ({node.name})"
            shape = view.shape(tensor) or ()
            sizes: list[int | str] = [
                size if axis == along.axis else f"t{axis}" for axis, size in enumerate(shape)
            ]
            read = slice(node.attrs.get("start", 0), node.attrs.get("end"))
            readers.append(SizeReader(node.name, tuple(sizes[read]), tensor.name))
    return tuple(readers)
