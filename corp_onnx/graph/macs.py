"""Multiply-adds and parameters, counted one way everywhere.

Linear layers, convolutions and both attention products count; 1 MAC is one multiply-add.
Element-wise operators, normalisations and Softmax do not. A bias costs no MAC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph import nbits
from corp_onnx.graph.facts import Facts, element_type
from corp_onnx.graph.fused import operands_of
from corp_onnx.graph.operators import MICROSOFT, STANDARD
from corp_onnx.graph.sizes import Sizes


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
        if node.op not in _COUNTERS | _FUSED:
            continue
        table = _BY_DOMAIN.get(node.domain, {})
        try:
            if node.op not in table:
                raise _UnknownSize
            by_node[node.name] = table[node.op](node, facts)
        except _UnknownSize:
            uncounted.append(node.name)
    params = sum(size for size in _parameters(graph).values() if size > 1)
    return Counts(facts.sizes, by_node, params, tuple(uncounted))


def _parameters(graph: gs.Graph) -> dict[str, int]:
    """Elements of constants by name: of the floating-point ones, and of weights stored rounded."""
    return {
        tensor.name: _size(tensor.shape)
        for node in graph.nodes
        for slot, tensor in enumerate(node.inputs)
        if isinstance(tensor, gs.Constant) and _holds_parameters(node, slot)
    } | {
        node.inputs[1].name: int(node.attrs["N"] * node.attrs["K"])
        for node in graph.nodes
        if node.op == "MatMulNBits"
    }


def _holds_parameters(node: gs.Node, slot: int) -> bool:
    """Whether a constant there is of the network, rather than of how its weights are stored."""
    if node.op == "DequantizeLinear":
        return slot == 0
    return _is_float(node.inputs[slot]) and (node.op != "MatMulNBits" or slot == nbits.BIAS)


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


def _fused_matmul(node: gs.Node, facts: Facts) -> int:
    left, _ = operands_of(node, *(_shape(facts, tensor) for tensor in node.inputs[:2]))
    return _size(_shape(facts, node.outputs[0])) * left[-1]


def _einsum(node: gs.Node, facts: Facts) -> int:
    """One multiply-add for every combination of labels; sums of one operand have none."""
    terms = str(node.attrs["equation"]).replace(" ", "").split("->")[0].split(",")
    if len(terms) == 1:
        return 0
    if any("." in term for term in terms):
        raise _UnknownSize
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, node.inputs, strict=True):
        sizes |= dict(zip(term, _shape(facts, tensor), strict=True))
    return _size(tuple(sizes.values())) * (len(terms) - 1)


def _packed_attention(node: gs.Node, facts: Facts) -> int:
    """The projections and both products of an Attention with its weights inside."""
    batch, tokens, width = _shape(facts, node.inputs[0])
    weight = _shape(facts, node.inputs[1])
    widths = node.attrs.get("qkv_hidden_sizes") or [weight[1] // 3] * 3
    if len(node.inputs) > 4 and node.inputs[4].name:
        raise _UnknownSize
    return int(batch * tokens * (width * weight[1] + tokens * (widths[0] + widths[2])))


def _multi_head(node: gs.Node, facts: Facts) -> int:
    """Both products; operands are 3-D, or keys and values have their heads in front."""
    if any(not tensor.name for tensor in node.inputs[:3]) or len(node.inputs) < 3:
        raise _UnknownSize
    query, key, value = (_shape(facts, tensor) for tensor in node.inputs[:3])
    if len(query) != 3 or len(key) != len(value) or len(key) not in {3, 4}:
        raise _UnknownSize
    past = [tensor for tensor in node.inputs[6:7] if tensor.name]
    before = _shape(facts, past[0])[2] if past else 0
    heads = node.attrs["num_heads"] if len(key) == 4 else 1
    pairs = query[0] * query[1] * (key[-2] + before)
    return int(pairs * (query[2] + heads * value[-1]))


def _grouped(node: gs.Node, facts: Facts) -> int:
    """Both products of query heads that share keys, over the tokens at hand and those before."""
    batch, tokens, width = _shape(facts, node.outputs[0])
    past = [tensor for tensor in node.inputs[3:4] if tensor.name]
    before = _shape(facts, past[0])[2] if past else 0
    return int(batch * tokens * (tokens + before) * 2 * width)


_COUNTERS = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
    "Einsum": _einsum,
}

_FUSED = {
    "FusedMatMul": _fused_matmul,
    "FusedGemm": _gemm,
    "FusedConv": _conv,
    "Attention": _packed_attention,
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _grouped,
    "MatMulNBits": _matmul,
}
"""The same of ONNX Runtime's own domain."""

_BY_DOMAIN = dict.fromkeys(STANDARD, _COUNTERS) | {MICROSOFT: _FUSED}


def _is_float(tensor: gs.Constant) -> bool:
    return "float" in str(element_type(tensor))


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))
