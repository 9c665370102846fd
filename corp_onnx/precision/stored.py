"""Weights of eight or four bits in blocks, computed with in float32: ONNX Runtime's MatMulNBits."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Float32, UInt8

from corp_onnx.graph.emit import Emitter
from corp_onnx.graph.model import Model
from corp_onnx.graph.operators import MICROSOFT
from corp_onnx.precision.integers import require_some
from corp_onnx.precision.layers import Layer, layers_of
from corp_onnx.precision.ranges import LEAST
from corp_onnx.precision.records import Draft, WeightOnly

BITS = {"int8": 8, "int4": 4}

BLOCK = 32
"""Inputs of one output channel that share a scale and a zero point."""

ONLY_HERE = "MatMulNBits is an operator of ONNX Runtime; other runtimes may not load the model"


def with_stored_weights(model: Model, kind: WeightOnly) -> Draft:
    """Every linear layer with a weight of a few bits an entry; activations stay float32.

    Raises:
        PlanError: If there are no layers.
    """
    graph = model.graph.copy()
    layers, kept = layers_of(graph)
    require_some(layers)
    emit = Emitter.of(graph)
    weights: dict[tuple[int, bool, float], list[gs.Constant]] = {}
    for layer in layers:
        named = emit.under(layer.node.name)
        alpha = float(layer.node.attrs.get("alpha", 1.0))
        key = id(layer.node.inputs[1]), layer.turned, alpha
        if key not in weights:
            weights[key] = _constants(layer.weight * np.float32(alpha), BITS[kind], named)
        _store(layer, weights[key], BITS[kind], named)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return Draft(model.with_graph(graph), kept, quantised=len(layers), notes=(ONLY_HERE,))


def packed(
    weight: Float32[np.ndarray, "i o"], bits: int
) -> tuple[UInt8[np.ndarray, "o b s"], Float32[np.ndarray, "o b"], UInt8[np.ndarray, "o p"]]:
    """Blocks of whole numbers, their scales and their zero points, the lowest bits first.

    ``w ≈ (q - z) · s`` with ``q`` from 0 to ``2^bits - 1``. The range of a block always holds 0, so
    that ``z`` is a whole number and the padding of the last block is exact.
    """
    width_in, width_out = weight.shape
    blocks = -(-width_in // BLOCK)
    filled = np.zeros((width_out, blocks * BLOCK))
    filled[:, :width_in] = weight.T
    split = filled.reshape(width_out, blocks, BLOCK)
    low, high = np.minimum(split.min(axis=2), 0.0), np.maximum(split.max(axis=2), 0.0)
    most = 2**bits - 1
    scale = np.where(high - low >= most * LEAST, high - low, most) / most
    zero = np.rint(-low / scale)
    whole = np.clip(np.rint(split / scale[..., None]) + zero[..., None], 0, most)
    return (
        _in_bytes(whole.astype(np.uint8), bits),
        scale.astype(np.float32),
        _in_bytes(zero.astype(np.uint8), bits),
    )


def _in_bytes(entries: UInt8[np.ndarray, "... n"], bits: int) -> UInt8[np.ndarray, "... m"]:
    """Entries of the last axis, as many to a byte as fit."""
    per_byte = 8 // bits
    short = -entries.shape[-1] % per_byte
    padded = np.pad(entries, [(0, 0)] * (entries.ndim - 1) + [(0, short)])
    grouped = padded.reshape(*padded.shape[:-1], -1, per_byte)
    shifted = grouped << (np.arange(per_byte, dtype=np.uint8) * np.uint8(bits))
    joined: np.ndarray = np.bitwise_or.reduce(shifted, axis=-1).astype(np.uint8)
    return joined


def _constants(weight: Float32[np.ndarray, "i o"], bits: int, emit: Emitter) -> list[gs.Constant]:
    stored, scale, zero = packed(weight, bits)
    return [
        emit.constant("quantised", stored),
        emit.constant("scale", scale.reshape(-1)),
        emit.constant("zero_point", zero.reshape(-1)),
    ]


def _store(layer: Layer, weights: list[gs.Constant], bits: int, emit: Emitter) -> None:
    """Let MatMulNBits, and an Add of what a Gemm adds, make the output of a layer."""
    node = layer.node
    width_in, width_out = layer.weight.shape
    inputs = [node.inputs[0], *weights]
    attrs = {"K": width_in, "N": width_out, "bits": bits, "block_size": BLOCK}
    made = emit.node("MatMulNBits", inputs, dtype=np.float32, attrs=attrs, domain=MICROSOFT)
    if len(node.inputs) > 2 and node.inputs[2].name:
        made = emit.node("Add", [made, _bias(node, emit)], dtype=np.float32)
    (output,) = node.outputs
    node.outputs.clear()
    node.inputs.clear()
    (maker,) = made.inputs
    maker.outputs[0] = output


def _bias(node: gs.Node, emit: Emitter) -> gs.Tensor:
    """What a Gemm adds, scaled as it says."""
    beta = float(node.attrs.get("beta", 1.0))
    if beta == 1.0:
        return node.inputs[2]
    factor = emit.constant("beta", np.array(beta, np.float32))
    return emit.node("Mul", [node.inputs[2], factor], dtype=np.float32)
