"""Operators by domain, and their inputs, some of which are left out."""

from __future__ import annotations

import onnx_graphsurgeon as gs

STANDARD = frozenset({"", "ai.onnx", None})
"""Names of the domain of ONNX's own operators."""

MICROSOFT = "com.microsoft"
"""That of ONNX Runtime's."""

SIZE_OPS = frozenset({"Shape", "Size"})

FOLDED_OPS = frozenset(
    {
        "Identity",
        "Transpose",
        "Cast",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Split",
        "Slice",
        "DequantizeLinear",
        "QuantizeLinear",
    }
)
"""Operators on a constant that leave it a constant: a weight behind them is read through."""
"""Operators that read a tensor for its size alone."""

FIRST_LAYER_NORM = 17
"""The first opset that has LayerNormalization."""


def is_standard(node: gs.Node) -> bool:
    """Whether an operator is one of ONNX's own."""
    return node.domain in STANDARD


def operand(node: gs.Node, slot: int) -> gs.Tensor | None:
    """An input of a node; None if it is left out."""
    if slot >= len(node.inputs) or not node.inputs[slot].name:
        return None
    return node.inputs[slot]
