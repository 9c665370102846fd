"""What solving hands to surgery: new weights in float64, and how good they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float64, Int64


@dataclass(frozen=True, slots=True)
class Evidence:
    """How well the kept part of an axis stands in for the rest, on the calibration data."""

    unexplained: float
    """Share of what was removed that the kept part does not explain: 0 is perfect."""
    condition: float
    """Condition number of the system that was solved."""
    error: float
    """Predicted relative squared error: of the block's output (MLP, value-output) or its logits
    (query-key). Of a block that was fitted to the dense stream, of what it adds to that stream."""
    unseen: float | None = None
    """The same on samples that the fit has not seen, where some were held out of it."""


EXACT = Evidence(0.0, 1.0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class MlpFold:
    """Kept hidden channels, and the down projection that makes up for the others."""

    axis: ClassVar[str | None] = "mlp"
    block: str
    kept: Int64[np.ndarray, " k"]
    weight: Float64[np.ndarray, "k o"]
    bias: Float64[np.ndarray, " o"]
    evidence: Evidence


@dataclass(frozen=True, slots=True, eq=False)
class QueryKeyFold:
    """Maps of every head's query and key: ``q ← q A``, ``k ← k B``, weights and biases alike."""

    axis: ClassVar[str | None] = "qk"
    block: str
    query: Float64[np.ndarray, "h e r"]
    key: Float64[np.ndarray, "g e r"]
    evidence: Evidence
    positions: Int64[np.ndarray, " r"] | None = None
    """The position within a head by whose angle each channel is turned; None where none is."""


@dataclass(frozen=True, slots=True, eq=False)
class ValueOutputFold:
    """Maps of every head's value, ``v ← v P``, and the output projection behind them."""

    axis: ClassVar[str | None] = "vo"
    block: str
    value: Float64[np.ndarray, "g e r"]
    weight: Float64[np.ndarray, "h r o"]
    bias: Float64[np.ndarray, " o"]
    evidence: Evidence


@dataclass(frozen=True, slots=True, eq=False)
class OutputFold:
    """A new output projection for an attention whose values stay as they are."""

    axis: ClassVar[str | None] = None
    block: str
    weight: Float64[np.ndarray, "d o"]
    bias: Float64[np.ndarray, " o"]
    evidence: Evidence


Fold = MlpFold | QueryKeyFold | ValueOutputFold | OutputFold


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """The folds of every cut, in the order of the plan."""

    method: str
    folds: tuple[Fold, ...]
    in_sequence: bool = False
    """Whether every block was fitted behind those before it, as they were cut."""

    def of(self, block: str, axis: str) -> Fold:
        """The fold of one cut."""
        return next(fold for fold in self.folds if (fold.block, fold.axis) == (block, axis))
