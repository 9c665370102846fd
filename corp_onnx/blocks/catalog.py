"""The catalog: every block of a model, and a refusal for everything large that is in none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import onnx_graphsurgeon as gs

from corp_onnx.blocks.attention import attention_of, unshared
from corp_onnx.blocks.foreign import weights_inside, why_fused
from corp_onnx.blocks.leftovers import SMALL_SHARE, in_bodies, leftovers
from corp_onnx.blocks.linear import match_linear
from corp_onnx.blocks.logits import Anchor, match_softmax
from corp_onnx.blocks.mlp import match_mlp
from corp_onnx.blocks.padding import with_padding
from corp_onnx.blocks.parts import Parts, match_attention, match_multi_head, match_operator
from corp_onnx.blocks.records import (
    Attention,
    Block,
    Catalog,
    Linear,
    Mlp,
    Refusal,
    linears_of,
)
from corp_onnx.blocks.twins import with_twins
from corp_onnx.blocks.view import View, holders_of
from corp_onnx.graph.macs import Counts, count
from corp_onnx.graph.model import Model, nodes_of_subgraphs
from corp_onnx.graph.operators import is_standard
from corp_onnx.graph.shapes import usual_facts
from corp_onnx.graph.sizes import Sizes
from corp_onnx.graph.varied import probed


def find_blocks(model: Model, sizes: Sizes | None = None, *, rotary: bool = False) -> Catalog:
    """Every block of a model, and a refusal for every Softmax and large linear layer outside.

    Args:
        model: The model; it is not changed.
        sizes: Dimensions of inputs for counting, by name; others take their defaults.
        rotary: Whether queries and keys that are turned by their position are offered too, in
            whole pairs of channels.

    Raises:
        PlanError: If ``sizes`` do not fit the inputs.
    """
    counts = count(model.graph, usual_facts(model.graph, sizes))
    view, unmatched = view_of(model, sizes, rotary=rotary)
    attentions, refusals = _attentions(view)
    mlps, hidden = _mlps(view, {linear.node for item in attentions for linear in linears_of(item)})
    blocks = with_twins(view, _in_order(view, [*attentions, *mlps]))
    taken = {linear.node for block in blocks for linear in linears_of(block)}
    refusals += [item for item in (*hidden, *unmatched) if item.node not in taken]
    said = taken | {item.node for item in refusals}
    refusals += leftovers(view, counts, attentions, said)
    inside = weights_inside(model.graph, counts.params, SMALL_SHARE)
    said |= {linear.node for linear in view.linears.values()}
    refusals += [item for item in inside if item.node not in said]
    refusals += in_bodies(view)
    return Catalog(
        blocks,
        tuple(refusals),
        counts.sizes,
        counts.total,
        counts.params,
        {block.id: macs for block, macs in _macs_of(blocks, counts)},
        counts.uncounted,
        rotary,
    )


def named_as(found: Catalog, dense: Catalog) -> Catalog:
    """The blocks of a cut model under the names, and in the order, of those they were before.

    A block is known by the node that it is anchored at or ends in, which surgery leaves in place.
    """
    names = {_place(block): block.id for block in dense.blocks}
    order = {name: place for place, name in enumerate(names.values())}
    known = [(names[_place(block)], block) for block in found.blocks if _place(block) in names]
    known.sort(key=lambda pair: order[pair[0]])
    return replace(
        found,
        blocks=tuple(replace(block, id=name) for name, block in known),
        macs_by_block={name: found.macs_by_block[block.id] for name, block in known},
    )


def _place(block: Block) -> str:
    return block.down.node if isinstance(block, Mlp) else block.anchor


def view_of(
    model: Model, sizes: Sizes | None = None, *, rotary: bool = False
) -> tuple[View, tuple[Refusal, ...]]:
    """The graph with its linear layers, and products with constants that are none."""
    graph, opset = model.graph, model.fingerprint.opset
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    holders = holders_of(graph)
    shown = {tensor.name for tensor in graph.outputs}
    shown |= {tensor.name for inner in nodes_of_subgraphs(graph) for tensor in inner.inputs}
    linears, refusals = {}, []
    for node in graph.nodes:
        linear = match_linear(node, opset, shown)
        if isinstance(linear, Linear):
            linears[linear.output] = linear
        elif isinstance(linear, Refusal):
            refusals.append(linear)
    view = View(graph, opset, probed(graph, sizes), order, linears, holders, rotary=rotary)
    return view, tuple(refusals)


def _attentions(view: View) -> tuple[list[Attention], list[Refusal]]:
    found: list[Attention] = []
    refusals: list[Refusal] = []
    for node in view.graph.nodes:
        parts = _parts(view, node)
        block = (
            attention_of(view, parts, f"attention.{len(found)}")
            if isinstance(parts, Parts)
            else parts
        )
        if isinstance(block, Attention):
            found.append(block)
        elif block is not None:
            refusals.append(block)
    return unshared(found), refusals


def _parts(view: View, node: gs.Node) -> Parts | Refusal | None:
    """What an attention multiplies, if ``node`` is one or its Softmax."""
    if node.op == "MultiHeadAttention":
        return match_multi_head(view, node)
    if "Attention" in node.op and not is_standard(node):
        return Refusal(node.name, node.op, why_fused(view, node))
    if node.op == "Attention":
        return match_operator(view, node)
    anchor = match_softmax(view, node)
    return match_attention(view, anchor) if isinstance(anchor, Anchor) else anchor


def _mlps(view: View, taken: set[str]) -> tuple[list[Mlp], list[Refusal]]:
    found: list[Mlp] = []
    refusals: list[Refusal] = []
    nodes = {node.name: node for node in view.graph.nodes}
    for linear in view.linears.values():
        if linear.node in taken:
            continue
        block = match_mlp(view, linear, nodes[linear.node].inputs[0], f"mlp.{len(found)}")
        if isinstance(block, Mlp):
            found.append(block)
        elif isinstance(block, Refusal):
            refusals.append(block)
    return found, refusals


def _in_order(view: View, blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Blocks in the order of the graph, each with the mask of the self-attention above it."""
    place = {node.name: index for index, node in enumerate(view.graph.nodes)}
    ordered = sorted(
        blocks,
        key=lambda block: place[block.down.node if isinstance(block, Mlp) else block.anchor],
    )
    return with_padding(view.graph.nodes, ordered)


def _macs_of(blocks: Sequence[Block], counts: Counts) -> Iterator[tuple[Block, int]]:
    """MACs of every block's linear layers and products.

    Of a layer that an MLP shares, it has the part that makes hidden channels, and others the rest.
    A layer from the hidden channels of one MLP to those of the next counts half for each.
    """
    hidden: dict[tuple[str, str], int] = {}
    for block in blocks:
        for source in block.sources if isinstance(block, Mlp) and block.fragments else ():
            key = (source.linear.node, block.id)
            macs = counts.by_node.get(source.linear.node, 0)
            hidden[key] = hidden.get(key, 0) + macs * block.width // source.linear.width_out
    shared = {node for node, _ in hidden}
    nodes = {block.id: _nodes_of(block) for block in blocks}
    owners = Counter(node for of_block in nodes.values() for node in of_block)
    for block in blocks:
        macs = 0
        for node in nodes[block.id]:
            whole = counts.by_node.get(node, 0)
            if node in shared:
                rest = whole - sum(part for (at, _), part in hidden.items() if at == node)
                macs += hidden.get((node, block.id), rest)
            else:
                macs += whole // owners[node]
        yield block, macs


def _nodes_of(block: Block) -> set[str]:
    products = block.products if isinstance(block, Attention) else ()
    return {linear.node for linear in linears_of(block)} | set(products)
