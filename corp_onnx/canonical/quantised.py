"""Weights that are stored quantised but multiplied as floating-point numbers."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

log = logging.getLogger(__name__)

QUANTISED_OPS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearMatMul",
        "QLinearConv",
        "MatMulInteger",
        "ConvInteger",
        "MatMulNBits",
        "QAttention",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
        "QGemm",
    }
)

NARROW_TYPES = frozenset({"int4", "uint4", "int2", "uint2", "float4_e2m1fn"})
"""Types of less than a byte an element."""


def quantised_ops(proto: onnx.ModelProto) -> list[str]:
    """Operators by which a model rounds more than the weights that it stores."""
    constants = {tensor.name for tensor in proto.graph.initializer} | {""}
    constants |= {node.output[0] for node in proto.graph.node if node.op_type == "Constant"}
    found = {
        node.op_type
        for node in proto.graph.node
        if node.op_type != "DequantizeLinear" or not constants.issuperset(node.input)
    }
    return sorted(found & QUANTISED_OPS)


def notes_of(graph: gs.Graph) -> tuple[str, ...]:
    """Weights that are stored quantised are read, but not written so again: said, and logged."""
    types = sorted(
        {
            _type_name(node.inputs[0])
            for node in graph.nodes
            if node.op == "DequantizeLinear" and isinstance(node.inputs[0], gs.Constant)
        }
    )
    if not types:
        return ()
    note = (
        f"weights are stored as {', '.join(types)} (DequantizeLinear); those of layers that are "
        "cut are written as plain floating-point numbers, all others stay as they are"
    )
    log.warning("%s", note)
    return (note,)


def _type_name(tensor: gs.Constant) -> str:
    """The element type, which the library gives as ONNX's number where NumPy has none."""
    dtype = tensor.dtype
    if isinstance(dtype, int):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    return str(np.dtype(dtype).name)


def pack_narrow_constants(graph: gs.Graph) -> None:
    """Let constants of less than a byte an element be written as ONNX packs them.

    The library that writes the graph takes their bytes from NumPy, which has one for each.
    """
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and _type_name(tensor) in NARROW_TYPES:
            packed = onnx.numpy_helper.from_array(np.asarray(tensor.values), tensor.name)
            tensor.values = LazyValues(packed)
