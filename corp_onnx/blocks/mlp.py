"""MLPs: a hidden axis with nothing but per-channel operators between linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx import shapes
from corp_onnx.blocks.movement import MOVING_OPS, PASSING_OPS
from corp_onnx.blocks.records import Linear, Mlp, Refusal, SizeReader, Source, Target, Vector
from corp_onnx.blocks.view import OPEN_SIZE, View, producer, serves_only
from corp_onnx.shapes import Facts

CHANNELWISE_OPS = frozenset(
    """Abs Add Celu Clip Cos Div Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Log Max Min Mish
    Mul Neg PRelu Pow Reciprocal Relu Selu Sigmoid Sin Softplus Softsign Sqrt Sub Swish Tanh
    ThresholdedRelu Where Greater Less GreaterOrEqual LessOrEqual Equal Not And Or Sign Floor
    FastGelu QuickGelu""".split()
)
"""Operators that act on every element by itself: any closed region of them is an activation."""


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """What lies between linear layers and the input of another one."""

    nodes: tuple[gs.Node, ...]
    sources: tuple[gs.Tensor, ...]


def match_mlp(view: View, down: Linear, hidden: gs.Tensor, block_id: str) -> Mlp | Refusal | None:
    """The MLP whose down projection is ``down``; None if its input is no hidden axis."""
    region = _climb(view, hidden)
    if region is None:
        return None
    inside = {id(node) for node in region.nodes}
    reader = _other_reader(view, region, inside, down, hidden)
    if reader is not None:
        return Refusal(down.node, "Linear", reader)
    traced = []
    for facts in view.probes:
        result = _trace(view, region, facts, hidden)
        if isinstance(result, str):
            return Refusal(down.node, "Linear", result)
        traced.append(result)
    channels, vectors = traced[0]
    if any(len(order) != down.width_in for order in channels.values()):
        wide = len(next(iter(channels.values())))
        reason = f"its input has {wide} channels, its weight {down.width_in} rows"
        return Refusal(down.node, "Linear", reason)
    if any(not _same(channels, other) for other, _ in traced):
        return Refusal(down.node, "Linear", "its channels move when batch or sequence size changes")
    readers = _size_readers(view, region)
    return Mlp(
        block_id,
        tuple(Source(view.linears[name], order) for name, order in channels.items()),
        hidden.name,
        vectors,
        _targets(view, region),
        down,
        down.width_in,
        readers,
    )


def why_not_hidden(view: View, linear: Linear, tensor: gs.Tensor) -> str:
    """What stands above a linear layer that is no down projection, for the catalog."""
    node = producer(tensor)
    while node is not None and (node.op in CHANNELWISE_OPS | PASSING_OPS | {"Reshape"}):
        following = [value for value in node.inputs if view.known(value) is None]
        if not following or following[0].name in view.linears:
            break
        tensor = following[0]
        node = producer(tensor)
    above = (
        f"follows from {tensor.name!r}, which no layer computes"
        if node is None
        else f"comes through {node.op} ({node.name}), which mixes channels or is read elsewhere"
    )
    return f"its input {above}, and its {linear.width_out} outputs end in no other linear layer"


def _climb(view: View, hidden: gs.Tensor) -> Region | None:
    """Everything between ``hidden`` and the linear layers above it; None if more than that."""
    nodes, sources, stack = [], {}, [hidden]
    seen: set[str] = set()
    while stack:
        tensor = stack.pop()
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        if tensor.name in view.linears:
            sources[tensor.name] = tensor
            continue
        node = producer(tensor)
        inputs = [] if node is None else _open_inputs(view, node)
        if node is None or not inputs:
            return None
        nodes.append(node)
        stack.extend(inputs)
    return Region(tuple(view.in_order(nodes)), tuple(sources.values())) if sources else None


def _open_inputs(view: View, node: gs.Node) -> list[gs.Tensor]:
    """The operands of a per-channel operator or a movement that carry hidden channels."""
    if node.op in PASSING_OPS | MOVING_OPS and node.op != "Concat":
        return [node.inputs[0]]
    if node.op in CHANNELWISE_OPS:
        return [
            tensor
            for tensor in node.inputs
            if tensor.name and view.known(tensor) is None and not _is_per_token(view, tensor)
        ]
    return []


def _is_per_token(view: View, tensor: gs.Tensor) -> bool:
    """Whether all channels share one value, so that cutting channels does not touch it."""
    shape = view.shape(tensor)
    return shape is not None and (not shape or shape[-1] == 1)


def _other_reader(
    view: View, region: Region, inside: set[int], down: Linear, hidden: gs.Tensor
) -> str | None:
    """Who else reads the hidden channels."""
    tensors = [*region.sources, *(node.outputs[0] for node in region.nodes)]
    for tensor in tensors:
        if view.is_output(tensor):
            return f"its hidden tensor {tensor.name!r} is an output of the model"
        for node in tensor.outputs:
            goes_down = tensor is hidden and node.name == down.node
            if id(node) not in inside and not goes_down and node.op != "Shape":
                return f"its hidden tensor {tensor.name!r} is also read by {node.op} ({node.name})"
    return None


Channels = dict[str, np.ndarray]


def _trace(
    view: View, region: Region, facts: Facts, hidden: gs.Tensor
) -> tuple[Channels, tuple[Vector, ...]] | str:
    """The source channel behind every hidden channel, and the constants that they meet."""
    width = (facts.shape(hidden) or (0,))[-1]
    channels: Channels = {}
    vectors: dict[tuple[str, int], Vector] = {}
    for source in region.sources:
        shape = facts.shape(source)
        if shape is None or facts.shape(hidden) is None:
            return f"its {OPEN_SIZE}"
        arrays = {source.name: np.arange(np.prod(shape)).reshape(shape)}
        for node in region.nodes:
            reason = _step(view, node, arrays, facts, vectors, width)
            if reason is not None:
                return reason
        order = _order(arrays[hidden.name], shape, facts.shape(hidden))
        if order is None:
            return f"the channels of {source.name!r} do not reach its input one to one, in place"
        channels[source.name] = order
    return channels, tuple(vectors.values())


def _step(
    view: View,
    node: gs.Node,
    arrays: dict[str, np.ndarray],
    facts: Facts,
    vectors: dict[tuple[str, int], Vector],
    width: int,
) -> str | None:
    """Carry element numbers through one node; a reason if they do not go through."""
    carried = [tensor for tensor in node.inputs if tensor.name in arrays]
    if not carried:
        return None
    if node.op in MOVING_OPS:
        return _move(node, arrays, facts, view.opset)
    first = arrays[carried[0].name]
    if any(not np.array_equal(arrays[tensor.name], first) for tensor in carried[1:]):
        return f"{node.op} ({node.name}) combines different channels of one layer (a packed gate)"
    for slot, tensor in enumerate(node.inputs):
        value = view.known(tensor) if tensor.name else None
        if value is None or value.ndim == 0 or value.shape[-1] == 1:
            continue
        if value.shape[-1] != width or value.size != width or not isinstance(tensor, gs.Constant):
            return f"{node.op} ({node.name}) meets a constant of shape {list(value.shape)}"
        vectors[node.name, slot] = Vector(node.name, slot)
    arrays[node.outputs[0].name] = first
    return None


def _move(node: gs.Node, arrays: dict[str, np.ndarray], facts: Facts, opset: int) -> str | None:
    inputs = {
        tensor.name: arrays[tensor.name] if tensor.name in arrays else facts.value(tensor)
        for tensor in node.inputs
        if tensor.name
    }
    if any(value is None for value in inputs.values()):
        return f"{node.op} ({node.name}) moves channels by sizes that depend on the data"
    last = arrays[node.inputs[0].name].shape[-1]
    outputs = shapes.run(node, inputs, opset)  # type: ignore[arg-type]
    if len(outputs) != 1 or outputs[0].shape[-1] != last:
        return f"{node.op} ({node.name}) splits or merges the hidden axis (a packed gate)"
    arrays[node.outputs[0].name] = outputs[0]
    return None


def _order(
    numbers: np.ndarray, source: tuple[int, ...], hidden: tuple[int, ...] | None
) -> np.ndarray | None:
    """Channel of the source at every hidden channel, if tokens keep their order; else None."""
    rows = numbers.reshape(-1, numbers.shape[-1])
    order = rows[0] % source[-1]
    tokens = np.arange(len(rows))[:, None] * source[-1]
    complete = numbers.shape == hidden and len(np.unique(order)) == source[-1] == order.size
    return order if complete and np.array_equal(rows, tokens + order) else None


def _targets(view: View, region: Region) -> tuple[Target, ...]:
    """The last entry of every Reshape inside."""
    ranks = {
        node.name: len(view.shape(node.outputs[0]) or ())
        for node in region.nodes
        if node.op == "Reshape"
    }
    return tuple(Target(name, rank - 1, rank, 1) for name, rank in ranks.items())


def _same(one: Channels, other: Channels) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def _size_readers(view: View, region: Region) -> tuple[SizeReader, ...]:
    """Shape nodes on hidden tensors: all axes but the last stay as they are.

    Those that only say where data is to move within the region go along with it.
    """
    moving = {id(node) for node in region.nodes if node.op in MOVING_OPS}
    tensors: Sequence[gs.Tensor] = [*region.sources, *(node.outputs[0] for node in region.nodes)]
    readers = []
    for tensor in tensors:
        shape = view.shape(tensor) or ()
        for node in tensor.outputs:
            if node.op == "Shape" and not serves_only(node, moving):
                sizes: list[int | str] = [
                    *(f"t{axis}" for axis in range(len(shape) - 1)),
                    shape[-1],
                ]
                read = slice(node.attrs.get("start", 0), node.attrs.get("end"))
                readers.append(SizeReader(node.name, tuple(sizes[read]), tensor.name))
    return tuple(readers)
