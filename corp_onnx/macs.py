"""Multiply-adds and parameters, counted one way everywhere.

Linear layers, convolutions and both attention products count; 1 MAC is one multiply-add.
Element-wise operators, normalisations and Softmax do not. A bias costs no MAC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.shapes import Facts
from corp_onnx.sizes import Sizes


@dataclass(frozen=True, slots=True)
class Counts:
    """MACs per node at the given input sizes, and the number of parameters."""

    sizes: Sizes
    by_node: Mapping[str, int]
    params: int
    uncounted: tuple[str, ...]
    """Nodes that multiply, but whose sizes are not known."""

    @property
    def total(self) -> int:
        """MACs of the whole model."""
        return sum(self.by_node.values())


def count(graph: gs.Graph, facts: Facts) -> Counts:
    """Count the multiply-adds of every node, and the elements of floating-point constants.

    Single numbers (scales, epsilons) are no parameters.
    """
    by_node: dict[str, int] = {}
    uncounted = []
    for node in graph.nodes:
        if node.op not in _COUNTERS:
            continue
        try:
            if node.domain not in {"", "ai.onnx", None}:
                raise _UnknownSize
            by_node[node.name] = _COUNTERS[node.op](node, facts)
        except _UnknownSize:
            uncounted.append(node.name)
    constants = {
        tensor.name: tensor
        for node in graph.nodes
        for tensor in node.inputs
        if isinstance(tensor, gs.Constant)
    }
    params = sum(_size(t.shape) for t in constants.values() if _is_float(t) and _size(t.shape) > 1)
    return Counts(facts.sizes, by_node, params, tuple(uncounted))


class _UnknownSize(Exception):
    """A shape that could not be inferred."""


def _shape(facts: Facts, tensor: gs.Tensor) -> tuple[int, ...]:
    shape = facts.shape(tensor)
    if shape is None:
        raise _UnknownSize
    return shape


def _matmul(node: gs.Node, facts: Facts) -> int:
    inner = _shape(facts, node.inputs[0])[-1]
    return _size(_shape(facts, node.outputs[0])) * inner


def _gemm(node: gs.Node, facts: Facts) -> int:
    rows = _shape(facts, node.inputs[0])
    inner = rows[0] if node.attrs.get("transA", 0) else rows[1]
    return _size(_shape(facts, node.outputs[0])) * inner


def _conv(node: gs.Node, facts: Facts) -> int:
    kernel = _shape(facts, node.inputs[1])
    return _size(_shape(facts, node.outputs[0])) * _size(kernel[1:])


def _conv_transpose(node: gs.Node, facts: Facts) -> int:
    kernel = _shape(facts, node.inputs[1])
    return _size(_shape(facts, node.inputs[0])) * _size(kernel[1:])


def _attention(node: gs.Node, facts: Facts) -> int:
    query, key, value = (_shape(facts, tensor) for tensor in node.inputs[:3])
    if len(query) == 4:
        pairs = query[0] * query[1] * query[2] * key[2]
        return pairs * (query[3] + value[3])
    kv_heads = node.attrs["kv_num_heads"]
    heads = node.attrs["q_num_heads"]
    pairs = query[0] * query[1] * key[1]
    return int(pairs * (query[2] + value[2] * heads // kv_heads))


_COUNTERS = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
}


def _is_float(tensor: gs.Constant) -> bool:
    dtype = tensor.dtype
    return isinstance(dtype, int) or "float" in np.dtype(dtype).name


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))
