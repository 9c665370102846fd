"""Linear layers in eight bits: whole-number weights by channel, activations by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.data.batching import Batch, samples_in
from corp_onnx.errors import PlanError
from corp_onnx.graph.emit import Emitter
from corp_onnx.graph.model import Model
from corp_onnx.precision.layers import Layer, layers_of
from corp_onnx.precision.ranges import ALL_LEVELS, LEAST, LEVELS, Range, ranges
from corp_onnx.precision.records import Draft
from corp_onnx.session import Runtime

FIRST_OPSET = 13
"""That has scales by channel."""


def in_integers(
    model: Model,
    batches: Sequence[Batch],
    runtime: Runtime | None = None,
    *,
    symmetric: bool = False,
) -> Draft:
    """Every linear layer with its input and its weight quantised and dequantised (QDQ).

    ``x ≈ s · (round(x / s + z) - z)``, with one ``s`` for a tensor and one for each output channel
    of a weight. Weights have ``z = 0``; activations too if they are to be symmetric, as TensorRT
    wants it. Else they are whole numbers without sign: all 255 steps are used, and ONNX Runtime
    multiplies them as whole numbers also where several layers read one tensor, which it does not
    with signed ones. Products inside attention stay in float32.

    Raises:
        PlanError: If there are no batches, no layers, or the opset has no scales by channel.
    """
    if model.fingerprint.opset < FIRST_OPSET:
        raise PlanError(
            f"the model is of opset {model.fingerprint.opset}; int8 with scales by channel needs "
            f"{FIRST_OPSET}: convert it with onnx.version_converter.convert_version"
        )
    if not batches:
        raise PlanError(
            "int8 needs inputs to take the ranges of activations from, and there are none; give "
            "calibration data (--data), or quantise the weights alone (--weight-only int8)"
        )
    graph = model.graph.copy()
    layers, kept = layers_of(graph)
    require_some(layers)
    sources = list(dict.fromkeys(layer.node.inputs[0].name for layer in layers))
    reach = ranges(model, sources, batches, runtime, symmetric=symmetric)
    _quantise(graph, layers, reach, symmetric)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    samples = sum(map(samples_in, batches))
    return Draft(model.with_graph(graph), kept, quantised=len(layers), samples=samples)


def require_some(layers: Sequence[Layer]) -> None:
    """Fail where there is nothing to quantise.

    Raises:
        PlanError: If there is no layer.
    """
    if not layers:
        raise PlanError("the model has no linear layer with constant float32 weights to quantise")


def _quantise(
    graph: gs.Graph, layers: Sequence[Layer], reach: Mapping[str, Range], symmetric: bool
) -> None:
    emit = Emitter.of(graph)
    inputs: dict[str, gs.Variable] = {}
    weights: dict[tuple[int, bool], gs.Variable] = {}
    for layer in layers:
        source, weight = layer.node.inputs[:2]
        if source.name not in inputs:
            named = emit.under(source.name)
            inputs[source.name] = _rounded_input(source, reach[source.name], symmetric, named)
        key = id(weight), layer.turned
        if key not in weights:
            weights[key] = _stored_weight(layer, emit.under(weight.name))
        layer.node.inputs[0], layer.node.inputs[1] = inputs[source.name], weights[key]


def _rounded_input(source: gs.Tensor, reach: Range, symmetric: bool, emit: Emitter) -> gs.Variable:
    size, zero = (step(reach[1]), np.int8(0)) if symmetric else _off_centre(reach)
    steps = [emit.constant("scale", np.array(size, np.float32))]
    steps.append(emit.constant("zero_point", np.array(zero)))
    narrow = emit.node("QuantizeLinear", [source, *steps], dtype=zero.dtype)
    return emit.node("DequantizeLinear", [narrow, *steps], dtype=np.float32)


def _off_centre(reach: Range) -> tuple[float, np.uint8]:
    """The size of one of 255 steps over a range, and the number that stands for zero."""
    low, high = reach
    size = (high - low) / ALL_LEVELS
    if size < LEAST:
        return 1.0, np.uint8(0)
    return size, np.uint8(np.rint(-low / size))


def _stored_weight(layer: Layer, emit: Emitter) -> gs.Variable:
    steps = step(np.abs(layer.weight).max(axis=0))
    whole = np.clip(np.rint(layer.weight / steps), -LEVELS, LEVELS).astype(np.int8)
    inputs = [
        emit.constant("quantised", whole.T if layer.turned else whole),
        emit.constant("scale", steps.astype(np.float32)),
        emit.constant("zero_point", np.zeros(len(steps), np.int8)),
    ]
    attrs = {"axis": 0 if layer.turned else 1}
    return emit.node("DequantizeLinear", inputs, dtype=np.float32, attrs=attrs)


def step(reach: float | np.ndarray) -> np.ndarray:
    """The size of one of 127 steps up to a magnitude; 1 where all is zero, or as good as zero."""
    magnitude = np.asarray(reach, np.float64)
    made: np.ndarray = np.where(magnitude >= LEVELS * LEAST, magnitude, LEVELS) / LEVELS
    return made
