"""Products with a scale, a transposition or an activation inside: written as separate operators.

ONNX Runtime fuses them again when it loads the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph.canonical.rewriting import Bench, Outputs
from corp_onnx.graph.operators import MICROSOFT, operand

ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "Relu": (),
    "Tanh": (),
    "Sigmoid": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
}
"""Activations that are fused to a product, and their parameters in order."""


def split_matmul(node: gs.Node, bench: Bench) -> Outputs | None:
    """``FusedMatMul``: its scale and transposition go into a constant, or beside a product."""
    left, right = node.inputs[:2]
    shapes, dtype = [bench.shape(tensor) for tensor in (left, right)], bench.dtype(left)
    if dtype is None or any(shape is None or len(shape) < 2 for shape in shapes):
        return None
    ranks = [len(shape or ()) for shape in shapes]
    alpha = float(node.attrs.get("alpha", 1.0))
    left, right = (
        bench.turned(tensor, _order(node, side, rank))
        for tensor, side, rank in zip((left, right), "AB", ranks, strict=True)
    )
    if isinstance(right, gs.Constant) and ranks[1] == 2 and alpha != 1.0:
        scaled = (np.asarray(right.values, dtype=np.float64) * alpha).astype(dtype)
        right, alpha = bench.emit.constant("weight", scaled), 1.0
    product = bench.emit.node("MatMul", [left, right], dtype=dtype)
    if alpha == 1.0:
        return [product]
    factor = bench.emit.constant("alpha", np.asarray(alpha, dtype=dtype))
    return [bench.emit.node("Mul", [product, factor], dtype=dtype)]


def split_gemm(node: gs.Node, bench: Bench) -> Outputs | None:
    """``FusedGemm``: a Gemm and its activation."""
    params = [node.attrs.get(f"activation_{name}") for name in ("alpha", "beta", "gamma")]
    return _split_activation(node, bench, "Gemm", [p for p in params if p is not None])


def split_conv(node: gs.Node, bench: Bench) -> Outputs | None:
    """``FusedConv``: a Conv and its activation. One that adds another tensor is left alone."""
    if operand(node, 3) is not None:
        return None
    return _split_activation(node, bench, "Conv", list(node.attrs.get("activation_params") or ()))


def split_matmul_activation(node: gs.Node, bench: Bench) -> Outputs | None:
    """``FusedMatMulActivation``: a FusedMatMul in its plain form, and its activation."""
    activation = str(node.attrs.get("activation"))
    names = ACTIVATIONS.get(activation)
    given = [node.attrs.get(f"activation_{name}") for name in names or ()]
    if names is None or None in given:
        return None
    product = split_matmul(node, bench)
    if product is None:
        return None
    attrs = dict(zip(names, given, strict=True))
    return [bench.emit.node(activation, list(product), dtype=product[0].dtype, attrs=attrs)]


def split_fast_gelu(node: gs.Node, bench: Bench) -> Outputs | None:
    """``GemmFastGelu``: a MatMul, and FastGelu with the bias."""
    dtype = bench.dtype(node.inputs[0])
    product = bench.emit.node("MatMul", list(node.inputs[:2]), dtype=dtype)
    bias = [tensor for tensor in node.inputs[2:] if tensor.name]
    return [bench.emit.node("FastGelu", [product, *bias], dtype=dtype, domain=MICROSOFT)]


def _split_activation(node: gs.Node, bench: Bench, op: str, given: list[float]) -> Outputs | None:
    activation = node.attrs.get("activation")
    names = ACTIVATIONS.get(str(activation))
    if names is None or len(given) < len(names):
        return None
    kept = {key: value for key, value in node.attrs.items() if not key.startswith("activation")}
    dtype = node.outputs[0].dtype or bench.dtype(node.inputs[0])
    inputs = [tensor for tensor in node.inputs[:3] if tensor.name]
    product = bench.emit.node(op, inputs, dtype=dtype, attrs=kept)
    attrs = dict(zip(names, given, strict=False))
    return [bench.emit.node(str(activation), [product], dtype=dtype, attrs=attrs)]


def _order(node: gs.Node, side: str, rank: int) -> list[int]:
    """The order of axes in which a FusedMatMul multiplies an operand.

    ``transBatch`` brings the first axis behind all others but the last, ``trans`` swaps the last
    two after that.
    """
    axes = list(range(rank))
    if node.attrs.get(f"transBatch{side}", 0):
        axes = [*axes[1:-1], axes[0], axes[-1]]
    if node.attrs.get(f"trans{side}", 0):
        axes = [*axes[:-2], axes[-1], axes[-2]]
    return axes
