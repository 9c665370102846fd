"""Attention written whole, as ONNX Runtime's own operator, where a graph has it in plain pieces."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.catalog import probed
from corp_onnx.facts import Facts

OPERATOR, DOMAIN = "MultiHeadAttention", "com.microsoft"

FLOAT = (np.dtype(np.float32),)

LAST_BY_DEFAULT = 13
"""The first opset whose Softmax is along the last axis unless told otherwise."""

HEADS_FIRST, KEYS_TURNED = [0, 2, 1, 3], [0, 2, 3, 1]
"""From ``[b, t, h, e]``: to ``[b, h, t, e]`` and to ``[b, h, e, t]``."""


@dataclass(frozen=True, slots=True, eq=False)
class _Operand:
    """Query, key or value: ``[b, t, h·e]`` that is cut into heads, turned and scaled."""

    tensor: gs.Tensor
    heads: int
    scale: float


def write_whole(graph: gs.Graph, dtypes: Collection[np.dtype] = FLOAT) -> int:
    """Let `MultiHeadAttention` stand for every plain attention, in place; how many there were.

    ``Reshape, Transpose`` of query, key and value, the product of the first two, ``Softmax``, the
    product with the value, ``Transpose, Reshape``: one operator does it without writing all these
    tensors. Where a piece has another reader, is of another form, as with a mask, or of another
    type, the graph stays as it is.

    Args:
        graph: Is changed.
        dtypes: Types that there are kernels for.
    """
    softmaxes = [node for node in graph.nodes if node.op == "Softmax"]
    probes = probed(graph) if softmaxes else ()
    nodes = [_whole(node, graph, probes, dtypes) for node in softmaxes]
    found = [node for node in nodes if node is not None]
    if found:
        graph.nodes += found
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return len(found)


def _whole(
    softmax: gs.Node, graph: gs.Graph, probes: Sequence[Facts], dtypes: Collection[np.dtype]
) -> gs.Node | None:
    """The operator that stands for the attention of a softmax, its output taken over."""
    logits = _only_writer(softmax.inputs[0], "MatMul")
    context = _only_reader(softmax, "MatMul", graph)
    joined = context and _joined(context, graph)
    if logits is None or context is None or joined is None:
        return None
    if not _over_keys(softmax, graph.opset) or context.inputs[0] is not softmax.outputs[0]:
        return None
    query = _operand(logits.inputs[0], HEADS_FIRST)
    key = _operand(logits.inputs[1], KEYS_TURNED)
    value = _operand(context.inputs[1], HEADS_FIRST)
    if query is None or key is None or value is None or value.scale != 1.0:
        return None
    tensors = [query.tensor, key.tensor, value.tensor]
    scale = query.scale * key.scale
    if not query.heads == key.heads == value.heads or scale == 0.0:  # 0 asks for the default
        return None
    if not all(_alike(tensors, facts, dtypes) for facts in probes):
        return None
    outputs = list(joined.outputs)
    joined.outputs.clear()
    attrs = {"num_heads": query.heads, "scale": scale}
    return gs.Node(OPERATOR, f"{softmax.name}/whole", attrs, tensors, outputs, domain=DOMAIN)


def _over_keys(softmax: gs.Node, opset: int) -> bool:
    """Whether it sums up along the last of four axes."""
    return softmax.attrs.get("axis", -1 if opset >= LAST_BY_DEFAULT else 1) in {-1, 3}


def _alike(tensors: Sequence[gs.Tensor], facts: Facts, dtypes: Collection[np.dtype]) -> bool:
    """Whether query, key and value are sequences of one batch, keys and values of one length."""
    shapes = [facts.shape(tensor) for tensor in tensors]
    query, key, value = shapes
    if query is None or key is None or value is None or {len(s) for s in shapes if s} != {3}:
        return False
    kinds = {facts.dtype(tensor) for tensor in tensors}
    return query[0] == key[0] and key[:2] == value[:2] and len(kinds) == 1 and kinds <= {*dtypes}


def _joined(context: gs.Node, graph: gs.Graph) -> gs.Node | None:
    """The node behind which the heads lie side by side again."""
    turned = _only_reader(context, "Transpose", graph)
    joined = turned and _only_reader(turned, "Reshape", graph)
    if turned is None or joined is None or turned.attrs.get("perm") != HEADS_FIRST:
        return None
    target = _constant(joined.inputs[1])
    return joined if target is not None and _keeps_tokens(target, 3) else None


def _operand(tensor: gs.Tensor, perm: list[int]) -> _Operand | None:
    """Back over a scale, a turn and a cut into heads."""
    scale = 1.0
    if (scaled := _only_writer(tensor, "Mul")) is not None:
        factor = _constant(scaled.inputs[1])
        if factor is None or factor.size != 1:
            return None
        scale, tensor = float(factor.reshape(())), scaled.inputs[0]
    turned = _only_writer(tensor, "Transpose")
    if turned is None or turned.attrs.get("perm") != perm:
        return None
    cut = _only_writer(turned.inputs[0], "Reshape")
    target = cut and _constant(cut.inputs[1])
    if cut is None or target is None or not _keeps_tokens(target, 4) or target[2] < 1:
        return None
    return _Operand(cut.inputs[0], int(target[2]), scale)


def _keeps_tokens(target: np.ndarray, rank: int) -> bool:
    """Whether a Reshape leaves batch and sequence as they are."""
    return len(target) == rank and target[:2].tolist() == [0, 0]


def _only_reader(node: gs.Node, op: str, graph: gs.Graph) -> gs.Node | None:
    """The node of a kind that reads what a node gives, if nobody else sees it."""
    (output,) = node.outputs
    readers = output.outputs
    ends = [end for each in (graph, *graph.subgraphs(recursive=True)) for end in each.outputs]
    if len(readers) != 1 or any(output is shown for shown in ends):
        return None
    (reader,) = readers
    return reader if reader.op == op and any(reader is each for each in graph.nodes) else None


def _only_writer(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The node of a kind that writes a tensor which one node reads."""
    if not tensor.inputs or len(tensor.outputs) != 1:
        return None
    return tensor.inputs[0] if tensor.inputs[0].op == op else None


def _constant(tensor: gs.Tensor) -> np.ndarray | None:
    return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else None
