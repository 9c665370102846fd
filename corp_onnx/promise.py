"""What each block of the smaller model really does, given the dense model's own inputs to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from corp_onnx.blocks import Attention, Block, Catalog, Mlp, axes_of
from corp_onnx.blocks.records import Linear, Route
from corp_onnx.calibrate import exposed
from corp_onnx.graph import Model
from corp_onnx.masks import seen_rows
from corp_onnx.session import Runtime, open_session
from corp_onnx.sites import operand
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
    beginning of the other, are left out: what passes between them is narrower now.
    """
    pairs = _measurable(dense_catalog, pruned_catalog)
    if not pairs:
        return {}
    entries = list(dict.fromkeys(name for block, _ in pairs for name in _entries(block)))
    whole = open_session(
        exposed(dense, [*entries, *(name for block, _ in pairs for name in _reads(block))]), runtime
    )
    parts = open_session(
        _cut_open(pruned, entries, [name for _, other in pairs for name in _reads(other)]), runtime
    )
    meters = {block.id: _meter(block, other) for block, other in pairs}
    for batch in batches:
        before = whole.run(batch)
        after = parts.run({**batch, **before})
        for meter in meters.values():
            meter.add(before, after)
    return {name: meter.error() for name, meter in meters.items()}


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
    """Compares one block before and after, batch by batch."""

    def add(self, before: Batch, after: Batch) -> None: ...

    def error(self) -> float: ...


@dataclass(slots=True)
class _MlpMeter:
    """``Σ‖ŷ - y‖² / Σ‖y - mean(y)‖²`` over the outputs ``y`` of the down projection."""

    block: Mlp
    other: Mlp
    lost: float = 0.0
    energy: float = 0.0
    count: int = 0
    total: np.ndarray | float = 0.0

    def add(self, before: Batch, after: Batch) -> None:
        name = self.block.down.output
        rows = seen_rows(self.block.padding, before[name], before)
        y, z = (
            _vectors(batch[out])[rows]
            for batch, out in ((before, name), (after, self.other.down.output))
        )
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

    block: Attention
    other: Attention
    grams: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, before: Batch, after: Batch) -> None:
        for role, route, narrow in _operands(self.block, self.other):
            tensor = before[route.linear.output]
            rows = seen_rows(self.block.padding, tensor, before)
            x = operand(route, tensor)[rows].astype(np.float64)
            y = operand(narrow, after[narrow.linear.output])[rows].astype(np.float64)
            for name, (a, b) in {"xx": (x, x), "yx": (y, x), "yy": (y, y)}.items():
                product = np.einsum("nhi,nhj->hij", a, b, optimize=True)
                self.grams[role + name] = self.grams.get(role + name, 0.0) + product

    def error(self) -> float:
        dense, cross, pruned = (
            float(np.einsum("hij,hij->", self.grams[f"q{kind}"], self.grams[f"k{kind}"]))
            for kind in ("xx", "yx", "yy")
        )
        return share(max(dense - 2 * cross + pruned, 0.0), dense)


def _meter(block: Block, other: Block) -> _Meter:
    if isinstance(block, Mlp):
        assert isinstance(other, Mlp), "both catalogs list the same blocks"
        return _MlpMeter(block, other)
    assert isinstance(other, Attention), "both catalogs list the same blocks"
    return _LogitMeter(block, other)


def _operands(block: Attention, other: Attention) -> list[tuple[str, Route, Route]]:
    """Query and key of both blocks."""
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


def _cut_open(model: Model, entries: list[str], outputs: list[str]) -> Model:
    """The graph with tensors fed from outside instead of being computed."""
    graph = model.graph.copy()
    by_name = graph.tensors()
    inputs = list(graph.inputs)
    for name in entries:
        tensor = by_name[name]
        if not any(tensor is known for known in inputs):
            tensor.inputs.clear()
            tensor.dtype = tensor.dtype or np.dtype(np.float32)
            inputs.append(tensor)
    graph.inputs = inputs
    graph.outputs = [by_name[name] for name in dict.fromkeys(outputs)]
    graph.cleanup(remove_unused_graph_inputs=True).toposort()
    return model.with_graph(graph)


def _vectors(tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(-1, tensor.shape[-1]).astype(np.float64)
