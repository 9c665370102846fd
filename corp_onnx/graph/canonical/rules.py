"""All rules in one table, and the one walk that applies them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import onnx_graphsurgeon as gs

from corp_onnx.graph.canonical.attention import plain_operands, unpack_attention
from corp_onnx.graph.canonical.computed import compute_weights
from corp_onnx.graph.canonical.einsum import einsum_as_matmul, in_pairs
from corp_onnx.graph.canonical.grouped import ungroup_attention
from corp_onnx.graph.canonical.norms import fold_batch_norm, split_skip_norm
from corp_onnx.graph.canonical.products import (
    split_conv,
    split_fast_gelu,
    split_gemm,
    split_matmul,
    split_matmul_activation,
)
from corp_onnx.graph.canonical.rewriting import Bench, Rule, instead
from corp_onnx.graph.emit import Emitter
from corp_onnx.graph.facts import Facts
from corp_onnx.graph.operators import MICROSOFT, is_standard
from corp_onnx.graph.shapes import evaluate, usual_sequence
from corp_onnx.graph.sizes import input_sizes

log = logging.getLogger(__name__)

ONNX = ""

RULES: Mapping[tuple[str, str], Rule] = {
    (ONNX, "BatchNormalization"): fold_batch_norm,
    (ONNX, "Einsum"): einsum_as_matmul,
    (MICROSOFT, "Attention"): unpack_attention,
    (MICROSOFT, "FusedConv"): split_conv,
    (MICROSOFT, "FusedGemm"): split_gemm,
    (MICROSOFT, "FusedMatMul"): split_matmul,
    (MICROSOFT, "FusedMatMulActivation"): split_matmul_activation,
    (MICROSOFT, "GemmFastGelu"): split_fast_gelu,
    (MICROSOFT, "GroupQueryAttention"): ungroup_attention,
    (MICROSOFT, "SkipLayerNormalization"): split_skip_norm,
    (MICROSOFT, "TransposeMatMul"): split_matmul,
    (MICROSOFT, "MultiHeadAttention"): plain_operands,
}
"""By domain and operator; every rule computes the same, or leaves the node alone."""


def canonicalise(graph: gs.Graph) -> None:
    """Rewrite, in place, what the recognisers would not understand and has a plain equal.

    Operators that act on every channel by itself stay fused: they hinder nothing.
    """
    compute_weights(graph)
    in_pairs(graph)
    wanted = [node for node in graph.nodes if _key(node) in RULES]
    if not wanted:
        return
    opset = graph.opset
    bench = Bench(opset, _facts(graph), Emitter.of(graph), {})
    for node in wanted:
        outputs = RULES[_key(node)](node, bench.beside(node))
        if outputs is None:
            log.debug("%s (%s) has no plain form and stays as it is", node.name, node.op)
        else:
            instead(graph, node, outputs)


def _key(node: gs.Node) -> tuple[str, str]:
    return ONNX if is_standard(node) else node.domain, node.op


def _facts(graph: gs.Graph) -> Facts:
    """What is known at a batch of two, or of one where the model runs at no other."""
    sequence = usual_sequence(graph)
    two, one = (evaluate(graph, input_sizes(graph, batch=b, sequence=sequence)) for b in (2, 1))
    return two if two.filled >= one.filled else one
