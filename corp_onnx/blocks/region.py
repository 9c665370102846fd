"""Between linear layers: which hidden channel each element of each tensor belongs to.

Every element of the hidden tensor is labelled with the number of its channel. Labels are carried
upwards, against the data flow, through operators that keep channels apart; what arrives at the
linear layers above says which of their outputs make which hidden channel.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Int64

from corp_onnx.blocks.movement import MOVING_OPS, PASSING_OPS, Blocked
from corp_onnx.blocks.view import OPEN_SIZE, View, producer, reduced_axes
from corp_onnx.graph import reference
from corp_onnx.graph.facts import Facts
from corp_onnx.graph.operators import MICROSOFT, STANDARD

CHANNELWISE_OPS = frozenset(
    """Abs Add Celu Clip Cos Div Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Log Max Min Mish
    Mul Neg PRelu Pow Reciprocal Relu Selu Sigmoid Sin Softplus Softsign Sqrt Sub Swish Tanh
    ThresholdedRelu Where Greater Less GreaterOrEqual LessOrEqual Equal Not And Or Sign Floor
    BiasGelu FastGelu QuickGelu""".split()
)
"""Operators that act on every element by itself: any closed region of them is an activation."""

POSITIONAL_OPS = frozenset(
    "AveragePool BatchNormalization GlobalAveragePool GlobalMaxPool InstanceNormalization "
    "MaxPool".split()
)
"""Operators that mix positions and keep the channels of axis 1 apart; so do depthwise Conv."""

REDUCING_OPS = frozenset(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSum ReduceSumSquare".split()
)
"""Operators that mix positions along some axes, and keep channels of another one apart."""

KNOWN_DOMAINS = STANDARD | {MICROSOFT}
"""Whose operators mean what their names say."""

NOBODY = -1
"""The label of an element that reaches no hidden channel."""


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """Labels that change along one axis only."""

    axis: int
    channels: Int64[np.ndarray, " k"]

    def is_whole(self, width: int) -> bool:
        """Whether it is every hidden channel, once and in order."""
        return np.array_equal(self.channels, np.arange(width))


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """What lies between linear layers and the input of another one."""

    nodes: tuple[gs.Node, ...]
    sources: tuple[gs.Tensor, ...]
    labels: Mapping[str, np.ndarray]
    """For every tensor by name: the hidden channel of each element."""

    def tensors(self) -> Iterator[gs.Tensor]:
        """Every tensor of the region, sources first."""
        yield from self.sources
        for node in self.nodes:
            yield from (tensor for tensor in node.outputs if tensor.name)


def explore(view: View, facts: Facts, hidden: gs.Tensor, axis: int) -> Region | Blocked | str:
    """Climb from a hidden tensor, with channels on ``axis``, to the linear layers above it.

    Returns:
        The region; or what else than linear layers stands above, so that there is no hidden axis;
        or the reason why channels do not stay apart on the way.
    """
    shape = facts.shape(hidden)
    if shape is None:
        return f"its {OPEN_SIZE}"
    climb = _Climb(view, facts)
    climb.reach(hidden, spread(np.arange(shape[axis]), axis % len(shape), shape))
    while climb.pending and climb.blocked is None:
        climb.through(climb.next())
    reason = climb.reasons[0] if climb.reasons else None
    if climb.blocked is not None or not climb.sources:
        return climb.blocked or Blocked(None, hidden.name, reason)
    if reason:
        return reason
    nodes = tuple(view.in_order(climb.nodes))
    return Region(nodes, tuple(climb.sources.values()), climb.labels)


@dataclass(slots=True)
class _Climb:
    """A climb on its way: nodes are visited only after all their readers."""

    view: View
    facts: Facts
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    sources: dict[str, gs.Tensor] = field(default_factory=dict)
    nodes: list[gs.Node] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    pending: list[tuple[int, gs.Node]] = field(default_factory=list)
    blocked: Blocked | None = None

    def reach(self, tensor: gs.Tensor, labels: np.ndarray, by: gs.Node | None = None) -> None:
        """Label a tensor, and go on from it unless a linear layer computes it."""
        known = self.labels.get(tensor.name)
        if known is not None:
            if ((known != labels) & (known != NOBODY) & (labels != NOBODY)).any():
                assert by is not None, "the hidden tensor is reached first"
                self.reasons.append(f"{_named(by)} combines different channels of {tensor.name!r}")
            self.labels[tensor.name] = np.maximum(known, labels)
            return
        self.labels[tensor.name] = labels
        if tensor.name in self.view.linears:
            self.sources[tensor.name] = tensor
            return
        node = producer(tensor)
        if node is None:
            self.blocked = Blocked(None, tensor.name)
        elif all(node is not other for _, other in self.pending):
            heapq.heappush(self.pending, (-self.view.order[id(node)], node))

    def next(self) -> gs.Node:
        """The last node, in the order of the graph, that is still to be visited."""
        _, node = heapq.heappop(self.pending)
        return node

    def through(self, node: gs.Node) -> None:
        """Carry labels from a node's outputs to its inputs, unless it mixes channels."""
        self.nodes.append(node)
        if node.domain not in KNOWN_DOMAINS:
            self.blocked = Blocked(node, node.outputs[0].name)
        elif node.op in PASSING_OPS:
            self.reach(node.inputs[0], self.labels[node.outputs[0].name], node)
        elif node.op in MOVING_OPS and self._moves(node):
            self._move(node)
        elif node.op in CHANNELWISE_OPS:
            self._apart(node, node.inputs)
        elif is_positional(self.view, node):
            self._apart(node, node.inputs[:1])
        elif node.op in REDUCING_OPS and (before := self._unreduced(node)) is not None:
            self.reach(node.inputs[0], before, node)
        else:
            self.blocked = Blocked(node, node.outputs[0].name)

    def _unreduced(self, node: gs.Node) -> np.ndarray | None:
        """Labels before a reduction; None if it mixes channels: behind it they are on no axis."""
        found, shape = line(self.labels[node.outputs[0].name]), self.facts.shape(node.inputs[0])
        if found is None or shape is None:
            return None
        gone = {axis % len(shape) for axis in reduced_axes(self.view, node)}
        lost = set() if node.attrs.get("keepdims", 1) else gone
        kept = [axis for axis in range(len(shape)) if axis not in lost]
        return spread(found.channels, kept[found.axis], shape) if gone else None

    def _moves(self, node: gs.Node) -> bool:
        """Whether a movement takes its elements from tensors that are computed, and no others."""
        return all(self.view.known(tensor) is None for tensor in _moved(node))

    def _move(self, node: gs.Node) -> None:
        """Labels before data movement, which is run on element numbers to see what went where."""
        tensors = _moved(node)
        shapes_before = [self.facts.shape(tensor) for tensor in tensors]
        inputs = {other.name: self.facts.value(other) for other in node.inputs if other.name}
        counts = [int(np.prod(shape)) for shape in shapes_before if shape is not None]
        ends = np.cumsum([0, *counts])
        for tensor, shape, start in zip(tensors, shapes_before, ends, strict=False):
            inputs[tensor.name] = start + np.arange(np.prod(shape or ())).reshape(shape or ())
        if len(counts) < len(tensors) or any(value is None for value in inputs.values()):
            self.reasons.append(f"{_named(node)} moves channels by sizes that depend on the data")
            return
        moved = reference.run(node, inputs, self.view.opset)  # type: ignore[arg-type]
        before = np.full(ends[-1], NOBODY)
        known = [
            (numbers.reshape(-1), self.labels[output.name].reshape(-1))
            for output, numbers in zip(node.outputs, moved, strict=False)
            if output.name in self.labels
        ]
        for numbers, after in known:
            before[numbers[after != NOBODY]] = after[after != NOBODY]
        if any((before[numbers] != after)[after != NOBODY].any() for numbers, after in known):
            self.reasons.append(f"{_named(node)} copies a channel to several places")
        for tensor, shape, part in zip(
            tensors, shapes_before, np.split(before, ends[1:-1]), strict=True
        ):
            self.reach(tensor, part.reshape(shape or ()), node)

    def _apart(self, node: gs.Node, operands: Sequence[gs.Tensor]) -> None:
        """Labels before an operator that keeps channels apart.

        An operand with one value for all channels has none.
        """
        found = line(self.labels[node.outputs[0].name])
        if found is None:
            self.reasons.append(f"{_named(node)} meets channels that are spread over several axes")
            return
        rank = self.labels[node.outputs[0].name].ndim
        for tensor in operands:
            if not tensor.name or self.view.known(tensor) is not None:
                continue
            shape = self.facts.shape(tensor)
            if shape is None:
                self.reasons.append(f"its {OPEN_SIZE}")
                continue
            axis = found.axis - (rank - len(shape))
            if axis < 0 or shape[axis] != len(found.channels):
                continue
            self.reach(tensor, spread(found.channels, axis, shape), node)


def _moved(node: gs.Node) -> list[gs.Tensor]:
    """The inputs whose elements a movement moves: what Concat joins, each once, or the first."""
    if node.op == "Concat":
        return list({tensor.name: tensor for tensor in node.inputs}.values())
    return [node.inputs[0]]


def is_positional(view: View, node: gs.Node) -> bool:
    """Whether a node mixes positions but never channels, which lie on axis 1."""
    if node.op == "Conv":
        weight = view.known(node.inputs[1])
        return weight is not None and weight.shape[:2] == (node.attrs.get("group", 1), 1)
    return node.op in POSITIONAL_OPS and all(
        view.known(tensor) is not None for tensor in node.inputs[1:]
    )


def constant_axes(view: View, region: Region, node: gs.Node) -> Iterator[tuple[int, int]]:
    """Slots of constants with a value for every hidden channel, and the axis where these lie."""
    if node.op not in CHANNELWISE_OPS and not is_positional(view, node):
        return
    after = region.labels[node.outputs[0].name]
    found = line(after)
    assert found is not None, "a node that keeps channels apart has them on one axis"
    for slot, tensor in enumerate(node.inputs):
        value = view.known(tensor) if tensor.name else None
        if value is None or tensor.name in region.labels:
            continue
        axis = found.axis - (after.ndim - value.ndim) if node.op in CHANNELWISE_OPS else 0
        if value.ndim and axis >= 0 and value.shape[axis] == len(found.channels) > 1:
            yield slot, axis


def line(labels: np.ndarray) -> Line | None:
    """Labels as a line; None if they change along no axis, or along several."""
    # An axis without a stride repeats one entry: nothing has to be compared along it.
    several = [axis for axis in range(labels.ndim) if labels.strides[axis] and labels.shape[axis]]
    axes = [axis for axis in several if np.diff(_corner(labels, several), axis=axis).any()]
    if len(axes) != 1:
        return None
    return Line(
        axes[0], labels[tuple(slice(None) if axis == axes[0] else 0 for axis in range(labels.ndim))]
    )


def _corner(labels: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """The first entry along all axes but these."""
    places = tuple(slice(None) if axis in axes else slice(0, 1) for axis in range(labels.ndim))
    return labels[places]


def spread(values: np.ndarray, axis: int, shape: Sequence[int]) -> np.ndarray:
    """A vector laid along one axis of a shape."""
    return np.broadcast_to(values.reshape([-1] + [1] * (len(shape) - axis - 1)), shape)


def _named(node: gs.Node) -> str:
    return f"{node.op} ({node.name})"
