"""What each block of the smaller model really does, given the dense model's own inputs to it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

import numpy as np

from corp_onnx.blocks import Attention, Axis, Block, Catalog, Mlp, axes_of
from corp_onnx.blocks.padding import masks_of
from corp_onnx.blocks.records import Linear, leader_of
from corp_onnx.calibration.masks import seen_rows
from corp_onnx.calibration.sites import read_of
from corp_onnx.data.batching import Batch
from corp_onnx.graph.extracts import exposed, extract
from corp_onnx.graph.model import Model
from corp_onnx.graph.shapes import evaluate
from corp_onnx.sequential.emphasis import Emphasis
from corp_onnx.sequential.streams import last_layer, stream_behind
from corp_onnx.session import Runtime, open_session
from corp_onnx.solve.folds import Solution
from corp_onnx.verify.meters import LogitMeter, Meter, OutputMeter, StreamMeter

NONE: Mapping[str, Emphasis] = MappingProxyType({})

Measured = dict[tuple[str, str | None], float]
"""Relative squared error by block and axis; None for a layer that was only fitted anew."""


def measured_errors(
    dense: Model,
    dense_catalog: Catalog,
    pruned: Model,
    pruned_catalog: Catalog,
    batches: Iterable[Batch],
    runtime: Runtime | None = None,
    *,
    without_row_constants: bool = False,
    axes: Collection[Axis] = ("mlp", "qk"),
    behind_pruned: bool = False,
) -> Measured:
    """Relative squared error of every block by itself, by dense block id and axis.

    For an MLP it is the error of the down projection's output over that output's variance; for
    queries and keys the error of the logits over all pairs of tokens in a batch, over the squared
    logits; for values the error of the output projection's output over its variance: the same
    quantities that solving predicts. One of the models is cut open at the blocks' inputs, so what
    is measured ran in ONNX Runtime. MLPs that share a layer, the end of one and the beginning of
    the other, are left out: what passes between them is narrower now. Blocks that share one set of
    weights are measured together, as they were solved.

    Args:
        dense: The dense model.
        dense_catalog: Its blocks.
        pruned: The smaller model.
        pruned_catalog: Its blocks, in the same order.
        batches: Samples to measure on.
        runtime: How models are run.
        without_row_constants: Whether logits count less what is constant along a row of
            them, which Softmax ignores.
        axes: What to measure. Values are measured where queries and keys are not narrower.
        behind_pruned: Whether blocks get what they get in the smaller model, rather than in the
            dense one.
    """
    pairs = _measurable(dense_catalog, pruned_catalog, axes)
    if not pairs:
        return {}
    kinds = {block.id: _kind(block, axes) for block, _ in pairs}
    entries = list(dict.fromkeys(name for block, _ in pairs for name in _entries(block, axes)))
    wanted = [[name for pair in pairs for name in _reads(pair[side], axes)] for side in (0, 1)]
    sides = list(zip((dense, pruned), wanted, strict=True))
    (one, ends), (other, far_ends) = reversed(sides) if behind_pruned else sides
    whole = open_session(exposed(one, [*entries, *ends]), runtime)
    parts = None
    meters = {
        leader_of(block): _meter(block, kinds[block.id], without_row_constants)
        for block, _ in pairs
    }
    for batch in batches:
        first = whole.run(batch)
        if parts is None:
            parts = open_session(extract(other, entries, far_ends, first), runtime)
        second = parts.run({**batch, **first})
        before, after = (second, first) if behind_pruned else (first, second)
        for block, narrow in pairs:
            meters[leader_of(block)].add(block, narrow, before, after)
    return {(block.id, kinds[block.id]): meters[leader_of(block)].error() for block, _ in pairs}


def stream_errors(
    dense: Model,
    catalog: Catalog,
    pruned: Model,
    solution: Solution,
    batches: Iterable[Batch],
    runtime: Runtime | None = None,
    *,
    emphases: Mapping[str, Emphasis] = NONE,
) -> Measured:
    """How far the stream behind every block is from the dense one, over what the block adds to it.

    With ``X`` the dense stream, ``x + y`` the pruned one and ``y`` the block's branch in it, this
    is ``Σ‖X - x - y‖²`` over the variation of ``X - x``: what fitting in sequence predicts. Blocks
    that share their weights are not fitted in sequence and left out, and so are MLPs whose last
    layer is the first of another that is cut. Of blocks that join one stream only the last is
    measured: when it was fitted, the others were as they are. Tokens count as they did there.
    """
    facts = evaluate(dense.graph, catalog.sizes)
    blocks = {block.id: block for block in catalog.blocks if not block.twins}
    narrower = _entered(catalog, solution)
    fitted = {
        fold.block: fold.axis
        for fold in solution.folds
        if fold.block in blocks
        and fold.axis != "qk"
        and last_layer(blocks[fold.block]) not in narrower
    }
    if not fitted:
        return {}
    behind = [stream_behind(dense, facts, blocks[name]) for name in fitted]
    streams = list({stream.tensor: stream for stream in behind}.values())
    ends = [name for stream in streams for name in stream.ends]
    masks = [mask.tensor for stream in streams if (mask := blocks[stream.block].padding)]
    whole = open_session(exposed(dense, [*ends, *masks]), runtime)
    small = open_session(exposed(pruned, ends), runtime)
    meters = {stream.block: StreamMeter(emphases.get(stream.block)) for stream in streams}
    for batch in batches:
        before, after = whole.run(batch), small.run(batch)
        for stream in streams:
            assert stream.linear is not None, f"the last layer of {stream.block} was fitted"
            wanted = stream.vectors(before[stream.tensor])
            tokens = stream.last(before[stream.tensor])
            rows = np.arange(len(wanted))[seen_rows(blocks[stream.block].padding, tokens, before)]
            found = stream.vectors(after[stream.tensor])
            branch = stream.gain * stream.vectors(after[stream.linear.output])
            meters[stream.block].compare(wanted - found + branch, branch, rows, tokens.shape[:-1])
    return {(name, fitted[name]): meter.error() for name, meter in meters.items()}


def _measurable(
    dense: Catalog, pruned: Catalog, axes: Collection[Axis]
) -> list[tuple[Block, Block]]:
    """Blocks before and after that have something to measure and take dense inputs."""
    pairs = list(zip(dense.blocks, pruned.blocks, strict=True))
    narrower = {
        linear.input
        for block, other in pairs
        if (linear := last_layer(block)) and linear.width_in != _width_in(other)
    }
    return [
        (block, other)
        for block, other in pairs
        if not set(axes).isdisjoint(axes_of(block))
        and _kind(block, axes) in axes_of(other)
        and narrower.isdisjoint(_entries(block, axes))
        and not (isinstance(block, Mlp) and _narrows_output(block, other))
    ]


def _entered(catalog: Catalog, solution: Solution) -> set[Linear]:
    """The first layers of all MLPs that are cut."""
    cut = {fold.block for fold in solution.folds}
    mlps = [block for block in catalog.blocks if isinstance(block, Mlp) and block.id in cut]
    return {source.linear for block in mlps for source in block.sources}


def _kind(block: Block, axes: Collection[Axis]) -> Axis:
    """What is measured of a block."""
    return next(axis for axis in axes_of(block) if axis in axes)


def _width_in(block: Block) -> int | None:
    """How many channels the last layer of a block reads."""
    linear = last_layer(block)
    return None if linear is None else linear.width_in


def _narrows_output(block: Mlp, other: Block) -> bool:
    """Whether the down projection is the up projection of another block that was cut."""
    return isinstance(other, Mlp) and other.down.width_out != block.down.width_out


def _meter(block: Block, axis: Axis, without_row_constants: bool) -> Meter:
    if isinstance(block, Attention) and axis == "qk":
        return LogitMeter(block.key_heads, without_row_constants)
    return OutputMeter()


def _entries(block: Block, axes: Collection[Axis]) -> list[str]:
    """The tensors through which activations enter a block."""
    return list(dict.fromkeys(linear.input for linear in _first_layers(block, axes)))


def _first_layers(block: Block, axes: Collection[Axis]) -> list[Linear]:
    if isinstance(block, Mlp):
        return [source.linear for source in block.sources]
    routes = [block.query, block.key]
    if _kind(block, axes) == "vo":
        routes.append(block.value)
    return [route.linear for route in routes if route is not None]


def _reads(block: Block, axes: Collection[Axis]) -> list[str]:
    """The tensors to compare, and the masks that say which rows count."""
    if isinstance(block, Attention) and _kind(block, axes) == "qk":
        routes = [route for route in (block.query, block.key) if route is not None]
        return [*read_of(routes), *masks_of(block)]
    linear = last_layer(block)
    assert linear is not None, f"{block.id} has a last layer"
    return [linear.output, *masks_of(block)]
