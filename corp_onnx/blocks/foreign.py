"""Operators of ONNX Runtime that hold an attention or weights inside and stay as they are: why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.records import Refusal
from corp_onnx.blocks.view import View
from corp_onnx.graph.fused import BLOCKED_LAYOUT
from corp_onnx.graph.operators import is_standard

CACHED = "keys or values are kept in a cache (graph input or output), an interface"
REMEDY = "prune the model before attention is fused"

CACHES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "Attention": ((4,), (1,)),
    "GroupQueryAttention": ((3, 4), (1, 2)),
    "MultiHeadAttention": ((6, 7), (1, 2)),
    "SparseAttention": ((3, 4), (1, 2)),
}
"""Inputs and outputs that hold a cache, where an operator may do without."""

ALWAYS_CACHED = frozenset(
    """DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention LinearAttention
    PagedAttention SparsePagedAttention""".split()
)
"""Operators that carry something from one step of decoding to the next."""

WITHOUT_PADDING = frozenset({"PackedAttention", "PackedMultiHeadAttention"})

INSIDE = "it holds weights inside and is not read: prune the model before it is fused"
BLOCKS = (
    "its weights are laid out in blocks for one kind of processor (nchwc): prune the model before "
    "it is optimised, or optimise it without layouts (level extended)"
)

MORE: Mapping[str, tuple[tuple[str, str], ...]] = {
    "GroupQueryAttention": (
        ("softcap", "its logits are capped (softcap)"),
        ("local_window_size", "it looks at a window of tokens"),
        ("smooth_softmax", "its Softmax has one more entry (smooth_softmax)"),
    ),
    "Attention": (("do_rotary", "it rotates queries and keys by their position"),),
}
"""Attributes by which an operator does more than multiply and mask, with what it then does."""

TABLE_OPS = frozenset(
    """DequantizeLinear EmbedLayerNormalization GatherBlockQuantized GemmaRotaryEmbedding
    MRotaryEmbedding QuantizeLinear RelativePositionBias GatedRelativePositionBias RotaryEmbedding
    RMSNormRotary""".split()
)
"""Operators that look weights up, scale or store them, rather than multiply activations."""


def why_fused(view: View, node: gs.Node) -> str:
    """Why the attention inside an operator is not read."""
    if node.op in ALWAYS_CACHED or _keeps_cache(view, node):
        return f"{CACHED}; export the model without a cache"
    if node.op in WITHOUT_PADDING:
        return f"a fused operator on tokens packed without their padding; {REMEDY}"
    for name, reason in MORE.get(node.op, ()):
        if node.attrs.get(name, 0) not in {0, -1}:
            return f"a fused operator: {reason}; {REMEDY}"
    return f"a fused operator that is not read in this form; {REMEDY}"


def weights_inside(graph: gs.Graph, params: int, share: float) -> Iterator[Refusal]:
    """A refusal for every other operator that multiplies with a share of all parameters.

    Convolutions over more than a point are no linear layers, whoever computes them.
    """
    for node in graph.nodes:
        if is_standard(node) or node.op in TABLE_OPS:
            continue
        sizes = [
            int(np.prod(tensor.shape))
            for tensor in node.inputs
            if isinstance(tensor, gs.Constant) and len(tensor.shape) >= 2
        ]
        wide = node.op.endswith("Conv") and np.prod(node.inputs[1].shape[2:]) > 1
        if sizes and max(sizes) > share * params and not wide:
            yield Refusal(node.name, node.op, BLOCKS if node.domain == BLOCKED_LAYOUT else INSIDE)


def _keeps_cache(view: View, node: gs.Node) -> bool:
    """Whether keys or values come from elsewhere, or go there."""
    given, made = CACHES.get(node.op, ((), ()))
    inputs = [node.inputs[slot] for slot in given if slot < len(node.inputs)]
    outputs = [node.outputs[slot] for slot in made if slot < len(node.outputs)]
    past = any(
        tensor.name and not (isinstance(tensor, gs.Constant) and 0 in tensor.shape)
        for tensor in inputs
    )
    return past or any(tensor.outputs or view.is_output(tensor) for tensor in outputs)
