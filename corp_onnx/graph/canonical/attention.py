"""Attention of ONNX Runtime with its projections inside the operator: brought outside.

What is left is ``MultiHeadAttention``, which ONNX Runtime computes with the same kernels, so that
the model stays as fast as it was fused.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph.canonical.lengths import whole_rows
from corp_onnx.graph.canonical.rewriting import Bench, Outputs, is_read
from corp_onnx.graph.operators import MICROSOFT, operand

PAST, PAST_LENGTH = 4, 6
"""Inputs of ``Attention`` that hold keys and values of earlier runs."""

SHARED_ATTRIBUTES = ("num_heads", "unidirectional", "mask_filter_value")


def unpack_attention(node: gs.Node, bench: Bench) -> Outputs | None:
    """``Attention(x, W, b)`` as MatMul, Add, Split and ``MultiHeadAttention``.

    A mask of whole rows or of pairs is passed on, and lengths as the rows that they stand for. A
    mask that gives start and end of every sample is not known to the other operator.
    """
    weight, bias, mask = (operand(node, slot) for slot in (1, 2, 3))
    if not isinstance(weight, gs.Constant) or len(weight.shape) != 2:
        return None
    if operand(node, PAST) is not None or operand(node, PAST_LENGTH) is not None:
        return None
    if any(is_read(bench.emit.graph, tensor) for tensor in node.outputs[1:]):
        return None
    if node.attrs.get("do_rotary", 0) or not _passes_on(mask, node.inputs[0], bench):
        return None
    mask = whole_rows(mask, node.inputs[0], bench)
    widths = [int(size) for size in node.attrs.get("qkv_hidden_sizes") or ()]
    widths = widths or [weight.shape[1] // 3] * 3
    projected = bench.emit.node("MatMul", [node.inputs[0], weight], dtype=weight.dtype)
    if bias is not None:
        projected = bench.emit.node("Add", [projected, bias], dtype=weight.dtype)
    none = gs.Variable.empty()
    inputs = [
        *bench.emit.split(projected, widths, -1, bench.opset),
        none,
        mask or none,
        operand(node, 5) or none,
    ]
    attrs = {name: node.attrs[name] for name in SHARED_ATTRIBUTES if name in node.attrs}
    attrs["scale"] = node.attrs.get("scale") or float(
        np.float32(1 / np.sqrt(widths[0] // node.attrs["num_heads"]))
    )
    return [
        bench.emit.node(
            "MultiHeadAttention",
            inputs,
            dtype=node.outputs[0].dtype or weight.dtype,
            attrs=attrs,
            domain=MICROSOFT,
        )
    ]


def plain_operands(node: gs.Node, bench: Bench) -> Outputs | None:
    """``MultiHeadAttention`` with three operands, its bias added before it, and a mask of rows."""
    inputs = [*node.inputs, *[gs.Variable.empty()] * (5 - len(node.inputs))]
    apart = _apart(node, bench)
    if apart is not None:
        inputs[:3] = apart
    added = _with_bias(node, bench)
    if added is not None:
        inputs[:4] = [*added, gs.Variable.empty()]
    mask = operand(node, 4)
    lengths = mask is not None and len(bench.shape(mask) or ()) == 1
    keys = operand(node, 1) or node.inputs[0]
    if lengths and _passes_on(mask, node.inputs[0], bench):
        inputs[4] = whole_rows(mask, keys, bench) or inputs[4]
    if all(new is old for new, old in zip(inputs, node.inputs, strict=False)):
        return None
    return bench.emit.nodes(
        node.op,
        inputs,
        count=len(node.outputs),
        dtype=node.outputs[0].dtype,
        attrs=node.attrs,
        domain=node.domain,
    )


def _apart(node: gs.Node, bench: Bench) -> list[gs.Tensor] | None:
    """Query, key and value of ``[b, t, h, 3, e]``, or with keys and values of ``[b, t, h, 2, e]``.

    None if they are apart, or if a bias is added to what is packed.
    """
    query, key = operand(node, 0), operand(node, 1)
    packed = query if key is None else key
    shape = None if packed is None else bench.shape(packed)
    bare = operand(node, 2) is None and operand(node, 3) is None
    if packed is None or shape is None or len(shape) != 5 or not bare:
        return None
    kept = [] if key is None else [node.inputs[0]]
    emit, count = bench.emit, 3 - len(kept)
    rows = emit.integers("rows", [0, 0, shape[2] * shape[4]])
    parts = emit.split(packed, [1] * count, 3, bench.opset)
    dtype = bench.dtype(packed)
    return [*kept, *(emit.node("Reshape", [part, rows], dtype=dtype) for part in parts)]


def _with_bias(node: gs.Node, bench: Bench) -> list[gs.Tensor] | None:
    """Query, key and value with the bias of the operator added to each; None if it has none."""
    bias = operand(node, 3)
    shapes = [bench.shape(tensor) for tensor in node.inputs[:3]]
    widths = [shape[-1] for shape in shapes if shape is not None and len(shape) == 3]
    if not isinstance(bias, gs.Constant) or len(widths) != 3:
        return None
    values = np.asarray(bias.values)
    if values.shape != (sum(widths),):
        return None
    operands = list(node.inputs[:3])
    for slot, part in enumerate(np.split(values, np.cumsum(widths)[:-1])):
        if part.any():
            vector = bench.emit.constant("bias", part)
            operands[slot] = bench.emit.node("Add", [operands[slot], vector], dtype=bias.dtype)
    return operands


def _passes_on(mask: gs.Tensor | None, x: gs.Tensor, bench: Bench) -> bool:
    """Whether ``MultiHeadAttention`` reads a mask of this shape as ``Attention`` does."""
    if mask is None:
        return True
    shape, rows = bench.shape(mask), bench.shape(x)
    if shape is None or rows is None:
        return False
    return len(shape) in {2, 3} or (len(shape) == 1 and shape[0] == rows[0])
