"""Weights that are stored quantised but multiplied as floating-point numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from corp_onnx.graph.facts import element_type
from corp_onnx.graph.inlining import inlined
from corp_onnx.graph.nbits import BITS

QUANTISED_OPS = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearMatMul",
        "QLinearConv",
        "MatMulInteger",
        "ConvInteger",
        "QAttention",
        "QEmbedLayerNormalization",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
        "QGemm",
    }
)

NARROW_TYPES = frozenset({"int4", "uint4", "int2", "uint2", "float4_e2m1fn"})
"""Types of less than a byte an element."""


QUANTISED_FAMILIES = ("QLinear", "QOrdered")
"""How names of more such operators begin."""


def quantised_ops(proto: onnx.ModelProto) -> list[str]:
    """Operators by which a model rounds more than the weights that it stores."""
    return sorted(_rounding(inlined(proto).graph, {""}))


def _rounding(graph: onnx.GraphProto, constants: set[str]) -> set[str]:
    """Operators that round something else than constants, bodies included."""
    constants = constants | {tensor.name for tensor in graph.initializer}
    found: set[str] = set()
    for node in graph.node:
        bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        for body in bodies:
            found |= _rounding(body, constants)
        if constants.issuperset(node.input) and not bodies:
            constants.update(node.output)
        elif node.op_type in QUANTISED_OPS or node.op_type.startswith(QUANTISED_FAMILIES):
            found.add(node.op_type)
    return found


def stored_rounded(graph: gs.Graph) -> str | None:
    """What is said of weights that are rounded, if there are any."""
    found = {
        (_type_name(node.inputs[0]), node.op)
        for node in graph.nodes
        if node.op == "DequantizeLinear" and isinstance(node.inputs[0], gs.Constant)
    } | {
        (f"int{node.attrs.get('bits', BITS)}", node.op)
        for node in graph.nodes
        if node.op == "MatMulNBits"
    }
    if not found:
        return None
    types, ops = (", ".join(sorted({pair[place] for pair in found})) for place in (0, 1))
    return (
        f"weights are stored as {types} ({ops}); those of layers that are "
        "cut are written as plain floating-point numbers, all others stay as they are"
    )


def stored_narrow(graph: gs.Graph) -> str | None:
    """What is said of weights of a type that is not computed in, if there are any."""
    tensors = [tensor for node in graph.nodes for tensor in node.inputs]
    if any(isinstance(one, gs.Constant) and _type_name(one) == "bfloat16" for one in tensors):
        return "weights are stored as bfloat16, which is run in float32 here; they stay bfloat16"
    return None


def _type_name(tensor: gs.Constant) -> str:
    return str(element_type(tensor))


def pack_narrow_constants(graph: gs.Graph) -> None:
    """Let constants of less than a byte an element be written as ONNX packs them.

    The library that writes the graph takes their bytes from NumPy, which has one for each.
    """
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and _type_name(tensor) in NARROW_TYPES:
            packed = onnx.numpy_helper.from_array(np.asarray(tensor.values), tensor.name)
            tensor.values = LazyValues(packed)
