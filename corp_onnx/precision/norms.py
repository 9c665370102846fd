"""LayerNorm that an exporter wrote out in single steps, as the one operator that it is.

In half precision the square of a written-out norm overflows, and its epsilon vanishes; the operator
is computed in float32 wherever it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.data.batching import Batch
from corp_onnx.graph.emit import Emitter
from corp_onnx.graph.facts import Facts
from corp_onnx.graph.model import Model
from corp_onnx.graph.operators import FIRST_LAYER_NORM
from corp_onnx.precision.slots import facts_at


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A norm over the last axis: what it reads, its weights, and the tensor that it makes."""

    source: gs.Tensor
    gamma: np.ndarray
    beta: np.ndarray | None
    epsilon: float
    output: gs.Tensor


def fused_norms(model: Model, batches: Sequence[Batch] = ()) -> tuple[Model, int]:
    """The model with every written-out LayerNorm as one operator, and how many there were.

    Before opset 17 there is no such operator, and the model stays as it is.
    """
    if model.fingerprint.opset < FIRST_LAYER_NORM:
        return model, 0
    graph = model.graph.copy()
    facts = facts_at(graph, batches)
    emit = Emitter.of(graph)
    count = 0
    for node in list(graph.nodes):
        norm = match_norm(node, facts, graph)
        if norm is not None:
            _replace(norm, emit.under(node.name))
            count += 1
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return model.with_graph(graph), count


def match_norm(node: gs.Node, facts: Facts, graph: gs.Graph) -> Norm | None:
    """Read a Div, or the Mul by a reciprocal, as the middle of a LayerNorm; None if it is not.

    ``(x - mean) / sqrt(mean((x - mean)²) + epsilon) · gamma + beta``, with ``gamma`` and ``beta``
    of the last axis; ``beta`` may be absent. Without ``gamma`` nothing says that the axis has the
    same width at all sizes, so that no scale could be written for it.
    """
    parts = _quotient(node)
    source = parts and _centred(parts[0])
    if parts is None or source is None or facts.dtype(source[0]) != np.float32:
        return None
    variance = _variance(parts[1])
    if variance is None:
        return None
    mean_square, epsilon = variance
    square = _mean_over_last(mean_square, facts)
    if square is None or _squared_source(square, facts) is not source[0]:
        return None
    if _mean_over_last(source[1], facts) is not source[0]:
        return None
    shape = facts.shape(source[0])
    return None if shape is None else _with_weights(source[0], epsilon, node, shape, graph)


def _quotient(node: gs.Node) -> tuple[gs.Tensor, gs.Tensor] | None:
    """The two tensors of ``a / sqrt(b)``."""
    if node.op == "Div":
        root = _maker(node.inputs[1], "Sqrt")
        return root and (node.inputs[0], root.inputs[0])
    if node.op == "Mul":
        for first, second in (node.inputs, node.inputs[::-1]):
            turned = _maker(second, "Reciprocal")
            root = turned and _maker(turned.inputs[0], "Sqrt")
            if root:
                return first, root.inputs[0]
    return None


def _centred(tensor: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor] | None:
    """``x`` and ``m`` of ``x - m``."""
    node = _maker(tensor, "Sub")
    return node and (node.inputs[0], node.inputs[1])


def _variance(tensor: gs.Tensor) -> tuple[gs.Tensor, float] | None:
    """``v`` and ``e`` of ``v + e``."""
    node = _maker(tensor, "Add")
    for first, second in (node.inputs, node.inputs[::-1]) if node else ():
        if isinstance(second, gs.Constant) and np.size(second.values) == 1:
            return first, float(np.asarray(second.values).reshape(()))
    return None


def _mean_over_last(tensor: gs.Tensor, facts: Facts) -> gs.Tensor | None:
    """What a mean over the last axis, which is kept, is the mean of."""
    node = _maker(tensor, "ReduceMean")
    if node is None or not node.attrs.get("keepdims", 1):
        return None
    axes = node.attrs.get("axes")
    if len(node.inputs) > 1:
        value = facts.value(node.inputs[1])
        axes = None if value is None else value.reshape(-1).tolist()
    shape = facts.shape(node.inputs[0])
    last = {-1} if shape is None else {-1, len(shape) - 1}
    return node.inputs[0] if axes is not None and len(axes) == 1 and axes[0] in last else None


def _squared_source(tensor: gs.Tensor, facts: Facts) -> gs.Tensor | None:
    """``x`` of ``(x - mean(x))²``."""
    (node,) = tensor.inputs or (None,)
    if node is None or len(node.inputs) != 2:
        return None
    power = facts.value(node.inputs[1])
    is_square = node.op == "Pow" and power is not None and power.size == 1 and power.item() == 2
    if not is_square and not (node.op == "Mul" and node.inputs[0] is node.inputs[1]):
        return None
    centred = _centred(node.inputs[0])
    if centred is None or _mean_over_last(centred[1], facts) is not centred[0]:
        return None
    return centred[0]


def _with_weights(
    source: gs.Tensor, epsilon: float, node: gs.Node, shape: tuple[int, ...], graph: gs.Graph
) -> Norm | None:
    """The norm with the scale and the shift that follow it; None without a scale."""
    gamma, scaled = _vector_after(node.outputs[0], "Mul", shape, graph)
    if gamma is None:
        return None
    beta, shifted = _vector_after(scaled, "Add", shape, graph)
    return Norm(source, gamma, beta, epsilon, shifted)


def _vector_after(
    tensor: gs.Tensor, op: str, shape: tuple[int, ...], graph: gs.Graph
) -> tuple[np.ndarray | None, gs.Tensor]:
    """The vector that the only reader of a tensor combines it with, and the result."""
    if len(tensor.outputs) != 1 or any(tensor is output for output in graph.outputs):
        return None, tensor
    (reader,) = tensor.outputs
    if reader.op != op or not any(reader is node for node in graph.nodes):
        return None, tensor
    for other in reader.inputs:
        if isinstance(other, gs.Constant) and other.dtype == np.float32:
            values = np.asarray(other.values)
            if _is_vector(values, shape):
                return values.reshape(-1), reader.outputs[0]
    return None, tensor


def _is_vector(values: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether it has one entry for each of the last axis, and leaves the rank as it is."""
    width = shape[-1]
    alone = values.size == width and values.shape[-1:] == (width,)
    return alone and values.ndim <= len(shape)


def _maker(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The node that makes a tensor, if it is of this kind."""
    if not tensor.inputs or tensor.inputs[0].op != op:
        return None
    return tensor.inputs[0]


def _replace(norm: Norm, emit: Emitter) -> None:
    """Let one operator make the output instead."""
    (old,) = norm.output.inputs
    inputs = [norm.source, emit.constant("scale", norm.gamma)]
    if norm.beta is not None:
        inputs.append(emit.constant("bias", norm.beta))
    attrs = {"axis": -1, "epsilon": norm.epsilon, "stash_type": 1}
    made = emit.node("LayerNormalization", inputs, dtype=np.float32, attrs=attrs)
    old.outputs.clear()
    made.inputs[0].outputs[0] = norm.output
