"""Weights that are computed of constants, as those of parametrised layers are, as constants."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx import reference
from corp_onnx.operators import FOLDED_OPS, is_standard
from corp_onnx.reference import ROUNDING_OPS

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
    fixed: dict[int, bool] = {}  # nodes that depend on constants alone, and whether they compute
    known: dict[int, tuple[np.ndarray, ...]] = {}
    for node in graph.nodes:
        makers = [tensor.inputs[0] if tensor.inputs else None for tensor in _variables(node)]
        if node.op in PRODUCTS and is_standard(node):
            for tensor in _variables(node):
                if tensor.inputs and fixed.get(id(tensor.inputs[0])):
                    value = _value(tensor, graph.opset, known)
                    tensor.inputs.clear()
                    tensor.to_constant(value)
        if _is_fixed(node) and all(id(maker) in fixed for maker in makers):
            fixed[id(node)] = node.op in ARITHMETIC or any(fixed[id(maker)] for maker in makers)


def _variables(node: gs.Node) -> list[gs.Tensor]:
    return [
        tensor
        for tensor in node.inputs
        if isinstance(tensor, gs.Variable) and not tensor.is_empty()
    ]


def _is_fixed(node: gs.Node) -> bool:
    """Whether a node makes constants of constants, always the same and at full precision."""
    exact = FOLDED_OPS - ROUNDING_OPS | ARITHMETIC
    return bool(node.inputs) and node.op in exact and is_standard(node)


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
