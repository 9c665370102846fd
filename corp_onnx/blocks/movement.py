"""Data movement is understood by running it on channel numbers.

A tensor that holds its own element numbers goes in at a linear layer's output; what comes out at
the other end says which (head, position) holds which channel, and what became of batch and
sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.view import View, producer
from corp_onnx.graph import reference
from corp_onnx.graph.facts import Facts
from corp_onnx.graph.operators import is_standard

PASSING_OPS = frozenset({"Identity", "Cast", "Dropout"})
MOVING_OPS = frozenset(
    {
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Split",
        "Slice",
        "Gather",
        "GatherND",
        "Expand",
        "Tile",
        "Concat",
    }
)
AFFINE_OPS = frozenset({"Mul", "Div", "Add", "Sub"})


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """Nodes, in order, through which ``target`` follows from ``source`` by movement and scaling."""

    source: gs.Tensor
    target: gs.Tensor
    nodes: tuple[gs.Node, ...]
    turning: frozenset[int] = frozenset()
    """Nodes, by ``id``, that turn channels by their position: they move nothing, and scale nothing
    that counts here."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """A path that ends at an operator which is neither movement nor a constant scale."""

    node: gs.Node | None
    tensor: str
    reason: str | None = None
    """Why nothing could be followed further, where it is known."""


def climb(view: View, target: gs.Tensor) -> Path | Blocked:
    """The path from a linear layer's output up to ``target``, or what blocks it."""
    stack, nodes, sources = [target], [], {}
    while stack:
        tensor = stack.pop()
        if tensor.name in view.linears:
            sources[tensor.name] = tensor
            continue
        node = producer(tensor)
        carried = None if node is None else carried_inputs(view, node)
        if node is None or not carried:
            return Blocked(node, tensor.name)
        nodes.append(node)
        stack.extend(carried)
    if len(sources) != 1:
        joins = [node for node in nodes if node.op == "Concat"]
        return Blocked(next(iter([*joins, *nodes]), None), target.name)
    (source,) = sources.values()
    return Path(source, target, tuple(view.in_order(nodes)))


def element_numbers(shape: Sequence[int], axis: int) -> np.ndarray:
    """Element numbers of a linear layer's output: ``token · d + channel``, channels on ``axis``."""
    tokens_last = np.arange(np.prod(shape)).reshape(*np.delete(shape, axis), shape[axis])
    return np.moveaxis(tokens_last, -1, axis)


def carried_inputs(view: View, node: gs.Node) -> list[gs.Tensor]:
    """The inputs whose elements a node moves or scales; empty if it does anything else."""
    if not is_standard(node):
        return []
    if node.op in PASSING_OPS or (node.op in MOVING_OPS and node.op != "Concat"):
        return [node.inputs[0]]
    if node.op == "Concat":
        return list(node.inputs)
    if node.op in AFFINE_OPS:
        open_inputs = [tensor for tensor in node.inputs if view.known(tensor) is None]
        inverted = node.op == "Div" and open_inputs == [node.inputs[1]]
        return open_inputs if len(open_inputs) == 1 and not inverted else []
    return []


def pattern(path: Path, facts: Facts) -> Hashable:
    """What a path does, whatever its nodes and tensors are called.

    Layers that repeat have the same movement: it need be run for the first of them only.
    """
    place = {path.source.name: 0}
    steps: list[Hashable] = []
    for node in path.nodes:
        inputs = [_known_as(tensor, place, facts) for tensor in node.inputs]
        outputs = [facts.shape(tensor) for tensor in node.outputs]
        attributes = sorted((name, repr(value)) for name, value in node.attrs.items())
        steps.append((node.op, *inputs, *outputs, *attributes))
        for tensor in node.outputs:
            place[tensor.name] = len(place)
    return place.get(path.target.name), facts.shape(path.source), tuple(steps)


def _known_as(tensor: gs.Tensor, place: Mapping[str, int], facts: Facts) -> Hashable:
    """A tensor of a path by its place in it, any other by its value."""
    if tensor.name in place:
        return place[tensor.name]
    value = facts.value(tensor) if tensor.name else None
    return None if value is None else (value.shape, str(value.dtype), value.tobytes())


def move(
    path: Path, start: np.ndarray, facts: Facts, opset: int, *, scaled: bool
) -> dict[str, np.ndarray] | None:
    """What ``start`` at the path's source becomes at every tensor on the way.

    With ``scaled`` the constants that are multiplied and added take part; without, elements only
    move. None if an operand of the movement is not known, or sizes contradict each other.
    """
    arrays = {path.source.name: start}
    for node in path.nodes:
        shape = facts.shape(node.outputs[0])
        if shape is None:
            return None
        if node.op in AFFINE_OPS and (not scaled or id(node) in path.turning):
            (carried,) = {tensor.name for tensor in node.inputs} & arrays.keys()
            arrays[node.outputs[0].name] = np.broadcast_to(arrays[carried], shape)
        elif not apply(node, arrays, facts, opset):
            return None
    return arrays


def apply(node: gs.Node, arrays: dict[str, np.ndarray], facts: Facts, opset: int) -> bool:
    """Add what a node makes of ``arrays``; False if another operand of it is not known."""
    inputs = _inputs(node, arrays, facts)
    if inputs is None:
        return False
    for tensor, value in zip(node.outputs, _apply(node, inputs, opset), strict=False):
        arrays[tensor.name] = value
    return True


def _inputs(
    node: gs.Node, arrays: Mapping[str, np.ndarray], facts: Facts
) -> list[np.ndarray] | None:
    values = [
        arrays[tensor.name] if tensor.name in arrays else facts.value(tensor)
        for tensor in node.inputs
        if tensor.name
    ]
    return None if any(value is None for value in values) else values  # type: ignore[return-value]


def _apply(node: gs.Node, inputs: Sequence[np.ndarray], opset: int) -> Sequence[np.ndarray]:
    if node.op in PASSING_OPS:
        return [inputs[0]]
    if node.op in AFFINE_OPS:
        return [_ARITHMETIC[node.op](inputs[0], inputs[1])]
    names = [tensor.name for tensor in node.inputs if tensor.name]
    return reference.run(node, dict(zip(names, inputs, strict=True)), opset)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    quotient: np.ndarray = np.asarray(a, dtype=np.float64) / b
    return quotient


_ARITHMETIC: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Mul": np.multiply,
    "Div": _divide,
    "Add": np.add,
    "Sub": np.subtract,
}
