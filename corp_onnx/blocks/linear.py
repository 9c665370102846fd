"""Linear layers: products with a constant matrix, whatever the exporter wrote them as."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Float64

from corp_onnx.blocks.records import Linear, Refusal
from corp_onnx.blocks.view import constant_value
from corp_onnx.graph import nbits
from corp_onnx.graph.operators import is_standard

LEAVES_TOKENS_OUT = "its last layer leaves tokens out (strides), so nothing can be fitted to them"

SILENT_OPS = frozenset({"Identity", "Dropout"})
"""Operators that pass values on as they are."""


def match_linear(node: gs.Node, opset: int, shown: Set[str]) -> Linear | Refusal | None:
    """Read a product with a weight as a linear layer; None if a node is something else.

    That is a MatMul, a Gemm, a convolution over single points, or a MatMulNBits.

    ``shown`` are the names of what the caller sees, or the body of an If: a product among them
    keeps its bias outside.
    """
    if not is_standard(node) and node.op != "MatMulNBits":
        return None
    matcher = _MATCHERS.get(node.op)
    return None if matcher is None else matcher(node, opset, shown)


def _match_product(node: gs.Node, opset: int, shown: Set[str]) -> Linear | Refusal | None:
    """A MatMul or Gemm with a constant matrix on the right."""
    weights = [constant_value(tensor, opset) for tensor in node.inputs[:2]]
    if weights[0] is not None and weights[1] is None:
        return Refusal(node.name, node.op, "the constant matrix multiplies from the left")
    weight = weights[1]
    if weight is None or weights[0] is not None:
        return None
    if weight.ndim != 2:
        return Refusal(
            node.name, node.op, f"the weight {node.inputs[1].name!r} is {weight.ndim}-D, no matrix"
        )
    if node.attrs.get("transA", 0):
        return Refusal(node.name, node.op, "the activation enters transposed (transA = 1)")
    if node.op == "Gemm" and not _has_vector(node, opset):
        return Refusal(
            node.name, node.op, f"it adds {node.inputs[2].name!r}, which is no constant vector"
        )

    width_in, width_out = weight.T.shape if node.attrs.get("transB", 0) else weight.shape
    add = None if node.op == "Gemm" else _bias_node(node, width_out, opset, shown)
    return _with_bias(node, add, width_in, width_out)


def weight_of(nodes: dict[str, gs.Node], linear: Linear, opset: int) -> Float64[np.ndarray, "i o"]:
    """The matrix ``W [in, out]`` of ``y = x W + b``, with a Gemm's alpha and transB applied."""
    node = nodes[linear.node]
    if node.op == "MatMulNBits":
        return nbits.weight_of(node)
    weight = constant_value(node.inputs[1], opset)
    assert weight is not None, f"{linear.node} has no constant weight"
    if node.op == "Conv":
        weight = weight.reshape(weight.shape[:2]).T
    elif node.attrs.get("transB", 0):
        weight = weight.T
    scaled: np.ndarray = weight.astype(np.float64) * node.attrs.get("alpha", 1.0)
    return scaled


def bias_of(nodes: dict[str, gs.Node], linear: Linear, opset: int) -> Float64[np.ndarray, " o"]:
    """The vector ``b`` of ``y = x W + b``; zeros where the layer has none."""
    node = nodes[linear.node]
    bias: np.ndarray | None = None
    if linear.bias_node is not None:
        bias = _vector(nodes[linear.bias_node], linear.width_out, opset)
    elif (inside := bias_inside(node)) is not None:
        value = constant_value(inside, opset)
        assert value is not None, f"{linear.node} has a bias that is not constant"
        bias = np.broadcast_to(value.reshape(-1), linear.width_out) * node.attrs.get("beta", 1.0)
    if bias is None:
        return np.zeros(linear.width_out)
    return np.array(bias, dtype=np.float64)


def dtype_of(nodes: dict[str, gs.Node], linear: Linear, opset: int) -> np.dtype:
    """The type in which the layer multiplies."""
    node = nodes[linear.node]
    weight = constant_value(node.inputs[2 if node.op == "MatMulNBits" else 1], opset)
    assert weight is not None, f"{linear.node} has no constant weight"
    return weight.dtype


def bias_inside(node: gs.Node) -> gs.Tensor | None:
    """The vector that a layer adds itself, if it does."""
    slot = nbits.BIAS if node.op == "MatMulNBits" else 2
    return node.inputs[slot] if len(node.inputs) > slot and node.inputs[slot].name else None


def _match_packed(node: gs.Node, opset: int, shown: Set[str]) -> Linear | Refusal:
    """A product with a weight of a few bits an entry."""
    reason, bias = nbits.why_unread(node), bias_inside(node)
    if bias is not None and constant_value(bias, opset) is None:
        reason = f"it adds {bias.name!r}, which is no constant vector"
    if reason:
        return Refusal(node.name, node.op, reason)
    width_in, width_out = int(node.attrs["K"]), int(node.attrs["N"])
    add = None if bias is not None else _bias_node(node, width_out, opset, shown)
    return _with_bias(node, add, width_in, width_out)


def _with_bias(node: gs.Node, add: gs.Node | None, width_in: int, width_out: int) -> Linear:
    """A product together with the Add of its bias, if that stands outside."""
    ends = (node.inputs[0].name, (add or node).outputs[0].name)
    return Linear(node.name, add.name if add else None, *ends, width_in, width_out)


def _match_pointwise(node: gs.Node, opset: int, shown: Set[str]) -> Linear | None:
    """A convolution whose kernel is a single point, over all channels: a product per position."""
    weight = constant_value(node.inputs[1], opset)
    if weight is None or weight[0, 0].size != 1 or node.attrs.get("group", 1) != 1:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if any(node.attrs.get("pads", ())) or (
        bias is not None and bias.name and constant_value(bias, opset) is None
    ):
        return None
    width_out, width_in = weight.shape[:2]
    ends = (node.inputs[0].name, node.outputs[0].name)
    strided = any(stride != 1 for stride in node.attrs.get("strides", ()))
    return Linear(node.name, None, *ends, width_in, width_out, axis=1, strided=strided)


def _has_vector(node: gs.Node, opset: int) -> bool:
    """Whether what a Gemm adds, if anything, is the same for all rows and known."""
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return True
    value = constant_value(node.inputs[2], opset)
    return value is not None and value.size == (value.shape[-1] if value.ndim else 1)


def _bias_node(node: gs.Node, width: int, opset: int, shown: Set[str]) -> gs.Node | None:
    """The Add of a constant vector that a product enters, and nothing else.

    What lies between, if anything, passes values on.
    """
    reader = node
    while reader is node or reader.op in SILENT_OPS:
        (output, *others) = reader.outputs
        seen = any(tensor.outputs or tensor.name in shown for tensor in others)
        if len(output.outputs) != 1 or output.name in shown or seen:
            return None
        reader = output.outputs[0]
    if reader.op != "Add":
        return None
    return reader if _vector(reader, width, opset) is not None else None


def bias_slot(add: gs.Node, opset: int) -> int:
    """Which input of an Add behind a product is the bias."""
    return 0 if constant_value(add.inputs[0], opset) is not None else 1


def _vector(add: gs.Node, width: int, opset: int) -> np.ndarray | None:
    """The constant vector of ``width`` entries that an Add adds, else None."""
    for tensor in add.inputs:
        value = constant_value(tensor, opset)
        if value is not None and value.shape[-1:] == (width,) and value.size == width:
            return value.reshape(-1)
    return None


_MATCHERS: Mapping[str, Callable[[gs.Node, int, Set[str]], Linear | Refusal | None]] = {
    "Conv": _match_pointwise,
    "Gemm": _match_product,
    "MatMul": _match_product,
    "MatMulNBits": _match_packed,
}
