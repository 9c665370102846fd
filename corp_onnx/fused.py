"""Shapes after the operators of ONNX Runtime, for which ONNX itself has no schema.

Optimisers write them in place of several standard ones. Some stand in the standard domain, in
models of an opset that did not have them yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

Shape = tuple[int, ...]
Shapes = Sequence[Shape | None]
"""Of every input in order; None for one that is absent or not known."""

BLOCKED = "com.microsoft.nchwc"
"""Operators on channels in blocks, as the vector units of the processor at hand like them."""

TWINS = {"FusedConv": "Conv", "FusedGemm": "Gemm"}
"""Operators whose result has the shape of a standard operator's with the same inputs."""

BLOCKED_TWINS = frozenset({"Conv", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"})

DOMAINS = frozenset({None, "", "ai.onnx", "com.microsoft", BLOCKED})

_MASK_INDEX = np.dtype(np.int32)


@dataclass(frozen=True, slots=True)
class Made:
    """An output: its shape, and its type if that is not the type of the first known input."""

    shape: Shape
    dtype: np.dtype | None = None


def outputs_of(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    """What a fused operator makes of inputs of these shapes; None where there is no rule.

    An entry is None, or missing at the end, for an output of which nothing is said.
    """
    rule = _RULES.get(node.op)
    if rule is None or node.domain not in DOMAINS or not shapes or shapes[0] is None:
        return None
    filled = [*shapes, *[None] * (8 - len(shapes))]
    return rule(node, filled)


def has_rule(node: gs.Node) -> bool:
    """Whether shapes after a node without a schema follow from those before it."""
    return node.domain in DOMAINS and (node.op in _RULES or twin_of(node) is not None)


def twin_of(node: gs.Node) -> str | None:
    """The standard operator whose result has the same shape; None if there is no such."""
    if node.domain == BLOCKED and node.op in BLOCKED_TWINS:
        return str(node.op)
    return TWINS.get(node.op)


def matrix_product(left: Shape, right: Shape) -> Shape | None:
    """The shape of a MatMul; None if its operands do not fit."""
    if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
        return None
    try:
        batch = np.broadcast_shapes(left[:-2], right[:-2])
    except ValueError:
        return None
    return (*batch, left[-2], right[-1])


def operands_of(node: gs.Node, left: Shape, right: Shape) -> tuple[Shape, Shape]:
    """The shapes that a FusedMatMul multiplies, after its transpositions."""
    turned = []
    for side, shape in (("A", left), ("B", right)):
        if node.attrs.get(f"transBatch{side}", 0):
            shape = (*shape[1:-1], shape[0], shape[-1])
        if node.attrs.get(f"trans{side}", 0):
            shape = (*shape[:-2], shape[-1], shape[-2])
        turned.append(shape)
    return turned[0], turned[1]


def _like_first(node: gs.Node, shapes: Shapes) -> list[Made | None]:
    assert shapes[0] is not None, "asked only where the first shape is known"
    return [Made(shapes[0])]


def _skip_norm(node: gs.Node, shapes: Shapes) -> list[Made | None]:
    """The norm, its mean and deviation, and the sum that it is the norm of."""
    first = shapes[0] or ()
    statistic = Made((*first[:-1], 1), np.dtype(np.float32))
    return [Made(first), statistic, statistic, Made(first)]


def _norm(node: gs.Node, shapes: Shapes) -> list[Made | None]:
    first = shapes[0] or ()
    axis = node.attrs.get("axis", -1) % max(len(first), 1)
    return [Made(first), *[Made((*first[:axis], *[1] * (len(first) - axis)))] * 2]


def _embedding(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    ids, words = shapes[0], shapes[2]
    if ids is None or words is None:
        return None
    kind = node.inputs[2].dtype
    made = Made((*ids, words[-1]), None if kind is None else np.dtype(kind))
    return [made, Made(ids[:1], _MASK_INDEX), made]


def _product(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    left, right = shapes[:2]
    if left is None or right is None:
        return None
    made = matrix_product(*operands_of(node, left, right))
    return None if made is None else [Made(made)]


def _packed_attention(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    """``Attention`` with its projections inside."""
    first, weight = shapes[:2]
    if first is None or weight is None or len(first) != 3:
        return None
    widths = node.attrs.get("qkv_hidden_sizes") or [weight[-1] // 3] * 3
    return [Made((*first[:2], widths[2]))]


def _multi_head(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    query, key, value = shapes[:3]
    heads = node.attrs.get("num_heads", 0)
    if not heads or query is None or len(query) not in {3, 5}:
        return None
    if len(query) == 5:
        return [Made((*query[:2], query[2] * query[4]))]
    if key is not None and len(key) == 5:
        return [Made(query)]
    if value is None:
        return None
    if len(value) == 4:
        return [Made((*query[:2], heads * value[3])), Made(key or value), Made(value)]
    made = [Made((*query[:2], value[2]))]
    past = node.inputs[6:7]
    if key is None or (past and past[0].name):
        return [*made]
    rows = (value[0], heads, value[1])
    return [*made, Made((*rows, key[2] // heads)), Made((*rows, value[2] // heads))]


def _grouped(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    query, key = shapes[:2]
    heads, kv_heads = (node.attrs.get(name, 0) for name in ("num_heads", "kv_num_heads"))
    if query is None or not kv_heads:
        return None
    packed = key is None and not (len(node.inputs) > 1 and node.inputs[1].name)
    if packed:
        return [Made((*query[:2], query[2] * heads // (heads + 2 * kv_heads)))]
    return [Made(query)]


def _into_blocks(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    """``ReorderInput``; channels are counted without what fills their last block."""
    first = shapes[0] or ()
    if len(first) != 4:
        return None
    last = node.attrs.get("channels_last", 0)
    return [Made((first[0], first[3], *first[1:3]) if last else first)]


def _out_of_blocks(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    """``ReorderOutput``, which says how many channels are real."""
    first, channels = shapes[0] or (), node.attrs.get("channels", 0)
    if len(first) != 4 or not channels:
        return None
    last = node.attrs.get("channels_last", 0)
    points = first[2:]
    return [Made((first[0], *points, channels) if last else (first[0], channels, *points))]


def _nbits(node: gs.Node, shapes: Shapes) -> list[Made | None]:
    return [Made((*(shapes[0] or ())[:-1], node.attrs.get("N", 0)))]


_Rule = Callable[[gs.Node, Shapes], list[Made | None] | None]

_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(
        ("BiasGelu", "FastGelu", "QuickGelu", "Gelu", "RotaryEmbedding", "BiasAdd", "BiasSoftmax"),
        _like_first,
    ),
    "LayerNormalization": _norm,
    "SimplifiedLayerNormalization": _norm,
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "EmbedLayerNormalization": _embedding,
    "FusedMatMul": _product,
    "Attention": _packed_attention,
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _grouped,
    "MatMulNBits": _nbits,
    "ReorderInput": _into_blocks,
    "ReorderOutput": _out_of_blocks,
}
