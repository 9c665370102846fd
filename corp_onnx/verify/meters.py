"""Errors of blocks, summed up batch by batch: outputs, streams, logits."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from corp_onnx.blocks import Attention, Block
from corp_onnx.blocks.records import Mask, Route
from corp_onnx.calibration.masks import seen_rows
from corp_onnx.calibration.sequences import centred, sequence_axis
from corp_onnx.calibration.sites import channels_last, operand
from corp_onnx.data.batching import Batch
from corp_onnx.sequential.emphasis import Emphasis
from corp_onnx.sequential.streams import last_layer
from corp_onnx.solve.affine import share

ROUNDING = 1e-6
"""Relative error that float32 alone makes: an output that never varies has nothing else."""


@runtime_checkable
class Meter(Protocol):
    """Compares a block, or several of the same weights, before and after, batch by batch."""

    def add(self, block: Block, other: Block, before: Batch, after: Batch) -> None:
        """Add a batch: what flows through the dense block and through the other."""
        ...

    def error(self) -> float:
        """The relative squared error."""
        ...


class OutputMeter:
    """``Σ‖ŷ - y‖² / Σ‖y - mean(y)‖²`` over the outputs ``y`` of the last layer of a block."""

    __slots__ = ("_count", "_energy", "_lost", "_rounding", "_total")

    def __init__(self, rounding: float = ROUNDING) -> None:
        """Start with nothing; what rounds by so much of an output counts for nothing."""
        self._count, self._lost, self._energy, self._rounding = 0, 0.0, 0.0, rounding
        self._total: np.ndarray | float = 0.0

    def add(self, block: Block, other: Block, before: Batch, after: Batch) -> None:
        """Add what the last layer gives in both."""
        dense, pruned = (_output(one, batch) for one, batch in ((block, before), (other, after)))
        rows = seen_rows(block.padding, dense, before)
        self.compare(_vectors(dense)[rows], _vectors(pruned)[rows])

    def compare(self, y: np.ndarray, z: np.ndarray) -> None:
        """Add vectors ``z`` that should be ``y``, both ``[n, o]``."""
        self._lost += float(np.square(z - y, dtype=np.float64).sum())
        self._energy += float(np.square(y, dtype=np.float64).sum())
        self._total = self._total + y.sum(axis=0, dtype=np.float64)
        self._count += len(y)

    def mixed(self, other: OutputMeter, share: float) -> OutputMeter:
        """Of the means of both, with so large a share for the other."""
        both, mine, its = OutputMeter(), (1.0 - share) / self._count, share / other._count
        both._count = 1
        both._lost = mine * self._lost + its * other._lost
        both._energy = mine * self._energy + its * other._energy
        both._total = mine * self._total + its * other._total
        return both

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added."""
        return self._count == 0

    def error(self) -> float:
        """The relative squared error of what was added."""
        if self._lost <= self._rounding**2 * self._energy:
            return 0.0
        spread = self._energy - float(np.square(self._total).sum()) / max(self._count, 1)
        return share(self._lost, spread)


class StreamMeter:
    """The same of all tokens, and of those that count more."""

    __slots__ = ("_emphasis", "_every", "_read")

    def __init__(self, emphasis: Emphasis | None) -> None:
        """Start with nothing."""
        self._emphasis, self._every, self._read = emphasis, OutputMeter(), OutputMeter()

    def compare(
        self, y: np.ndarray, z: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]
    ) -> None:
        """Add the ``rows`` of tokens of some shape."""
        self._every.compare(y[rows], z[rows])
        if self._emphasis is not None:
            few = self._emphasis.rows(shape, rows)
            self._read.compare(y[few], z[few])

    def error(self) -> float:
        """The relative squared error, tokens that count more with their weight."""
        if self._emphasis is None or self._read.is_empty:
            return self._every.error()
        return self._every.mixed(self._read, self._emphasis.share).error()


class LogitMeter:
    """``‖Q Kᵀ - Q̂ K̂ᵀ‖² / ‖Q Kᵀ‖²`` over all pairs of tokens, from Grams of every head."""

    __slots__ = ("_grams", "_key_heads", "_without_row_constants")

    def __init__(self, key_heads: np.ndarray, without_row_constants: bool) -> None:
        """Start with nothing."""
        self._key_heads, self._without_row_constants = key_heads, without_row_constants
        self._grams: dict[str, np.ndarray] = {}

    def add(self, block: Block, other: Block, before: Batch, after: Batch) -> None:
        """Add queries and keys of both."""
        for role, route, narrow, mask in _operands(block, other):
            tensor = channels_last(route, before[route.linear.output])
            rows = seen_rows(mask, tensor, before)
            x = operand(route, tensor, before)[rows].astype(np.float64)
            small = channels_last(narrow, after[narrow.linear.output])
            y = operand(narrow, small, after)[rows].astype(np.float64)
            if self._without_row_constants and role == "k":
                axis = sequence_axis(route)
                x, y = (centred(heads, rows, tensor.shape[:-1], axis) for heads in (x, y))
            for name, (a, b) in {"xx": (x, x), "yx": (y, x), "yy": (y, y)}.items():
                product = np.einsum("nhi,nhj->hij", a, b, optimize=True)
                self._grams[role + name] = self._grams.get(role + name, 0.0) + product

    def error(self) -> float:
        """The relative squared error over all pairs of tokens that were added."""
        dense, cross, pruned = (
            float(np.vdot(self._grams[f"q{kind}"], self._grams[f"k{kind}"][self._key_heads]))
            for kind in ("xx", "yx", "yy")
        )
        return share(max(dense - 2 * cross + pruned, 0.0), dense)


def _output(block: Block, tensors: Batch) -> np.ndarray:
    """What a block gives back, channels last."""
    linear = last_layer(block)
    assert linear is not None, f"{block.id} has a last layer"
    return np.moveaxis(tensors[linear.output], linear.axis, -1)


def _operands(block: Block, other: Block) -> list[tuple[str, Route, Route, Mask | None]]:
    """Query and key of both blocks, and which of their tokens are padding."""
    assert isinstance(block, Attention), "an MLP has its own meter"
    assert isinstance(other, Attention), "both catalogs list the same blocks"
    routes = [
        ("q", block.query, other.query, block.padding),
        ("k", block.key, other.key, block.key_padding),
    ]
    return [(role, a, b, mask) for role, a, b, mask in routes if a is not None and b is not None]


def _vectors(tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(-1, tensor.shape[-1]).astype(np.float64)
