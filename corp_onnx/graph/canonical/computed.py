"""Weights that are computed of constants, as those of parametrised layers are, as constants."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph import reference
from corp_onnx.graph.operators import FOLDED_OPS, fixed_nodes, is_standard, made_by

PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})

ARITHMETIC = frozenset(
    {
        *("Abs", "Add", "Clip", "Concat", "ConstantOfShape", "Div", "Einsum", "Equal", "Erf"),
        *("Exp", "Expand", "Flatten", "Gather", "Gemm", "Greater", "Less", "Log", "MatMul", "Max"),
        *("Min", "Mul", "Neg", "Not", "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceMax"),
        *("ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare", "Shape", "Sigmoid", "Sign"),
        *("Softmax", "Softplus", "Sqrt", "Sub", "Tanh", "Where"),
    }
)
"""What weights are computed by, deterministic and cheap.

Where only `FOLDED_OPS` stand before a weight it stays as it is stored: these are read through.
"""


def compute_weights(graph: gs.Graph) -> None:
    """Carry out what leads from constants to a weight: weight norms, masks, added low ranks.

    Runtimes do so whenever they load the model.

    Args:
        graph: Its nodes are in order; it is changed.
    """
    fixed = fixed_nodes(graph, _is_known)
    computing: set[int] = set()
    known: dict[int, tuple[np.ndarray, ...]] = {}
    for node in graph.nodes:
        if node.op in PRODUCTS and is_standard(node):
            for tensor in [tensor for tensor in node.inputs if made_by(tensor, computing)]:
                value = _value(tensor, graph.opset, known)
                tensor.inputs.clear()
                tensor.to_constant(value)
        follows = node.op in ARITHMETIC or any(made_by(each, computing) for each in node.inputs)
        if id(node) in fixed and follows:
            computing.add(id(node))


def _is_known(node: gs.Node) -> bool:
    return is_standard(node) and node.op in FOLDED_OPS | ARITHMETIC


def _value(tensor: gs.Tensor, opset: int, known: dict[int, tuple[np.ndarray, ...]]) -> np.ndarray:
    """What the nodes before a tensor make of their constants."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    (node,) = tensor.inputs
    if id(node) not in known:
        operands = [source for source in node.inputs if not source.is_empty()]
        values = {source.name: _value(source, opset, known) for source in operands}
        known[id(node)] = reference.run(node, values, opset)
    slot = next(slot for slot, made in enumerate(node.outputs) if made is tensor)
    return known[id(node)][slot]
