"""What an attention multiplies, read off products around a Softmax or off one operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.foreign import CACHED
from corp_onnx.blocks.logits import Anchor, match_logits
from corp_onnx.blocks.mixing import match_mixing
from corp_onnx.blocks.operands import Operand
from corp_onnx.blocks.records import Mask, Refusal, Scalar
from corp_onnx.blocks.view import OPEN_SIZE, View, follows_data

LOGITS_READ = "its logits are an output, read by somebody else"


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The tensors that an attention multiplies, however it is written."""

    anchor: gs.Node
    query: Operand | None
    key: Operand | None
    value: Operand
    context: Operand
    products: tuple[gs.Node, ...]
    frozen: tuple[Scalar, ...] = ()
    mask: Mask | None = None
    bent: str | None = None
    """Why queries and keys cannot be cut whatever they come from."""


def match_attention(view: View, anchor: Anchor) -> Parts | Refusal:
    """Read the products above and below a Softmax."""
    mixing = match_mixing(view, anchor.probabilities)
    if isinstance(mixing, str):
        return Refusal(anchor.node.name, anchor.node.op, mixing)
    axis = -1 if mixing.slot == 1 else -2
    value = Operand(mixing.product.inputs[mixing.slot], axis)
    context = Operand(mixing.product.outputs[0], axis)
    logits = match_logits(view, anchor)
    products = (mixing.product,) if logits.product is None else (logits.product, mixing.product)
    query = key = None
    if logits.product is not None:
        left, right = (
            Operand(tensor, axis)
            for tensor, axis in zip(logits.product.inputs, (-1, -2), strict=True)
        )
        query, key = (right, left) if logits.keys_left else (left, right)
    return Parts(
        anchor.node,
        query,
        key,
        value,
        context,
        products,
        logits.frozen,
        logits.mask,
        logits.reason,
    )


def match_operator(view: View, node: gs.Node) -> Parts | Refusal:
    """Read the standard Attention operator of opset 23 and 24."""
    query, key, value, mask, *cache, counts = _filled(node, 7)
    if any(tensor.name for tensor in cache) or _is_read(view, node.outputs[1:3]):
        return Refusal(node.name, node.op, CACHED)
    padding = None
    if mask.name and follows_data(mask) and len(view.shape(mask) or ()) == 4:
        padding = Mask(mask.name, "keeps" if view.probes[0].dtype(mask) == np.bool_ else "added")
    if counts.name and follows_data(counts):
        padding = Mask(counts.name, "counts")
    bent = LOGITS_READ if _is_read(view, node.outputs[3:4]) else None
    if node.attrs.get("softcap", 0.0):
        bent = "its logits are capped (softcap)"
    heads = node.attrs.get("q_num_heads", 0), node.attrs.get("kv_num_heads", 0)
    return _operator(view, node, (query, key, value), heads, padding, bent)


def match_multi_head(view: View, node: gs.Node) -> Parts | Refusal:
    """Read ONNX Runtime's MultiHeadAttention with query, key and value apart."""
    query, key, value, bias, seen, added, *cache = _filled(node, 10)
    if any(tensor.name for tensor in cache) or _is_read(view, node.outputs[1:3]):
        return Refusal(node.name, node.op, CACHED)
    bent = LOGITS_READ if _is_read(view, node.outputs[3:4]) else None
    if not key.name or not value.name:
        return Refusal(node.name, node.op, "queries, keys and values are packed in one 5-D input")
    if bias.name:
        reason = "it adds a bias to queries, keys and values inside the operator"
        return Refusal(node.name, node.op, reason)
    padding = Mask(added.name, "added") if added.name and follows_data(added) else None
    if seen.name and follows_data(seen):
        if len(view.shape(seen) or ()) < 2:
            return Refusal(node.name, node.op, f"its mask {seen.name!r} counts tokens (1-D)")
        padding = Mask(seen.name, "keeps")
    heads = node.attrs["num_heads"]
    return _operator(view, node, (query, key, value), (heads, heads), padding, bent)


def _operator(
    view: View,
    node: gs.Node,
    tensors: tuple[gs.Tensor, gs.Tensor, gs.Tensor],
    heads: tuple[int, int],
    padding: Mask | None,
    bent: str | None,
) -> Parts | Refusal:
    """The parts of an operator: heads lie on an axis of four, or inside the last of three."""
    outer, inner = heads
    operands = []
    for tensor, held in zip((*tensors, node.outputs[0]), (outer, inner, inner, outer), strict=True):
        rank = len(view.shape(tensor) or ())
        if rank not in {3, 4}:
            what = f"{rank}-D, neither 3-D nor 4-D" if rank else f"not known: its {OPEN_SIZE}"
            return Refusal(node.name, node.op, f"the shape of {tensor.name!r} is {what}")
        operands.append(Operand(tensor, -1, held if rank == 3 else 0))
    query, key, value, context = operands
    return Parts(node, query, key, value, context, (node,), (), padding, bent)


def _filled(node: gs.Node, count: int) -> list[gs.Tensor]:
    """All inputs that an operator may have; empty ones for those left out."""
    return [*node.inputs, *[gs.Variable.empty()] * (count - len(node.inputs))]


def _is_read(view: View, tensors: list[gs.Tensor]) -> bool:
    return any(tensor.name and (tensor.outputs or view.is_output(tensor)) for tensor in tensors)
