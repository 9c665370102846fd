"""Which mask says what tokens of a block are padding: that of the self-attention above it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from corp_onnx.blocks.records import Attention, Block, Mask, Mlp
from corp_onnx.graph.operators import SIZE_OPS


def with_padding(nodes: Iterable[gs.Node], blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Blocks, each with the mask of the self-attention that its tokens come from.

    A self-attention has its own. What a cross-attention attends to are other tokens, whose masks
    end there: an encoder's says nothing of the decoder behind it.

    Args:
        nodes: Of the graph, in its order.
        blocks: All of them.
    """
    attentions = [block for block in blocks if isinstance(block, Attention)]
    above = _nearest_above(nodes, attentions)
    ends = [block.down.node if isinstance(block, Mlp) else block.products[0] for block in blocks]
    nearest = [above[end] for end in ends]
    return tuple(
        replace(block, padding=attention.key_padding if attention else None)
        for block, attention in zip(blocks, nearest, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Padding:
    """What of an output is padding: rows, or numbers where it has one for every token."""

    mask: Mask
    by_number: bool


def padding_of(graph: gs.Graph, blocks: Sequence[Block]) -> dict[str, Padding]:
    """By output of a graph, what is padding: by the self-attention that its tokens come from.

    An output ``[b, ?]`` whose last axis is open has a number for every token.
    """
    attentions = [block for block in blocks if isinstance(block, Attention)]
    above = _nearest_above(graph.nodes, attentions)
    found = {}
    for tensor in graph.outputs:
        block = next((above.get(maker.name) for maker in tensor.inputs), None)
        if block is not None and block.key_padding is not None:
            axes = list(tensor.shape or ())
            by_number = len(axes) == 2 and not isinstance(axes[1], int)
            found[tensor.name] = Padding(block.key_padding, by_number)
    return found


def _nearest_above(
    nodes: Iterable[gs.Node], attentions: Sequence[Attention]
) -> dict[str, Attention | None]:
    """By node, the last self-attention that it follows or is a part of."""
    owners = {product: block for block in attentions for product in block.products}
    place = {block.id: number for number, block in enumerate(attentions)}
    of_tensor: dict[str, Attention] = {}
    of_node: dict[str, Attention | None] = {}
    for node in nodes:
        found = owners.get(node.name)
        if found is None or found.crosses:
            known = [of_tensor[name] for name in _followed(node, found) if name in of_tensor]
            found = max(known, key=lambda block: place[block.id], default=None)
        of_node[node.name] = found
        if found is not None:
            of_tensor |= dict.fromkeys((tensor.name for tensor in node.outputs), found)
    return of_node


def _followed(node: gs.Node, cross: Attention | None) -> list[str]:
    """The tensors whose tokens a node goes on with: in a cross-attention, those that ask."""
    if node.op in SIZE_OPS:
        return []
    if cross is None:
        return [tensor.name for tensor in node.inputs]
    return [cross.query.linear.output if cross.query else node.inputs[0].name]


def masks_of(block: Block) -> tuple[str, ...]:
    """The tensors that say which tokens of a block are padding."""
    masks = [block.padding, block.key_padding if isinstance(block, Attention) else None]
    return tuple(dict.fromkeys(mask.tensor for mask in masks if mask))
