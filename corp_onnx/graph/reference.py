"""One standard operator, run on arrays by ONNX's reference implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from corp_onnx.graph.operators import MICROSOFT

ROUNDING_OPS = frozenset({"DequantizeLinear", "QuantizeLinear"})
"""Operators that ONNX Runtime also has in a domain of its own, for types that came late to ONNX."""

BLOCKED_OPSET = 21
"""The opset since which the standard ones know all of these, and blocks."""

_BOXING: Mapping[str, Callable[..., np.ndarray]] = {
    "Unsqueeze": np.expand_dims,
    "Squeeze": np.squeeze,
}


def run(node: gs.Node, inputs: Mapping[str, np.ndarray], opset: int) -> tuple[np.ndarray, ...]:
    """The results of a node on arrays by input name."""
    if node.op in _BOXING and "axes" in node.attrs:
        # Before opset 13. The evaluator looks for axes among the inputs there too.
        boxed = _BOXING[node.op](inputs[node.inputs[0].name], tuple(node.attrs["axes"]))
        return (boxed,)
    names = [tensor.name for tensor in node.inputs]
    proto = gs.exporters.onnx_exporter.OnnxExporter.export_node(node)
    if node.op in ROUNDING_OPS and proto.domain == MICROSOFT:
        proto.domain, opset = "", max(opset, BLOCKED_OPSET)
    evaluator = ReferenceEvaluator(proto, opsets={"": opset})
    feeds = {name: inputs[name] for name in names if name}
    return tuple(np.asarray(value) for value in evaluator.run(None, feeds))
