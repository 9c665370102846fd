"""Operators by domain, and their inputs, some of which are left out."""

from __future__ import annotations

from collections.abc import Callable, Set

import onnx_graphsurgeon as gs

STANDARD = frozenset({"", "ai.onnx", None})
"""Names of the domain of ONNX's own operators."""

MICROSOFT = "com.microsoft"
"""That of ONNX Runtime's."""

SIZE_OPS = frozenset({"Shape", "Size"})
"""Operators that read a tensor for its size alone."""

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

FIRST_LAYER_NORM = 17
"""The first opset that has LayerNormalization."""


def is_standard(node: gs.Node) -> bool:
    """Whether an operator is one of ONNX's own."""
    return node.domain in STANDARD


def fixed_nodes(graph: gs.Graph, allowed: Callable[[gs.Node], bool] = lambda _: True) -> set[int]:
    """Nodes, by ``id``, that depend on constants alone; those of the graph are in order.

    Args:
        graph: Where they are; what has a graph inside is none of them.
        allowed: Which nodes may be on the way.
    """
    fixed: set[int] = set()
    for node in graph.nodes:
        read = [tensor for tensor in node.inputs if not tensor.is_empty()]
        known = (isinstance(tensor, gs.Constant) or made_by(tensor, fixed) for tensor in read)
        if read and all(known) and not any(node.subgraphs()) and allowed(node):
            fixed.add(id(node))
    return fixed


def made_by(tensor: gs.Tensor, nodes: Set[int]) -> bool:
    """Whether one of some nodes, given by ``id``, computes a tensor."""
    return any(id(maker) in nodes for maker in tensor.inputs)


def operand(node: gs.Node, slot: int) -> gs.Tensor | None:
    """An input of a node; None if it is left out."""
    if slot >= len(node.inputs) or not node.inputs[slot].name:
        return None
    return node.inputs[slot]
