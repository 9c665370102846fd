"""From a Softmax up to the product of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.movement import MOVING_OPS, PASSING_OPS
from corp_onnx.blocks.records import Mask, Refusal, Scalar
from corp_onnx.blocks.view import (
    OPEN_SIZE,
    View,
    follows_data,
    layers_above,
    producer,
    reduced_axes,
)

BENDING_OPS = frozenset({"Tanh", "Relu", "Sigmoid", "Clip", "Max", "Min", "Exp", "Softsign", "Erf"})
"""Functions of the logits that end their being bilinear in queries and keys."""

JOINING_OPS = frozenset({"Mul", "Div", "Add", "Sub", "Where"})
TURNING_OPS = MOVING_OPS | {"GatherElements", "Pad"}
MIXING_OPS = frozenset({"BatchNormalization", "Conv", "Gemm", "LayerNormalization", "MatMul"})
"""What may be done to all heads together, before Softmax or after it: talking heads."""


NO_PRODUCT = "not from one product of queries and keys"


@dataclass(frozen=True, slots=True, eq=False)
class Anchor:
    """A Softmax, whole or written out, with its logits and its probabilities."""

    node: gs.Node
    logits: gs.Tensor
    probabilities: gs.Tensor
    axes: tuple[int, ...]
    """The axes that it runs over, counted from the last, which is -1."""


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """The product under a Softmax, and what happens to it on the way."""

    product: gs.Node | None
    keys_left: bool = False
    """Whether the left operand of the product holds the keys."""
    frozen: tuple[Scalar, ...] = ()
    mask: Mask | None = None
    reason: str | None = None
    """Why the product need not be what it was, only narrower; None if it may be replaced."""


def match_softmax(view: View, node: gs.Node) -> Anchor | Refusal | None:
    """Read a Softmax, or ``exp(x) / sum(exp(x))`` written out."""
    if node.op == "Softmax":
        logits = node.inputs[0]
        rank = len(view.shape(logits) or ())
        axis = node.attrs.get("axis", -1 if view.opset >= 13 else 1)
        if not rank:
            return Refusal(node.name, node.op, f"its {OPEN_SIZE}")
        end = axis % rank + 1 if view.opset >= 13 else rank
        axes = tuple(index - rank for index in range(axis % rank, end))
        return Anchor(node, logits, node.outputs[0], axes)
    if node.op != "Div":
        return None
    above, below = (producer(tensor) for tensor in node.inputs)
    if above is None or below is None:
        return None
    if above.op != "Exp" or below.op != "ReduceSum" or below.inputs[0] is not node.inputs[0]:
        return None
    rank = len(view.shape(node.inputs[0]) or ())
    if not rank:
        return Refusal(node.name, node.op, f"its {OPEN_SIZE}")
    axes = tuple(axis % rank - rank for axis in reduced_axes(view, below) or range(rank))
    return Anchor(node, _before_shift(view, above.inputs[0]), node.outputs[0], axes)


def match_logits(view: View, anchor: Anchor) -> Logits:
    """Climb from the logits to the product of two activations, or say what stands in the way."""
    ascent = _Ascent(view, {})
    if len(anchor.axes) == 1:
        return ascent.climb(anchor.logits, anchor.axes[0])
    found = ascent.climb(anchor.logits, -1)
    return replace(found, reason=found.reason or "its Softmax runs over more than one axis")


def mixes_heads(view: View, node: gs.Node) -> bool:
    """Whether a node may be a linear map of heads, of logits or probabilities ``[b, h, t, t]``.

    Before a Gemm a Reshape merges all axes but the last.
    """
    tensor = node.inputs[0]
    maker = producer(tensor) if node.op == "Gemm" else None
    if maker is not None and maker.op == "Reshape":
        shapes = [view.shape(value) or (0,) for value in (maker.inputs[0], tensor)]
        tensor = maker.inputs[0] if shapes[0][-1] == shapes[1][-1] else tensor
    return node.op in MIXING_OPS and len(view.shape(tensor) or ()) >= 4


@dataclass(frozen=True, slots=True, eq=False)
class _Ascent:
    """A climb from logits; every tensor is looked at once."""

    view: View
    seen: dict[tuple[str, int | None], Logits]

    def climb(self, tensor: gs.Tensor, axis: int | None) -> Logits:
        """The product above a tensor, whose ``axis``, counted from the last, is summed to 1.

        None stands for an axis that is lost sight of.
        """
        if (tensor.name, axis) not in self.seen:
            self.seen[tensor.name, axis] = self._climb(tensor, axis)
        return self.seen[tensor.name, axis]

    def _climb(self, tensor: gs.Tensor, axis: int | None) -> Logits:
        node = producer(tensor)
        if node is None:
            return _none(f"its logits come from {tensor.name!r}, {NO_PRODUCT}")
        if node.op == "MatMul" and all(self.view.known(value) is None for value in node.inputs):
            lost = "its Softmax does not run over queries or keys"
            return Logits(node, axis == -2, reason=None if axis in {-1, -2} else lost)
        if node.op in PASSING_OPS | TURNING_OPS:
            before = _axis_before(self.view, node, axis)
            below = self.climb(node.inputs[0], before)
            if axis is None or before is not None or below.product is None:
                return below
            return replace(below, reason=_lost(node))
        if node.op in JOINING_OPS | BENDING_OPS:
            return self._through_elementwise(node, axis)
        if _is_mixing(self.view, node):
            below = self.climb(node.inputs[0], axis)
            mixed = f"its logits are mixed across heads by {node.op} ({node.name})"
            return replace(below, reason=mixed if below.product else below.reason)
        if node.op == "MatMul":
            return _none(
                f"a product with a constant makes its logits ({node.name}): learned queries, or "
                "attention that compares no tokens with each other"
            )
        return _none(f"its logits come from {node.op} ({node.name}), {NO_PRODUCT}")

    def _through_elementwise(self, node: gs.Node, axis: int | None) -> Logits:
        """Climb through the one operand of an elementwise operator that leads to a product."""
        climbed = {
            slot: self.climb(operand, axis)
            for slot, operand in enumerate(node.inputs)
            if operand.name
            and self.view.known(operand) is None
            and not (node.op == "Where" and slot == 0)
        }
        found = {slot: result for slot, result in climbed.items() if result.product is not None}
        if not found:
            return next(iter(climbed.values()), _none(f"its logits are constant ({node.name})"))
        if len(found) > 1:
            found = {slot: item for slot, item in found.items() if self._has_layers(item.product)}
        if len(found) != 1:
            return _none(f"two products of activations meet in its logits ({node.op} {node.name})")
        slot, below = next(iter(found.items()))
        if node.op in BENDING_OPS and not _bounds_nothing(self.view, node):
            return replace(below, reason=f"its logits pass through {node.op} ({node.name})")
        if node.op in {"Add", "Sub", "Where"}:
            return replace(below, mask=_mask(node, slot) or below.mask)
        if node.op in BENDING_OPS:
            return below
        return replace(below, frozen=(*below.frozen, *_frozen(self.view, node)))

    def _has_layers(self, product: gs.Node | None) -> bool:
        """Whether an operand of a product follows from a layer, as neither of a mask's does."""
        operands = product.inputs if product else ()
        return any(layers_above(self.view, tensor) for tensor in operands)


def _lost(node: gs.Node) -> str:
    """What is said of logits one axis of which is not the same behind a node."""
    if node.op == "Concat":
        return f"its logits are joined with others before Softmax (Concat {node.name})"
    return (
        f"its logits are reshaped before Softmax ({node.op} {node.name}): queries and keys cannot "
        "be told apart"
    )


def _none(reason: str) -> Logits:
    return Logits(None, reason=reason)


def _bounds_nothing(view: View, node: gs.Node) -> bool:
    """Whether a bound on the logits is the least or the greatest number that their type has."""
    if node.op not in {"Max", "Min", "Clip"}:
        return False
    bounds = [view.known(tensor) for tensor in node.inputs if tensor.name]
    known = [bound for bound in bounds if bound is not None]
    return len(known) == len(bounds) - 1 and all(
        (np.abs(bound) >= np.finfo(bound.dtype).max).all() for bound in known
    )


def _is_mixing(view: View, node: gs.Node) -> bool:
    """Whether a node is a linear map of the heads of logits."""
    same = view.shape(node.inputs[0]) == view.shape(node.outputs[0])
    return same and mixes_heads(view, node) and view.known(node.inputs[1]) is not None


def _axis_before(view: View, node: gs.Node, axis: int | None) -> int | None:
    """Which axis of a node's input becomes ``axis`` of its output, both counted from the last."""
    before, after = view.shape(node.inputs[0]), view.shape(node.outputs[0])
    if node.op in PASSING_OPS or axis is None or not before or not after:
        return axis
    if node.op == "Transpose":
        perm = node.attrs.get("perm", range(len(before))[::-1])
        return int(perm[axis]) - len(before)
    return axis if before[axis:] == after[axis:] else None


def _mask(node: gs.Node, slot: int) -> Mask | None:
    """The operand that may mask tokens, if it depends on the data."""
    if node.op == "Where":
        condition = node.inputs[0]
        if not follows_data(condition):
            return None
        return Mask(condition.name, "keeps" if slot == 1 else "drops")
    other = node.inputs[1 - slot]
    return Mask(other.name, "added") if node.op == "Add" and follows_data(other) else None


def _frozen(view: View, node: gs.Node) -> Iterator[Scalar]:
    """Scales that are computed at run time although nothing but shapes decides them."""
    for slot, operand in enumerate(node.inputs):
        value = None if isinstance(operand, gs.Constant) else view.known(operand)
        if value is not None and value.size == 1:
            yield Scalar(node.name, slot, float(value.reshape(())), str(value.dtype))


def _before_shift(view: View, tensor: gs.Tensor) -> gs.Tensor:
    """The logits before their maximum is subtracted, which Softmax ignores."""
    node = producer(tensor)
    if node is None or node.op != "Sub":
        return tensor
    peak = producer(node.inputs[1])
    if peak is None or peak.op != "ReduceMax" or peak.inputs[0] is not node.inputs[0]:
        return tensor
    rank = len(view.shape(tensor) or ())
    return node.inputs[0] if reduced_axes(view, peak)[-1:] in ([-1], [rank - 1]) else tensor
