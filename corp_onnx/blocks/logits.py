"""From a Softmax up to the product of queries and keys, and down to the product with the values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.movement import PASSING_OPS
from corp_onnx.blocks.records import Mask, Refusal, Scalar
from corp_onnx.blocks.view import OPEN_SIZE, View, follows_data, producer

BENDING_OPS = frozenset({"Tanh", "Relu", "Sigmoid", "Clip", "Max", "Min", "Exp", "Softsign", "Erf"})
"""Functions of the logits that end their being bilinear in queries and keys."""

RESHAPING_OPS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Expand"})


@dataclass(frozen=True, slots=True, eq=False)
class Anchor:
    """A Softmax over keys, whole or written out, with its logits and its probabilities."""

    node: gs.Node
    logits: gs.Tensor
    probabilities: gs.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """The product under a Softmax, and what happens to it on the way."""

    product: gs.Node
    frozen: tuple[Scalar, ...] = ()
    mask: Mask | None = None
    bent: str | None = None


def match_softmax(view: View, node: gs.Node) -> Anchor | Refusal | None:
    """Read a Softmax over the last axis, or ``exp(x) / sum(exp(x))`` written out."""
    if node.op == "Softmax":
        logits = node.inputs[0]
        rank = len(view.shape(logits) or ())
        axis = node.attrs.get("axis", -1 if view.opset >= 13 else 1)
        if not rank:
            return Refusal(node.name, node.op, f"its {OPEN_SIZE}")
        if axis % rank != rank - 1:
            return Refusal(node.name, node.op, f"it runs over axis {axis}, which is not the last")
        return Anchor(node, logits, node.outputs[0])
    if node.op != "Div":
        return None
    above, below = (producer(tensor) for tensor in node.inputs)
    if above is None or below is None:
        return None
    if above.op != "Exp" or below.op != "ReduceSum" or below.inputs[0] is not node.inputs[0]:
        return None
    axes, rank = _reduced(view, below), len(view.shape(node.inputs[0]) or ())
    if [axis % rank for axis in axes] != [rank - 1]:
        over = ", ".join(map(str, axes)) or "all"
        return Refusal(node.name, node.op, f"it runs over axis {over}, which is not the last")
    return Anchor(node, _before_shift(view, above.inputs[0]), node.outputs[0])


def match_logits(view: View, tensor: gs.Tensor) -> Logits | str:
    """Climb from the logits to the product of two activations, or say what stands in the way."""
    node = producer(tensor)
    if node is None:
        return f"its logits come from {tensor.name!r}, not from a product of queries and keys"
    if node.op == "MatMul":
        if any(view.known(operand) is not None for operand in node.inputs):
            return f"a linear layer ({node.name}) mixes its logits"
        return Logits(node)
    if node.op in PASSING_OPS:
        return match_logits(view, node.inputs[0])
    if node.op in RESHAPING_OPS | {"Transpose"}:
        before, after = view.shape(node.inputs[0]), view.shape(tensor)
        if node.op == "Transpose" or not before or not after or before[-1] != after[-1]:
            return f"its logits are rearranged by {node.op} ({node.name})"
        return match_logits(view, node.inputs[0])
    if node.op in {"Mul", "Div", "Add", "Sub", "Where"} | BENDING_OPS:
        return _through_elementwise(view, node)
    return f"its logits come from {node.op} ({node.name}), not from a product of queries and keys"


def match_mixing(view: View, tensor: gs.Tensor) -> gs.Node | str:
    """The product of probabilities and values, or why there is none."""
    found = list(_mixings(tensor))
    if len(found) == 1 and view.known(found[0].inputs[1]) is None:
        return found[0]
    if found:
        return "its probabilities enter more than one product, or a product with constants"
    return "its probabilities enter no product with values (a classifier's Softmax, for instance)"


def _mixings(tensor: gs.Tensor) -> Iterator[gs.Node]:
    for node in tensor.outputs:
        slot = next(index for index, value in enumerate(node.inputs) if value is tensor)
        if node.op == "MatMul" and slot == 0:
            yield node
        elif node.op in PASSING_OPS | RESHAPING_OPS or (node.op == "Where" and slot > 0):
            yield from _mixings(node.outputs[0])


def _through_elementwise(view: View, node: gs.Node) -> Logits | str:
    """Climb through the one operand of an elementwise operator that leads to a product."""
    open_slots = [
        slot
        for slot, operand in enumerate(node.inputs)
        if operand.name and view.known(operand) is None and not (node.op == "Where" and slot == 0)
    ]
    climbed = {slot: match_logits(view, node.inputs[slot]) for slot in open_slots}
    found = {slot: result for slot, result in climbed.items() if isinstance(result, Logits)}
    if len(found) > 1:
        return f"two products of activations meet in its logits ({node.op} {node.name})"
    if not found:
        reasons = [result for result in climbed.values() if isinstance(result, str)]
        return reasons[0] if reasons else f"its logits are constant ({node.name})"
    ((slot, below),) = found.items()
    if node.op in BENDING_OPS:
        return replace(below, bent=f"its logits pass through {node.op} ({node.name})")
    if node.op in {"Add", "Sub", "Where"}:
        return replace(below, mask=_mask(view, node, slot) or below.mask)
    return replace(below, frozen=(*below.frozen, *_frozen(view, node)))


def _mask(view: View, node: gs.Node, slot: int) -> Mask | None:
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
    return node.inputs[0] if _reduced(view, peak)[-1:] in ([-1], [rank - 1]) else tensor


def _reduced(view: View, node: gs.Node) -> list[int]:
    """The axes that a reduction runs over; empty for all of them."""
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        axes = view.known(node.inputs[1])
    return [] if axes is None else [int(axis) for axis in np.ravel(axes)]
