"""Weights of ONNX Runtime's MatMulNBits: numbers of a few bits, packed, in blocks with scales."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Float64

from corp_onnx.graph.operators import operand

BITS = 4
"""What ``bits`` is where a node does not say."""

BIAS = 5
"""The input that holds a bias."""


def why_unread(node: gs.Node) -> str | None:
    """Why the weight of a MatMulNBits cannot be read; None if it can."""
    weight, scales, zeros, order = (operand(node, slot) for slot in (1, 2, 3, 4))
    given = [tensor for tensor in (weight, scales, zeros, order) if tensor is not None]
    if any(not isinstance(tensor, gs.Constant) for tensor in given):
        return "its weight is computed at run time"
    if node.attrs.get("weight_prepacked", 0):
        return "its weight is packed for one kind of device (weight_prepacked)"
    if _bits(node) not in {2, 4, 8}:
        return f"its weight has {_bits(node)} bits an entry, which is not read"
    if weight is None or scales is None or 0 in weight.shape:
        return "it has no weight"
    if order is not None and (_bits(node) != BITS or _is_packed(zeros)):
        return "blocks of its weight are out of order (g_idx), which is read with 4 bits only"
    return None


def weight_of(node: gs.Node) -> Float64[np.ndarray, "i o"]:
    """The matrix ``W [in, out]`` of ``y = x W + b``.

    Entry ``k`` of output ``n`` is ``(q - zero) · scale``, with the scale and the zero point of its
    block, which is ``k // block_size`` or what ``g_idx`` says. A zero point that is not given is
    half of what the bits can hold.
    """
    width_in, width_out, bits = node.attrs["K"], node.attrs["N"], _bits(node)
    size = int(node.attrs["block_size"])
    blocks = -(-width_in // size)
    stored, scales, zeros, order = (operand(node, slot) for slot in (1, 2, 3, 4))
    assert stored is not None, "its weight can be read"
    assert scales is not None, "its weight can be read"
    values = _unpacked(stored.values, bits, width_out)[:, :width_in]
    scale = np.asarray(scales.values, dtype=np.float64).reshape(width_out, blocks)
    zero = np.full((width_out, blocks), 2.0 ** (bits - 1))
    if zeros is not None and _is_packed(zeros):
        zero = _unpacked(zeros.values, bits, width_out)[:, :blocks].astype(np.float64)
    elif zeros is not None:
        zero = np.asarray(zeros.values, dtype=np.float64).reshape(width_out, blocks)
    block = np.arange(width_in) // size if order is None else np.asarray(order.values)[:width_in]
    made: np.ndarray = ((values - zero[:, block]) * scale[:, block]).T
    return made


def _unpacked(stored: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Whole numbers from bytes, the lowest bits first, row by row."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    entries = (np.asarray(stored)[..., None] >> shifts) & np.uint8(2**bits - 1)
    unpacked: np.ndarray = entries.reshape(rows, -1)
    return unpacked


def _bits(node: gs.Node) -> int:
    return int(node.attrs.get("bits", BITS))


def _is_packed(zeros: gs.Tensor | None) -> bool:
    """Whether zero points are packed as the weight is, rather than of the type of the scales."""
    return zeros is not None and zeros.dtype == np.uint8
