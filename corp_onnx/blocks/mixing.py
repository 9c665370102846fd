"""From a Softmax down to the product of its probabilities with the values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from corp_onnx.blocks.logits import JOINING_OPS, TURNING_OPS, mixes_heads
from corp_onnx.blocks.movement import PASSING_OPS
from corp_onnx.blocks.view import View


@dataclass(frozen=True, slots=True, eq=False)
class Mixing:
    """The product of probabilities and values."""

    product: gs.Node
    slot: int
    """Which of its inputs holds the values."""


def match_mixing(view: View, tensor: gs.Tensor) -> Mixing | str:
    """The product of probabilities and values, or why there is none."""
    found = {id(mixing.product): mixing for mixing in _mixings(view, tensor, set())}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        return "its probabilities enter more than one product"
    sums = _sums(view, tensor)
    if sums:
        return f"its probabilities enter a sum that is no product of matrices ({sums[0].name})"
    return "no product of its probabilities with values was found (a classifier's Softmax has none)"


def _sums(view: View, tensor: gs.Tensor) -> list[gs.Node]:
    """Nodes that weigh something with probabilities, and yet are no product of matrices."""
    found = []
    for node in view.readers(tensor):
        if node.op in PASSING_OPS | TURNING_OPS:
            found += [end for output in node.outputs for end in _sums(view, output)]
        elif node.op in {"Einsum", "Mul"} and all(
            view.known(value) is None for value in node.inputs
        ):
            found.append(node)
    return found


def _mixings(view: View, tensor: gs.Tensor, seen: set[str]) -> Iterator[Mixing]:
    """Products with activations that follow from probabilities, whatever is done to these."""
    if tensor.name in seen:
        return
    seen.add(tensor.name)
    for node in view.readers(tensor):
        slot = next((index for index, value in enumerate(node.inputs) if value is tensor), None)
        if slot is None:
            continue
        others = [value for value in node.inputs if value is not tensor]
        if node.op == "MatMul" and all(view.known(value) is None for value in others):
            yield Mixing(node, 1 - slot)
        elif _goes_on(view, node, slot):
            for output in node.outputs:
                yield from _mixings(view, output, seen)


def _goes_on(view: View, node: gs.Node, slot: int) -> bool:
    """Whether what a node makes of probabilities are still some of these."""
    if node.op in PASSING_OPS | TURNING_OPS:
        return slot == 0 or node.op == "Concat"
    same = view.shape(node.inputs[slot]) == view.shape(node.outputs[0])
    if node.op in JOINING_OPS:
        return same and not (node.op == "Where" and slot == 0)
    return slot == 0 and same and mixes_heads(view, node)
