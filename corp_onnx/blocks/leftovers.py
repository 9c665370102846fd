"""What multiplies and is in no block: a refusal for everything large."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set

import onnx_graphsurgeon as gs

from corp_onnx.blocks.blockers import sources_of
from corp_onnx.blocks.mlp import why_not_hidden
from corp_onnx.blocks.movement import MOVING_OPS, PASSING_OPS
from corp_onnx.blocks.records import Attention, Refusal
from corp_onnx.blocks.view import View, constant_value, producer
from corp_onnx.graph.macs import Counts
from corp_onnx.graph.model import nodes_of_subgraphs

SMALL_SHARE = 0.01
"""What has less of all MACs goes unmentioned."""

PICKING_OPS = frozenset({"Gather", "GatherElements", "GatherND"})


def leftovers(
    view: View, counts: Counts, attentions: Sequence[Attention], said: Set[str]
) -> Iterator[Refusal]:
    """A refusal for every weight that takes more than a hundredth of all MACs, or an unknown share.

    Args:
        view: The graph.
        counts: Of its MACs.
        attentions: Those that were found: what is left whole of them has its reason there.
        said: Nodes that are in a block, or have been refused.
    """
    said = said | {product for block in attentions for product in block.products}
    linears = {linear.node: output for output, linear in view.linears.items()}
    reasons = _left_whole(view, attentions)
    for node in view.graph.nodes:
        if node.name in said or not _is_large(counts, node):
            continue
        output = linears.get(node.name)
        if output is None:
            reason, op = _why_no_layer(view, node), node.op
        else:
            linear, op = view.linears[output], "Linear"
            reason = reasons.get(output) or why_not_hidden(view, linear, node.inputs[0])
        if reason:
            yield Refusal(node.name, op, reason)


def _is_large(counts: Counts, node: gs.Node) -> bool:
    share = counts.by_node.get(node.name, 0)
    return node.name in counts.uncounted or share > SMALL_SHARE * counts.total


def _why_no_layer(view: View, node: gs.Node) -> str | None:
    """Why a product with a weight is no linear layer; None if it has no weight."""
    operands = node.inputs[:2]
    if all(constant_value(tensor, view.opset) is not None for tensor in operands):
        return "it multiplies constants alone, which a runtime does once, when it loads the model"
    return next(filter(None, map(_why_picked, operands)), None)


def _why_picked(tensor: gs.Tensor) -> str | None:
    """That a tensor is part of a constant, as the data choose; None if it is something else."""
    maker, picker = producer(tensor), None
    while maker is not None and maker.op in PICKING_OPS | MOVING_OPS | PASSING_OPS:
        picker = maker if maker.op in PICKING_OPS else picker
        tensor = maker.inputs[0]
        maker = producer(tensor)
    if picker is None or not isinstance(tensor, gs.Constant):
        return None
    return (
        f"its weight is picked from {tensor.name!r} at run time ({picker.op} {picker.name}), as "
        "that of an expert or of a relative position is"
    )


def _left_whole(view: View, attentions: Sequence[Attention]) -> Mapping[str, str]:
    """Why layers that make queries, keys or values are in no block, by the output of the layer."""
    nodes = {node.name: node for node in view.graph.nodes}
    return {
        source: f"it is part of {block.id}, where {' and '.join(block.refused)} cannot be cut"
        for block in attentions
        if block.refused
        for product in block.products
        for operand in nodes[product].inputs
        for source in sources_of(view, operand)
    }


def in_bodies(view: View) -> Iterator[Refusal]:
    """A refusal for everything that multiplies inside a Loop, a Scan or an If."""
    for node in nodes_of_subgraphs(view.graph):
        if "Attention" in node.op or node.op in {"Softmax", "MatMul", "Gemm", "MatMulNBits"}:
            holder = view.holders[id(node)]
            reason = (
                f"it lies inside the body of {holder.op} ({holder.name}), which is left as it is"
            )
            yield Refusal(node.name, node.op, reason)
