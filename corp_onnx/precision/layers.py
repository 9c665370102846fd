"""Linear layers whose weights can be stored as whole numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Float32

from corp_onnx.graph.facts import element_type
from corp_onnx.precision.records import Exempt

PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm"})


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A product of an activation with a constant matrix, ``[in, out]`` or turned."""

    node: gs.Node
    weight: Float32[np.ndarray, "i o"]
    turned: bool
    """Whether the node holds the weight as ``[out, in]``."""


def layers_of(graph: gs.Graph) -> tuple[tuple[Layer, ...], tuple[Exempt, ...]]:
    """Linear layers of a graph, and products that are none, each with the reason."""
    found: list[Layer] = []
    kept: list[Exempt] = []
    for node in _products(graph):
        layer = match_layer(node)
        if isinstance(layer, Layer):
            found.append(layer)
        else:
            kept.append(Exempt(node.name, node.op, layer))
    return tuple(found), tuple(kept)


def match_layer(node: gs.Node) -> Layer | str:
    """Read a product as a linear layer, or say why it is none."""
    if node.op not in {"MatMul", "Gemm"}:
        return "an operator of com.microsoft"
    source, weight = node.inputs[:2]
    if isinstance(source, gs.Constant) or not isinstance(weight, gs.Constant):
        return "both operands are computed, as in attention"
    if weight.dtype != np.float32:
        return f"its weight is {element_type(weight)}, not float32"
    values = np.asarray(weight.values)
    if values.ndim != 2:
        return f"its weight has {values.ndim} axes, not two"
    if node.attrs.get("transA", 0):
        return "it turns its input"
    turned = bool(node.attrs.get("transB", 0))
    return Layer(node, values.T if turned else values, turned)


def _products(graph: gs.Graph) -> Iterator[gs.Node]:
    yield from (node for node in graph.nodes if node.op in PRODUCTS)
