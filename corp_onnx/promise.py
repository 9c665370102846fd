"""What each block of the smaller model really does, given the dense model's own inputs to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from corp_onnx.blocks import Attention, Block, Catalog, Mlp, axes_of
from corp_onnx.blocks.records import Linear, Route, leader_of
from corp_onnx.extracts import exposed, extract
from corp_onnx.graph import Model
from corp_onnx.masks import seen_rows
from corp_onnx.session import Runtime, open_session
from corp_onnx.sites import channels_last, operand
from corp_onnx.solve.affine import share
from corp_onnx.statistics import Batch

ROUNDING = 1e-6
"""Relative error that float32 alone makes: an output that never varies has nothing else."""


def measured_errors(
    dense: Model,
    dense_catalog: Catalog,
    pruned: Model,
    pruned_catalog: Catalog,
    batches: Iterable[Batch],
    runtime: Runtime | None = None,
) -> dict[str, float]:
    """Relative squared error of every block by itself, with dense inputs, by dense block id.

    For an MLP it is the error of the down projection's output over that output's variance; for
    attention the error of the logits over all pairs of tokens in a batch, over the squared logits:
    the same quantities that solving predicts. The smaller graph is cut open at the blocks' inputs,
    so what is measured ran in ONNX Runtime. MLPs that share a layer, the end of one and the
    beginning of the other, are left out: what passes between them is narrower now. Blocks that
    share one set of weights are measured together, as they were solved.
    """
    pairs = _measurable(dense_catalog, pruned_catalog)
    if not pairs:
        return {}
    entries = list(dict.fromkeys(name for block, _ in pairs for name in _entries(block)))
    whole = open_session(
        exposed(dense, [*entries, *(name for block, _ in pairs for name in _reads(block))]), runtime
    )
    parts = open_session(
        extract(pruned, entries, [name for _, other in pairs for name in _reads(other)], {}),
        runtime,
    )
    meters = {leader_of(block): _meter(block) for block, _ in pairs}
    for batch in batches:
        before = whole.run(batch)
        after = parts.run({**batch, **before})
        for block, other in pairs:
            meters[leader_of(block)].add(block, other, before, after)
    return {block.id: meters[leader_of(block)].error() for block, _ in pairs}


def _measurable(dense: Catalog, pruned: Catalog) -> list[tuple[Block, Block]]:
    """Blocks before and after that have something to measure and take dense inputs."""
    pairs = list(zip(dense.blocks, pruned.blocks, strict=True))
    narrower = {
        block.hidden
        for block, other in pairs
        if isinstance(block, Mlp) and other.width != block.width
    }
    return [
        (block, other)
        for block, other in pairs
        if axes_of(block) not in {(), ("vo",)}
        and narrower.isdisjoint(_entries(block))
        and not (isinstance(block, Mlp) and _narrows_output(block, other))
    ]


def _narrows_output(block: Mlp, other: Block) -> bool:
    """Whether the down projection is the up projection of another block that was cut."""
    return isinstance(other, Mlp) and other.down.width_out != block.down.width_out


@runtime_checkable
class _Meter(Protocol):
    """Compares a block, or several of the same weights, before and after, batch by batch."""

    def add(self, block: Block, other: Block, before: Batch, after: Batch) -> None: ...

    def error(self) -> float: ...


@dataclass(slots=True)
class _MlpMeter:
    """``Σ‖ŷ - y‖² / Σ‖y - mean(y)‖²`` over the outputs ``y`` of the down projection."""

    lost: float = 0.0
    energy: float = 0.0
    count: int = 0
    total: np.ndarray | float = 0.0

    def add(self, block: Block, other: Block, before: Batch, after: Batch) -> None:
        dense, pruned = (_output(one, batch) for one, batch in ((block, before), (other, after)))
        rows = seen_rows(block.padding, dense, before)
        y, z = _vectors(dense)[rows], _vectors(pruned)[rows]
        self.lost += float(np.square(z - y).sum())
        self.energy += float(np.square(y).sum())
        self.total = self.total + y.sum(axis=0)
        self.count += len(y)

    def error(self) -> float:
        if self.lost <= ROUNDING**2 * self.energy:
            return 0.0
        spread = self.energy - float(np.square(self.total).sum()) / max(self.count, 1)
        return share(self.lost, spread)


@dataclass(slots=True)
class _LogitMeter:
    """``‖Q Kᵀ - Q̂ K̂ᵀ‖² / ‖Q Kᵀ‖²`` over all pairs of tokens, from Grams of every head."""

    key_heads: np.ndarray
    grams: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, block: Block, other: Block, before: Batch, after: Batch) -> None:
        for role, route, narrow in _operands(block, other):
            tensor = channels_last(route, before[route.linear.output])
            rows = seen_rows(block.padding, tensor, before)
            x = operand(route, tensor)[rows].astype(np.float64)
            small = channels_last(narrow, after[narrow.linear.output])
            y = operand(narrow, small)[rows].astype(np.float64)
            for name, (a, b) in {"xx": (x, x), "yx": (y, x), "yy": (y, y)}.items():
                product = np.einsum("nhi,nhj->hij", a, b, optimize=True)
                self.grams[role + name] = self.grams.get(role + name, 0.0) + product

    def error(self) -> float:
        dense, cross, pruned = (
            float(np.vdot(self.grams[f"q{kind}"], self.grams[f"k{kind}"][self.key_heads]))
            for kind in ("xx", "yx", "yy")
        )
        return share(max(dense - 2 * cross + pruned, 0.0), dense)


def _meter(block: Block) -> _Meter:
    return _MlpMeter() if isinstance(block, Mlp) else _LogitMeter(block.key_heads)


def _output(block: Block, tensors: Batch) -> np.ndarray:
    """What an MLP gives back, channels last."""
    assert isinstance(block, Mlp), "both catalogs list the same blocks"
    return np.moveaxis(tensors[block.down.output], block.down.axis, -1)


def _operands(block: Block, other: Block) -> list[tuple[str, Route, Route]]:
    """Query and key of both blocks."""
    assert isinstance(block, Attention), "an MLP has its own meter"
    assert isinstance(other, Attention), "both catalogs list the same blocks"
    routes = [("q", block.query, other.query), ("k", block.key, other.key)]
    return [(role, a, b) for role, a, b in routes if a is not None and b is not None]


def _entries(block: Block) -> list[str]:
    """The tensors through which activations enter a block."""
    return list(dict.fromkeys(linear.input for linear in _first_layers(block)))


def _first_layers(block: Block) -> list[Linear]:
    if isinstance(block, Mlp):
        return [source.linear for source in block.sources]
    return [route.linear for route in (block.query, block.key) if route is not None]


def _reads(block: Block) -> list[str]:
    """The tensors to compare, and the mask that says which rows count."""
    mask = [block.padding.tensor] if block.padding else []
    if isinstance(block, Mlp):
        return [block.down.output, *mask]
    return [*(linear.output for linear in _first_layers(block)), *mask]


def _vectors(tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(-1, tensor.shape[-1]).astype(np.float64)
