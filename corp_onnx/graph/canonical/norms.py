"""Norms that hide something: weights in front of a BatchNormalization, or a residual stream."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph.canonical.rewriting import Bench, Outputs, is_read, sole_reader
from corp_onnx.graph.operators import FIRST_LAYER_NORM, is_standard, operand

DEFAULT_EPSILON = 1e-5
SKIP_EPSILON = 1e-12


def split_skip_norm(node: gs.Node, bench: Bench) -> Outputs | None:
    """``SkipLayerNormalization`` as the sum, which is a residual stream, and the norm of it.

    ONNX Runtime makes one operator of both again where it loads the model. It would not if the sum
    had other readers, so where it has, as before a norm that comes first, nothing changes.
    """
    others = [tensor for tensor in node.outputs[1:] if is_read(bench.emit.graph, tensor)]
    if bench.opset < FIRST_LAYER_NORM or others:
        return None
    x, skip, gamma, beta, bias = (operand(node, slot) for slot in range(5))
    if bench.shape(x) != bench.shape(skip):
        return None
    dtype = bench.dtype(x)
    if bias is not None:
        x = bench.emit.node("Add", [x, bias], dtype=dtype)
    stream = bench.emit.node("Add", [x, skip], dtype=dtype)
    vectors = [tensor for tensor in (gamma, beta) if tensor is not None]
    epsilon = node.attrs.get("epsilon", SKIP_EPSILON)
    attrs = {"axis": -1, "epsilon": epsilon}
    normal = bench.emit.node("LayerNormalization", [stream, *vectors], dtype=dtype, attrs=attrs)
    return [normal]


def fold_batch_norm(node: gs.Node, bench: Bench) -> Outputs | None:
    """``s (W x + b - m) + t`` as ``(s W) x + (s (b - m) + t)``, where nobody else reads ``W x``.

    Read are the products of `_maker`; between them and the norm a Reshape or Flatten may merge
    the axes in front of the channels.
    """
    graph = bench.emit.graph
    trained = node.attrs.get("training_mode", 0)
    if trained or any(is_read(graph, tensor) for tensor in node.outputs[1:]):
        return None
    if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:5]):
        return None
    gamma, beta, mean, variance = (
        np.asarray(tensor.values, dtype=np.float64) for tensor in node.inputs[1:5]
    )
    scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", DEFAULT_EPSILON))
    maker, add = _maker(node, bench)
    if maker is None or not _folded(maker, add, scale, beta - mean * scale, bench):
        return None
    return [node.inputs[0]]


def _maker(node: gs.Node, bench: Bench) -> tuple[gs.Node | None, gs.Node | None]:
    """The product whose channels a norm scales, and the Add of its bias if that is a node."""
    above = list(_above(node, bench.emit.graph))
    rows = len(bench.shape(node.inputs[0]) or ()) == 2
    if above and above[0].op in {"Reshape", "Flatten"}:
        rows = _keeps_channels(above[0], bench)
        above = above[1:] if rows else []
    elif above and above[0].op == "Conv":
        return above[0], None
    ops = [item.op for item in above]
    if not rows:
        return None, None
    if ops[:1] in (["Gemm"], ["MatMul"]):
        return above[0], None
    return (above[1], above[0]) if ops[:2] == ["Add", "MatMul"] else (None, None)


def _above(node: gs.Node, graph: gs.Graph) -> Iterator[gs.Node]:
    """What makes the input of a node, upwards, as long as nobody else reads it."""
    tensor = node.inputs[0]
    while tensor.inputs and sole_reader(graph, tensor) is node:
        (node,) = tensor.inputs
        if not is_standard(node):
            return
        yield node
        moved = node.op in {"Reshape", "Flatten"}
        followed = [value for value in node.inputs if not isinstance(value, gs.Constant)]
        if not followed or (len(followed) > 1 and not moved):
            return
        tensor = node.inputs[0] if moved else followed[0]


def _keeps_channels(node: gs.Node, bench: Bench) -> bool:
    """Whether a Reshape only merges the axes in front of the last, to two in all."""
    before, after = bench.shape(node.inputs[0]), bench.shape(node.outputs[0])
    return before is not None and after is not None and len(after) == 2 and before[-1] == after[-1]


def _folded(
    maker: gs.Node, add: gs.Node | None, scale: np.ndarray, shift: np.ndarray, bench: Bench
) -> bool:
    """Give a product scaled weights and the shifted bias; False, and no change, if it cannot be."""
    weight = maker.inputs[1]
    if not isinstance(weight, gs.Constant):
        return False
    values = np.asarray(weight.values)
    axis = 0 if maker.op == "Conv" or maker.attrs.get("transB", 0) else values.ndim - 1
    if values.shape[axis] != scale.size or (maker.op != "Conv" and values.ndim != 2):
        return False
    old = _bias(maker, add, scale.size)
    if old is None:
        return False
    lengthened = scale.reshape([-1 if index == axis else 1 for index in range(values.ndim)])
    with np.errstate(over="ignore"):
        scaled = (values.astype(np.float64) * lengthened).astype(values.dtype)
        bias = (old * scale + shift).astype(values.dtype)
    if not (np.isfinite(scaled).all() and np.isfinite(bias).all()):
        return False
    maker.inputs[1] = bench.emit.constant("weight", scaled)
    _set_bias(maker, add, bench.emit.constant("bias", bias), bench)
    return True


def _bias(maker: gs.Node, add: gs.Node | None, width: int) -> np.ndarray | None:
    """The vector that a product adds; None if it is none, or not known."""
    tensor = operand(maker, 2)
    if add is not None:
        tensor = next((value for value in add.inputs if isinstance(value, gs.Constant)), None)
    elif tensor is None:
        return np.zeros(width)
    if not isinstance(tensor, gs.Constant) or tensor.shape[-1:] not in ([width], (width,)):
        return None
    values = np.asarray(tensor.values, dtype=np.float64)
    return values.reshape(-1) * maker.attrs.get("beta", 1.0) if values.size == width else None


def _set_bias(maker: gs.Node, add: gs.Node | None, bias: gs.Constant, bench: Bench) -> None:
    if add is not None:
        slot = next(s for s, value in enumerate(add.inputs) if isinstance(value, gs.Constant))
        add.inputs[slot] = bias
    elif maker.op == "MatMul":
        (output,) = maker.outputs
        maker.outputs.clear()
        product = bench.emit.variable("product", output.dtype)
        maker.outputs.append(product)
        bench.emit.into("Add", [product, bias], output)
    else:
        if len(maker.inputs) > 2:
            maker.inputs[2] = bias
        else:
            maker.inputs.append(bias)
        if maker.op == "Gemm":
            maker.attrs["beta"] = 1.0
