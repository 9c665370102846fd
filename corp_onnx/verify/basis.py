"""Whether blocks are what they were read as: written in another basis they compute the same.

Blocks are found in the graph at a few sizes of its inputs. What holds at these need not hold at
those of the data, and so every block is put to the test before anything is removed: a random
rotation of every head, a shuffled hidden axis, and the output of its last layer must stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
from jaxtyping import Int64

from corp_onnx.blocks import Attention, Axis, Block, Catalog, Mlp, axes_of
from corp_onnx.blocks.linear import bias_of, weight_of
from corp_onnx.blocks.records import Linear, linears_of
from corp_onnx.blocks.withheld import withheld
from corp_onnx.data.batching import Batch
from corp_onnx.errors import DataError, GraphError, SurgeryError
from corp_onnx.graph.extracts import exposed, extract
from corp_onnx.graph.model import Model
from corp_onnx.sequential.streams import last_layer
from corp_onnx.session import Runtime, open_session
from corp_onnx.solve.affine import share
from corp_onnx.solve.folds import EXACT, Fold, MlpFold, QueryKeyFold, Solution, ValueOutputFold
from corp_onnx.surgery.operate import carried_out
from corp_onnx.verify.checks import rounding_error

AXES: tuple[Axis, ...] = get_args(Axis)

DOUBT = "written in another basis, which should change nothing,"

SAMPLES, SHAPES = 2, 3
"""How many are run of how many shapes of inputs; one alone would not tell samples from tokens."""

ROUNDED = 10.0
"""How many times the rounding error of an output a block may be off: those that are what they seem
stay hundreds of times below that, a scale that is wrong by one percent lies as far above."""

Bases = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""From heads and width to ``A, B [h, e, e]`` with ``A Bᵀ = I``."""

Order = Callable[[int], Int64[np.ndarray, " d"]]
"""From a width to an order of its channels."""


def confirmed(
    model: Model, catalog: Catalog, batches: Iterable[Batch], runtime: Runtime | None = None
) -> Catalog:
    """Refuse what computes something else in another basis: it was read for what it is not.

    Args:
        model: The dense model.
        catalog: Its blocks.
        batches: Some of the data.
        runtime: How models are run.
    """
    few = _few(batches)
    doubtful = _doubts(model, catalog, few, runtime)
    reasons: dict[str, dict[Axis, str]] = {}
    for axis in AXES if doubtful else ():
        blocks = [block for block in catalog.blocks if block.id in doubtful]
        for name, doubt in _doubts(model, _only(catalog, blocks, axis), few, runtime).items():
            reasons.setdefault(name, {})[axis] = doubt
    twins = {
        twin: reasons[block.id]
        for block in catalog.blocks
        if block.id in reasons
        for twin in (block.id, *block.twins)
    }
    return withheld(catalog, twins)


def _doubts(
    model: Model, catalog: Catalog, batches: Sequence[Batch], runtime: Runtime | None
) -> dict[str, str]:
    """What is wrong, by block. Where something fails, it is found out by halves what that is."""
    try:
        errors = errors_in_another_basis(model, catalog, batches, runtime)
    except (DataError, GraphError, SurgeryError) as failure:
        if len(catalog.blocks) == 1:
            return {catalog.blocks[0].id: f"{DOUBT} it fails: {failure}"}
        half = len(catalog.blocks) // 2
        parts = (catalog.blocks[:half], catalog.blocks[half:])
        halves = (replace(catalog, blocks=blocks) for blocks in parts)
        return {
            name: doubt
            for part in halves
            for name, doubt in _doubts(model, part, batches, runtime).items()
        }
    limit = ROUNDED * rounding_error(model)
    return {
        name: f"{DOUBT} its output changes by {error:.1e} (relative squared error): what was found "
        "in the graph does not hold at the sizes of these inputs; give them with --shapes"
        for name, error in errors.items()
        if not error <= limit  # nor is it a number
    }


def _few(batches: Iterable[Batch]) -> list[Batch]:
    """A few samples of a few shapes."""
    by_shape: dict[tuple[tuple[int, ...], ...], Batch] = {}
    for batch in batches:
        shape = tuple(array.shape[1:] for array in batch.values())
        if len(by_shape) < SHAPES:
            by_shape.setdefault(shape, batch)
    return list(by_shape.values())


def _only(catalog: Catalog, blocks: Iterable[Block], axis: Axis) -> Catalog:
    """Some blocks, and nothing but one of their axes."""
    others = dict.fromkeys(set(AXES) - {axis}, "")
    left = (replace(block, refused={**others, **block.refused}) for block in blocks)
    return replace(catalog, blocks=tuple(block for block in left if axes_of(block)))


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

    every = ((block, axis) for block in catalog.blocks for axis in axes_of(block))
    return Solution("full width", tuple(folds(*one) for one in every))


def errors_in_another_basis(
    model: Model, catalog: Catalog, batches: Sequence[Batch], runtime: Runtime | None = None
) -> dict[str, float]:
    """``Σ‖ŷ - y‖² / Σ‖y‖²`` of every block's output ``y``, given the dense model's inputs to it."""
    found: dict[str, float] = {}
    for part in _apart(catalog):
        graph = carried_out(model, part, turned(model, part).folds)
        found |= _errors(model, model.with_graph(graph), part.blocks, batches, runtime)
    return found


def _errors(
    model: Model,
    other: Model,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    runtime: Runtime | None,
) -> dict[str, float]:
    entries = sorted({linear.input for block in blocks for linear in _first_layers(block)})
    ends = {block.id: _end(model, block) for block in blocks}
    whole = open_session(exposed(model, [*entries, *ends.values()]), runtime)
    lost, energy = dict.fromkeys(ends, 0.0), dict.fromkeys(ends, 0.0)
    parts = None
    for batch in batches:
        before = whole.run(batch)
        if parts is None:
            parts = open_session(extract(other, entries, ends.values(), before), runtime)
        after = parts.run({**batch, **before})
        for block in blocks:
            y, z = (side[ends[block.id]].astype(np.float64) for side in (before, after))
            known = np.isfinite(y)  # of what nobody may attend to, all may be lost
            lost[block.id] += float(np.square((z - y)[known]).sum())
            energy[block.id] += float(np.square(y[known]).sum())
    return {name: share(lost[name], energy[name]) for name in ends}


def _apart(catalog: Catalog) -> Iterator[Catalog]:
    """All blocks with something to cut, those that share a layer or follow at once by turns."""
    left = [block for block in catalog.blocks if axes_of(block)]
    while left:
        taken: list[Block] = []
        ends: set[str] = set()
        begins: set[str] = set()
        for block in left:
            firsts = _first_layers(block)
            last = last_layer(block)
            reads = {name for one in firsts for name in (one.node, one.input)}
            gives = {last.node, last.output} if last else set()
            if ends.isdisjoint(reads) and begins.isdisjoint(gives):
                taken.append(block)
                ends |= gives
                begins |= reads
        yield replace(catalog, blocks=tuple(taken))
        left = [block for block in left if not any(block is one for one in taken)]


def _first_layers(block: Block) -> list[Linear]:
    last = last_layer(block)
    return [linear for linear in linears_of(block) if linear != last]


def _end(model: Model, block: Block) -> str:
    """The output of the last layer, or of the last product where that layer is not known."""
    last = last_layer(block)
    if last is not None:
        return last.output
    assert isinstance(block, Attention), "an MLP ends in a linear layer"
    node = next(node for node in model.graph.nodes if node.name == block.products[-1])
    return str(node.outputs[0].name)
