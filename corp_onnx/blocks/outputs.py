"""From mixed values down to the output projection: which channel of it reads which head."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.linear import LEAVES_TOKENS_OUT
from corp_onnx.blocks.movement import MOVING_OPS, PASSING_OPS, Path, move
from corp_onnx.blocks.operands import Operand, spread
from corp_onnx.blocks.readers import measured_only, readers_below
from corp_onnx.blocks.records import Linear, Output, Target
from corp_onnx.blocks.routes import Traced
from corp_onnx.blocks.view import View
from corp_onnx.graph.facts import Facts
from corp_onnx.graph.operators import SIZE_OPS

SCALING_OPS = frozenset({"Mul", "Div"})


def find_output(view: View, context: Operand, value: Traced) -> Output | str:
    """Follow the mixed values through movement to the output projection."""
    descended = _descend(view, context.tensor)
    if isinstance(descended, str):
        return descended
    path, linear = descended
    found = []
    for index, facts in enumerate(view.probes):
        output = _read_off(view, path, linear, context, value.landings[index].heads, facts)
        if isinstance(output, str):
            return output
        found.append(output)
    first, *others = found
    for other in others:
        same = np.array_equal(first.places, other.places)
        if not same or not np.array_equal(first.value_heads, other.value_heads):
            return "the output projection reads other channels when a size changes"
    return first


def _descend(view: View, context: gs.Tensor) -> tuple[Path, Linear] | str:
    """The movement from mixed values to the only linear layer that reads them.

    What is made of them for the sake of its size alone goes along.
    """
    nodes: list[gs.Node] = []
    tensor = context
    linears = {(item.node, item.input): item for item in view.linears.values()}
    while True:
        readers = []
        for node in view.readers(tensor):
            measured = measured_only(view, node)
            nodes.extend(measured)
            if node.op not in SIZE_OPS and not measured:
                readers.append(node)
        if view.is_output(tensor) or len(readers) != 1:
            ops = ", ".join(f"{node.op} {node.name}" for node in readers)
            times = f"{len(readers)} times ({ops})" if readers else "0 times"
            return f"the mixed values {tensor.name!r} are read {times}, or by the caller"
        (node,) = readers
        linear = linears.get((node.name, tensor.name))
        if linear is not None and linear.strided:
            return LEAVES_TOKENS_OUT
        if linear is not None:
            return Path(context, tensor, tuple(view.in_order(nodes))), linear
        joins = node.op == "Concat" and len(node.inputs) > 1
        moves = node.op in MOVING_OPS | PASSING_OPS and not joins and len(node.outputs) == 1
        if not moves and not (node.op in SCALING_OPS and _is_carried(view, node, tensor)):
            return f"{node.op} ({node.name}) stands between the mixed values and a linear layer"
        nodes.append(node)
        tensor = node.outputs[0]


def _is_carried(view: View, node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether a product or quotient scales ``tensor`` and leaves its shape."""
    dividend = node.op == "Mul" or node.inputs[0] is tensor
    once = sum(value is tensor for value in node.inputs) == 1
    return dividend and once and view.shape(tensor) == view.shape(node.outputs[0])


def _read_off(
    view: View, path: Path, linear: Linear, context: Operand, heads: np.ndarray, facts: Facts
) -> Output | str:
    """The output at one set of sizes, given the value head at every leading index of the value."""
    shape = facts.shape(context.tensor)
    of_lead = None if shape is None else spread(heads, context.lead(shape))
    if shape is None or of_lead is None:
        return "the value is shared in a way that the mixed values do not follow"
    numbers = np.arange(np.prod(shape)).reshape(shape)
    moved = move(path, numbers, facts, view.opset, scaled=False)
    if moved is None:
        return "the mixed values are moved by sizes that depend on the data"
    rows = context.rows(numbers)
    lead, position = np.empty(numbers.size, dtype=int), np.empty(numbers.size, dtype=int)
    lead[rows] = np.arange(of_lead.size).reshape(*of_lead.shape, 1, 1)
    position[rows] = np.arange(rows.shape[-1])
    scaled = _scaled_channels(path, moved, position, facts)
    if scaled is not None:
        return scaled
    found = _places(moved[path.target.name], linear, lead, position, of_lead.reshape(-1))
    if found is None:
        return "the output projection reads heads in an order that changes from token to token"
    places, value_heads = found
    if len(np.unique(places, axis=0)) < len(places):
        return "the output projection reads a channel of the mixed values twice"
    readers = readers_below(view, path, moved, position)
    if isinstance(readers, str):
        return readers
    return Output(linear, places, value_heads, _targets(path, moved, position, linear), readers)


def _places(
    target: np.ndarray, linear: Linear, lead: np.ndarray, position: np.ndarray, heads: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Head and position of every input channel, alike for all tokens, and every head's value head.

    Channels that come from one leading index of the mixed values are those of one head. Where
    every value head serves one of them, they are numbered alike.
    """
    rows = np.moveaxis(target, linear.axis, -1).reshape(-1, linear.width_in)
    leads, positions = lead[rows], position[rows]
    _, first, head = np.unique(leads[0], return_index=True, return_inverse=True)
    value_heads = heads[leads[0, first]]
    one_to_one = np.array_equal(np.sort(value_heads), np.arange(heads.max() + 1))
    alike = (
        (positions == positions[0]).all()
        and (leads == leads[:, first[head]]).all()
        and (heads[leads] == value_heads[head]).all()
    )
    if not alike:
        return None
    if one_to_one:
        head, value_heads = value_heads[head], np.sort(value_heads)
    return np.stack([head, positions[0]], axis=-1), value_heads


def _scaled_channels(
    path: Path, moved: Mapping[str, np.ndarray], position: np.ndarray, facts: Facts
) -> str | None:
    """Whether a factor on the way differs between the channels of one head."""
    for node in path.nodes:
        if node.op not in SCALING_OPS:
            continue
        (carried,) = (tensor for tensor in node.inputs if tensor.name in moved)
        (factor,) = (tensor for tensor in node.inputs if tensor is not carried)
        shape, places = facts.shape(factor), position[moved[carried.name]]
        if shape is None:
            return f"{node.op} ({node.name}) scales the mixed values by something of unknown shape"
        for axis, size in zip(range(-len(shape), 0), shape, strict=True):
            if size > 1 and np.diff(places, axis=axis).any():
                return f"{node.op} ({node.name}) scales channels of the mixed values one by one"
    return None


def _targets(
    path: Path, moved: Mapping[str, np.ndarray], position: np.ndarray, linear: Linear
) -> tuple[Target, ...]:
    """For each Reshape of the path: the entry that holds value channels, of how many heads."""
    targets, width = [], int(position.max()) + 1
    for node in path.nodes:
        if node.op != "Reshape":
            continue
        places = position[moved[node.outputs[0].name]]
        moving = [axis for axis in range(places.ndim) if np.diff(places, axis=axis).any()]
        axis = moving[-1] if moving else linear.axis % places.ndim
        targets.append(Target(node.name, axis, places.ndim, places.shape[axis] // width))
    return tuple(targets)
