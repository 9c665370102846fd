"""Blocks of one set of weights, which are cut alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.records import Attention, Block, linears_of
from corp_onnx.blocks.view import View, constant_value

SAMPLED = 64
"""Values of a weight that are compared before all of them are."""


def with_twins(view: View, blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Blocks with the names of those that have the same weights (one set for every layer)."""
    nodes = {node.name: node for node in view.graph.nodes}
    alike = _grouped(blocks, lambda block: tuple(_weights(view, nodes, block, _sample)))
    several = [block for group in alike for block in group if len(group) > 1]
    twins = {
        block.id: tuple(other.id for other in group)
        for group in _grouped(several, lambda block: tuple(_weights(view, nodes, block, _digest)))
        for block in group
        if len(group) > 1
    }
    return tuple(
        replace(block, twins=twins[block.id]) if block.id in twins else block for block in blocks
    )


def _grouped(blocks: Sequence[Block], key: Callable[[Block], Hashable]) -> list[list[Block]]:
    """Blocks of the same key, together."""
    groups: dict[Hashable, list[Block]] = {}
    for block in blocks:
        groups.setdefault(key(block), []).append(block)
    return list(groups.values())


def _weights(
    view: View, nodes: Mapping[str, gs.Node], block: Block, seen: Callable[[np.ndarray], bytes]
) -> Iterator[Hashable]:
    """What a block's weights are; not their names, for an exporter may write one many times."""
    if isinstance(block, Attention) and block.rotation is not None:
        yield block.rotation.pairs.tobytes()  # what is cut of one is cut of the other
    for linear in linears_of(block):
        for name in filter(None, (linear.node, linear.bias_node)):
            for tensor in nodes[name].inputs:
                value = constant_value(tensor, view.opset)
                if value is not None:
                    yield value.shape, seen(value)


def _sample(values: np.ndarray) -> bytes:
    """A few of many values: weights that differ mostly differ there, and it costs nothing."""
    return values.reshape(-1)[:: max(1, values.size // SAMPLED)].tobytes()


def _digest(values: np.ndarray) -> bytes:
    return hashlib.sha256(values.tobytes()).digest()
