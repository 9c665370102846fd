"""Shapes after the operators of ONNX Runtime, for which ONNX itself has no schema.

Optimisers write them in place of several standard ones. Some stand in the standard domain, in
models of an opset that did not have them yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph.operators import MICROSOFT, STANDARD

Shape = tuple[int, ...]
Shapes = Sequence[Shape | None]
"""Of every input in order; None for one that is absent or not known."""

BLOCKED_LAYOUT = "com.microsoft.nchwc"
"""The domain of convolutions whose channels lie in blocks, as one kind of processor likes them."""

TWINS = {"FusedConv": "Conv", "FusedGemm": "Gemm"}
"""Operators whose result has the shape of a standard operator's with the same inputs."""

BLOCKED_TWINS = frozenset({"AveragePool", "Conv", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
"""The same for operators of blocked layout, whose last channels may be padding."""

DOMAINS = STANDARD | {MICROSOFT, BLOCKED_LAYOUT}

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


def twin_of(node: gs.Node) -> str | None:
    """The standard operator whose result has the shape of a fused one's; None for others."""
    if node.domain == BLOCKED_LAYOUT:
        return str(node.op) if node.op in BLOCKED_TWINS else None
    return TWINS.get(node.op)


def has_rule(node: gs.Node) -> bool:
    """Whether shapes after a node without a schema follow from those before it."""
    return node.domain in DOMAINS and (node.op in _RULES or twin_of(node) is not None)


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


def _comparison(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    """A comparison of two tensors, which broadcast."""
    left, right = shapes[:2]
    if left is None or right is None:
        return None
    try:
        shape = np.broadcast_shapes(left, right)
    except ValueError:
        return None
    return [Made(shape, np.dtype(np.bool_))]


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
    past = shapes[6]
    if key is None or (past is None and any(tensor.name for tensor in node.inputs[6:8])):
        return [*made]
    rows = (value[0], heads, value[1] + (past[2] if past else 0))
    return [*made, Made((*rows, key[2] // heads)), Made((*rows, value[2] // heads))]


def _grouped(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    query, key = shapes[:2]
    heads, kv_heads = (node.attrs.get(name, 0) for name in ("num_heads", "kv_num_heads"))
    if query is None or not kv_heads:
        return None
    packed = key is None and not (len(node.inputs) > 1 and node.inputs[1].name)
    width = query[2] * heads // (heads + 2 * kv_heads) if packed else query[2]
    past = shapes[3]
    if past is None and any(tensor.name for tensor in node.inputs[3:5]):
        return [Made((*query[:2], width))]
    tokens = query[1] + (past[2] if past else 0)
    present = Made((query[0], kv_heads, tokens, width // heads))
    return [Made((*query[:2], width)), present, present]


def _decoder(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    """Attention of one step of decoding: values may be packed in the query."""
    query, value = shapes[0], shapes[2]
    if query is None or len(query) != 3:
        return None
    return [Made((*query[:2], value[2] if value is not None and len(value) == 3 else query[2]))]


def _without_padding(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    """``PackedMultiHeadAttention``: rows of tokens, with values apart or packed."""
    query, value = shapes[0], shapes[2]
    if query is None:
        return None
    width = query[1] * query[3] if len(query) == 4 else query[1]
    return [Made((query[0], value[1] if value is not None else width))]


def _rows_without_padding(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    """``PackedAttention``, with its projections inside."""
    first, weight = shapes[:2]
    if first is None or weight is None:
        return None
    widths = node.attrs.get("qkv_hidden_sizes") or [weight[-1] // 3] * 3
    return [Made((first[0], widths[2]))]


def _in_blocks(node: gs.Node, shapes: Shapes) -> list[Made | None]:
    """``ReorderInput``: channels first; how many are added as padding matters to nobody."""
    first = shapes[0] or ()
    if node.attrs.get("channels_last", 0):
        return [Made((first[0], first[-1], *first[1:-1]))]
    return [Made(first)]


def _in_order(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    """``ReorderOutput``: from blocks to the usual layout, without padding."""
    first = shapes[0]
    if first is None or len(first) < 3:
        return None
    channels = int(node.attrs.get("channels", first[1]))
    if node.attrs.get("channels_last", 0):
        return [Made((first[0], *first[2:], channels))]
    return [Made((first[0], channels, *first[2:]))]


def _half(node: gs.Node, shapes: Shapes) -> list[Made | None]:
    first = shapes[0] or ()
    return [Made((*first[:-1], first[-1] // 2))]


def _looked_up(node: gs.Node, shapes: Shapes) -> list[Made | None] | None:
    """``GatherBlockQuantized``: rows of a table that is stored rounded."""
    table, ids = shapes[:2]
    if table is None or ids is None:
        return None
    axis = node.attrs.get("gather_axis", 0) % len(table)
    bits, stored = node.attrs.get("bits", 4), node.inputs[0].dtype
    packed = 8 // bits if stored is not None and stored == np.uint8 else 1
    made = [*table[:axis], *ids, *table[axis + 1 :]]
    made[-1] *= packed
    kind = node.inputs[2].dtype
    return [Made(tuple(made), None if kind is None else np.dtype(kind))]


def _dequantised(node: gs.Node, shapes: Shapes) -> list[Made | None]:
    """Numbers of the type of their scales."""
    kind = node.inputs[1].dtype
    return [Made(shapes[0] or (), None if kind is None else np.dtype(kind))]


def _nbits(node: gs.Node, shapes: Shapes) -> list[Made | None]:
    return [Made((*(shapes[0] or ())[:-1], node.attrs.get("N", 0)))]


_Rule = Callable[[gs.Node, Shapes], list[Made | None] | None]

_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(
        """BiasAdd BiasGelu BiasSoftmax FastGelu Gelu GroupNorm GroupNormalization
        LongformerAttention MeanVarianceNormalization MoE
        PagedAttention QMoE QuickGelu RotaryEmbedding SkipGroupNorm SparseAttention
        Trilu""".split(),
        _like_first,
    ),
    "LayerNormalization": _norm,
    "SimplifiedLayerNormalization": _norm,
    "GreaterOrEqual": _comparison,
    "LessOrEqual": _comparison,
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "EmbedLayerNormalization": _embedding,
    "FusedMatMul": _product,
    "Attention": _packed_attention,
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _grouped,
    "DecoderMaskedMultiHeadAttention": _decoder,
    "PackedMultiHeadAttention": _without_padding,
    "PackedAttention": _rows_without_padding,
    "BiasSplitGelu": _half,
    "ReorderInput": _in_blocks,
    "ReorderOutput": _in_order,
    "GatherBlockQuantized": _looked_up,
    "MatMulBnb4": _nbits,
    "DequantizeLinear": _dequantised,
    "MatMulNBits": _nbits,
}
