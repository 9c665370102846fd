"""The same function in another basis: folds that keep every channel of every axis."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64

from corp_onnx.blocks import Attention, Axis, Block, Catalog, Mlp, axes_of
from corp_onnx.blocks.linear import bias_of, weight_of
from corp_onnx.graph.model import Model
from corp_onnx.solve.folds import EXACT, Fold, MlpFold, QueryKeyFold, Solution, ValueOutputFold
from corp_onnx.solve.rotary import pair_maps, positions_of

Bases = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""From heads and width to ``A, B [h, e, e]`` with ``A Bᵀ = I``."""

Order = Callable[[int], Int64[np.ndarray, " d"]]
"""From a width to an order of its channels."""


def turned(model: Model, catalog: Catalog, seed: int = 0) -> Solution:
    """Another basis for every head, another order of every hidden axis: the same function."""
    rng = np.random.default_rng(seed)

    def bases(heads: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        shape = (heads, width, width)
        left, right = (np.linalg.qr(rng.standard_normal(shape))[0] for _ in range(2))
        stretch = rng.uniform(0.5, 2, (heads, 1, width))
        return left * stretch @ right, left / stretch @ right

    return in_basis(model, catalog, bases, rng.permutation)


def in_basis(model: Model, catalog: Catalog, bases: Bases, order: Order) -> Solution:
    """Folds that keep every channel of every axis: ``q A (k B)ᵀ = q kᵀ``, ``v A Bᵀ W = v W``."""
    nodes, opset = {node.name: node for node in model.graph.nodes}, model.fingerprint.opset

    def folds(block: Block, axis: Axis) -> Fold:
        if isinstance(block, Mlp):
            weight, bias = weight_of(nodes, block.down, opset), bias_of(nodes, block.down, opset)
            kept = order(block.width)
            return MlpFold(block.id, kept, weight[kept], bias, EXACT)
        if axis == "qk":
            assert block.key is not None, f"{block.id} offers its keys"
            if block.rotation is not None:
                return _turned_pairs(block, block.rotation.pairs, factors, order)
            query, key = bases(len(block.key.channels), block.head_width)
            return QueryKeyFold(block.id, query[block.key_heads], key, EXACT)
        assert block.value is not None, f"{block.id} offers its values"
        assert block.output is not None, f"{block.id} offers its values"
        value, inverse = bases(len(block.value.channels), block.value_width)
        weight = weight_of(nodes, block.output.linear, opset)
        rows = np.zeros((len(block.output.value_heads), block.value_width, weight.shape[1]))
        rows[tuple(block.output.places.T)] = weight
        back = inverse.transpose(0, 2, 1)[block.output.value_heads]
        bias = bias_of(nodes, block.output.linear, opset)
        return ValueOutputFold(block.id, value, back @ rows, bias, EXACT)

    def factors(heads: int, pairs: int) -> np.ndarray:
        """Of every head and pair, out of what is drawn for heads of width two."""
        numbers = bases(heads * pairs, 2)[0][..., 0]
        found: np.ndarray = (numbers[:, 0] + 1j * numbers[:, 1]).reshape(heads, pairs)
        return found

    every = ((block, axis) for block in catalog.blocks for axis in axes_of(block))
    return Solution("full width", tuple(folds(*one) for one in every))


def _turned_pairs(
    block: Attention,
    pairs: Int64[np.ndarray, "p 2"],
    factors: Callable[[int, int], np.ndarray],
    order: Order,
) -> QueryKeyFold:
    """Pairs in another order, with factors ``c`` of keys and ``1 / c̄`` of queries."""
    assert block.key is not None, f"{block.id} offers its keys"
    kept = order(len(pairs))
    key = factors(len(block.key.channels), len(pairs))
    query = 1.0 / key.conj()[block.key_heads]
    return QueryKeyFold(
        block.id,
        pair_maps(pairs, kept, query),
        pair_maps(pairs, kept, key),
        EXACT,
        positions_of(pairs, kept),
    )
