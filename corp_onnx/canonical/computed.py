"""Weights that are computed of constants, as those of parametrised layers are, as constants."""

from __future__ import annotations

from collections.abc import Iterator

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
    """
    known: dict[int, tuple[np.ndarray, ...]] = {}
    for node in graph.nodes:
        if node.op not in PRODUCTS or not is_standard(node):
            continue
        for tensor in node.inputs:
            if tensor.inputs and _is_computed(tensor):
                value = _value(tensor, graph.opset, known)
                tensor.inputs.clear()
                tensor.to_constant(value)


def _is_computed(tensor: gs.Tensor) -> bool:
    """Whether arithmetic on constants alone makes a tensor, at full precision."""
    ops = {node.op if node is not None and is_standard(node) else None for node in _cone(tensor)}
    return ops <= FOLDED_OPS - ROUNDING_OPS | ARITHMETIC and not ops <= FOLDED_OPS


def _cone(end: gs.Tensor) -> Iterator[gs.Node | None]:
    """All nodes that a tensor comes from; None for an input, and for what has no inputs."""
    stack, seen = [end], set()
    while stack:
        tensor = stack.pop()
        if isinstance(tensor, gs.Constant) or tensor.is_empty() or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        maker = tensor.inputs[0] if tensor.inputs else None
        yield maker if maker is not None and maker.inputs else None
        if maker is not None:
            stack.extend(maker.inputs)


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
