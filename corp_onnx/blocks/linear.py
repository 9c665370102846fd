"""Linear layers: products with a constant matrix, whatever the exporter wrote them as."""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Float64

from corp_onnx.blocks.records import Linear, Refusal
from corp_onnx.blocks.view import constant_value
from corp_onnx.fused import BLOCKED


def match_linear(node: gs.Node, opset: int, shown: Set[str]) -> Linear | Refusal | None:
    """Read a MatMul, Gemm or 1x1 Conv as a linear layer; None if it is no product with a weight.

    ``shown`` are the names of the graph's outputs: a product that the caller sees keeps its bias
    outside.
    """
    if node.domain not in {"", "ai.onnx", None}:
        return _match_blocked(node, opset)
    if node.op == "Conv":
        return _match_pointwise(node, opset)
    return _match_product(node, opset, shown) if node.op in {"MatMul", "Gemm"} else None


def weight_of(nodes: dict[str, gs.Node], linear: Linear, opset: int) -> Float64[np.ndarray, "i o"]:
    """The matrix ``W [in, out]`` of ``y = x W + b``, with a Gemm's alpha and transB applied."""
    node = nodes[linear.node]
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
    elif node.op in {"Gemm", "Conv"} and len(node.inputs) > 2 and node.inputs[2].name:
        value = constant_value(node.inputs[2], opset)
        assert value is not None, f"{linear.node} has a bias that is not constant"
        bias = np.broadcast_to(value.reshape(-1), linear.width_out) * node.attrs.get("beta", 1.0)
    if bias is None:
        return np.zeros(linear.width_out)
    return np.array(bias, dtype=np.float64)


def dtype_of(nodes: dict[str, gs.Node], linear: Linear, opset: int) -> np.dtype:
    """The type in which the layer multiplies."""
    weight = constant_value(nodes[linear.node].inputs[1], opset)
    assert weight is not None, f"{linear.node} has no constant weight"
    return weight.dtype


def _match_product(node: gs.Node, opset: int, shown: Set[str]) -> Linear | Refusal | None:
    if constant_value(node.inputs[0], opset) is not None:
        return Refusal(node.name, node.op, "the constant matrix multiplies from the left")
    weight = constant_value(node.inputs[1], opset)
    if weight is None:
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
    seen = node.op == "Gemm" or node.outputs[0].name in shown
    bias_node = None if seen else _bias_node(node, width_out, opset)
    last = bias_node or node
    return Linear(
        node.name,
        bias_node.name if bias_node else None,
        node.inputs[0].name,
        last.outputs[0].name,
        width_in,
        width_out,
    )


def _match_pointwise(node: gs.Node, opset: int) -> Linear | None:
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
    return Linear(node.name, None, *ends, width_in, width_out, axis=1)


def _match_blocked(node: gs.Node, opset: int) -> Refusal | None:
    """A convolution of single points whose weights ONNX Runtime has laid out for one processor."""
    blocked = node.domain == BLOCKED and node.op == "Conv"
    weight = constant_value(node.inputs[1], opset) if blocked else None
    if weight is None or weight[0, 0].size != 1 or node.attrs.get("group", 1) != 1:
        return None
    reason = (
        "its weights are laid out for one processor (com.microsoft.nchwc); save the optimised "
        "model at level ORT_ENABLE_EXTENDED or below"
    )
    return Refusal(node.name, node.op, reason)


def _has_vector(node: gs.Node, opset: int) -> bool:
    """Whether what a Gemm adds, if anything, is the same for all rows and known."""
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return True
    value = constant_value(node.inputs[2], opset)
    return value is not None and value.size == (value.shape[-1] if value.ndim else 1)


def _bias_node(node: gs.Node, width: int, opset: int) -> gs.Node | None:
    """The Add of a constant vector that is the only reader of a product."""
    (output,) = node.outputs
    if len(output.outputs) != 1 or output.outputs[0].op != "Add":
        return None
    add = output.outputs[0]
    return add if _vector(add, width, opset) is not None else None


def _vector(add: gs.Node, width: int, opset: int) -> np.ndarray | None:
    """The constant vector of ``width`` entries that an Add adds, else None."""
    for tensor in add.inputs:
        value = constant_value(tensor, opset)
        if value is not None and value.shape[-1:] == (width,) and value.size == width:
            return value.reshape(-1)
    return None
