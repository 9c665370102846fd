"""Grouped attention of ONNX Runtime without a cache: rotation and heads brought outside.

With a cache its keys and values are seen from outside, and it stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph.canonical.lengths import whole_rows
from corp_onnx.graph.canonical.rewriting import Bench, Outputs, is_read
from corp_onnx.graph.operators import MICROSOFT, operand

LENGTHS, COSINES, SINES, POSITIONS, ADDED = 5, 7, 8, 9, 10
"""Inputs by place: 3 and 4 are the cache, and from 11 on come sinks, scales and norms."""


def ungroup_attention(node: gs.Node, bench: Bench) -> Outputs | None:
    """``GroupQueryAttention`` as rotations, repeated heads and ``MultiHeadAttention``.

    Query ``i`` sees keys up to ``i`` of its sample; those beyond ``seqlens_k`` are padding. Without
    a cache positions count from 0, or from the first one that is given.
    """
    widths = _widths(node, bench)
    if widths is None or not _is_plain(node, bench):
        return None
    emit, dtype = bench.emit, bench.dtype(node.inputs[0])
    heads, kv_heads = (int(node.attrs[name]) for name in ("num_heads", "kv_num_heads"))
    operands = list(node.inputs[:3])
    if operand(node, 1) is None:
        operands = list(emit.split(node.inputs[0], widths, -1, bench.opset))
    if node.attrs.get("do_rotary", 0):
        start = _first_position(node, bench)
        counts = zip(operands[:2], (heads, kv_heads), strict=True)
        operands[:2] = [_rotated(node, bench, tensor, start, count) for tensor, count in counts]
    size = widths[0] // heads
    keys, values = (_repeated(bench, tensor, heads, kv_heads, size) for tensor in operands[1:])
    none = gs.Variable.empty()
    rows = whole_rows(node.inputs[LENGTHS], node.inputs[0], bench, more=1)
    attrs = {
        "num_heads": heads,
        "unidirectional": int(node.attrs.get("causal", 1)),
        "scale": node.attrs.get("scale") or float(np.float32(1 / np.sqrt(size))),
    }
    inputs = [operands[0], keys, values, none, rows or none, operand(node, ADDED) or none]
    return [emit.node("MultiHeadAttention", inputs, dtype=dtype, attrs=attrs, domain=MICROSOFT)]


def _is_plain(node: gs.Node, bench: Bench) -> bool:
    """Whether no cache is kept, and nothing is done that the other operator does not do."""
    cache = [operand(node, slot) for slot in (3, 4)]
    empty = all(
        tensor is None or (isinstance(tensor, gs.Constant) and 0 in tensor.shape)
        for tensor in cache
    )
    unread = not any(is_read(bench.emit.graph, tensor) for tensor in node.outputs[1:])
    more = any(operand(node, slot) is not None for slot in range(ADDED + 1, len(node.inputs)))
    attrs = node.attrs
    bent = attrs.get("softcap", 0.0) or attrs.get("smooth_softmax", 0) == 1
    window = attrs.get("local_window_size", -1) != -1
    lengths = operand(node, LENGTHS)
    counted = lengths is not None and len(bench.shape(lengths) or ()) == 1
    return bool(empty and unread and counted and not (more or bent or window))


def _widths(node: gs.Node, bench: Bench) -> list[int] | None:
    """Channels of queries, keys and values; None if they are not known."""
    shapes = [bench.shape(tensor) for tensor in node.inputs[:3] if tensor.name]
    heads, kv_heads = (int(node.attrs.get(name, 0)) for name in ("num_heads", "kv_num_heads"))
    known = [shape[-1] for shape in shapes if shape is not None and len(shape) == 3]
    if len(known) not in {1, 3} or len(known) != len(shapes) or not heads or not kv_heads:
        return None
    if len(known) == 3:
        return known
    size = known[0] // (heads + 2 * kv_heads)
    return [heads * size, kv_heads * size, kv_heads * size]


def _first_position(node: gs.Node, bench: Bench) -> gs.Tensor:
    """The position of the first token of all samples, as a vector of one entry."""
    given = operand(node, POSITIONS)
    if given is None:
        return bench.emit.integers("position", [0])
    flat = bench.emit.node("Reshape", [given, bench.emit.integers("flat", [-1])], dtype=np.int64)
    return bench.emit.part(flat, 0, 1)


def _rotated(
    node: gs.Node, bench: Bench, tensor: gs.Tensor, start: gs.Tensor, heads: int
) -> gs.Tensor:
    tables = [node.inputs[slot] for slot in (COSINES, SINES)]
    attrs = {"interleaved": int(node.attrs.get("rotary_interleaved", 0)), "num_heads": heads}
    half = bench.shape(tables[0])
    if half is not None:
        attrs["rotary_embedding_dim"] = 2 * half[-1]
    return bench.emit.node(
        "RotaryEmbedding",
        [tensor, start, *tables],
        dtype=bench.dtype(node.inputs[0]),
        attrs=attrs,
        domain=MICROSOFT,
    )


def _repeated(bench: Bench, tensor: gs.Tensor, heads: int, kv_heads: int, size: int) -> gs.Tensor:
    """Keys or values ``[b, t, g·e]`` with every head as often as query heads read it."""
    if heads == kv_heads:
        return tensor
    emit, dtype = bench.emit, tensor.dtype
    apart = _reshaped(bench, tensor, [0, 0, kv_heads, size])
    index = emit.integers("heads", np.repeat(np.arange(kv_heads), heads // kv_heads).tolist())
    copied = emit.node("Gather", [apart, index], dtype=dtype, attrs={"axis": 2})
    return _reshaped(bench, copied, [0, 0, heads * size])


def _reshaped(bench: Bench, tensor: gs.Tensor, sizes: Sequence[int]) -> gs.Variable:
    target = bench.emit.integers("target", sizes)
    return bench.emit.node("Reshape", [tensor, target], dtype=tensor.dtype)
