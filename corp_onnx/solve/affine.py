"""Affine recovery: what kept MLP channels say about removed ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from array_api_compat import array_namespace
from jaxtyping import Float, Float64, Int

from corp_onnx.calibration.moments import Moments, read_only
from corp_onnx.device import HOST, Array, Device, beside, to_host
from corp_onnx.solve.algebra import (
    block,
    inner,
    mean_variance,
    ridged,
    rows,
    solve_definite,
    spread_out,
)

Repair = Literal["corp", "mean", "none"]
"""What stands in for removed channels: the paper's repair, their mean, or nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """Removed channels from kept ones, ``z_P ≈ z_S B + c``, and how well.

    Attributes:
        weight: ``B``.
        offset: ``c``, in activation units.
        condition: Condition number of the regularised system in the 1-norm, on
            the host as LAPACK estimates it; at most ``k`` times the usual one.
            1 if there was nothing to solve.
        unexplained: Share of the removed channels' variance that is left, 0 is
            perfect, 1 is what their mean leaves.
    """

    weight: Float64[np.ndarray, "k p"]
    offset: Float64[np.ndarray, " p"]
    condition: float
    unexplained: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", read_only(self.weight))
        object.__setattr__(self, "offset", read_only(self.offset))


@dataclass(frozen=True, slots=True, eq=False)
class Recovered:
    """A down projection for the kept channels alone, and its predicted error.

    Attributes:
        weight: Rows for the kept channels, in the order they were given.
        bias: The bias, with what the removed channels leave behind.
        condition: As in `Affine`.
        unexplained: As in `Affine`.
        error: Expected squared error of the layer's output over the variance of
            that output. Infinite if an output that never varied is now wrong.
    """

    weight: Float64[np.ndarray, "k o"]
    bias: Float64[np.ndarray, " o"]
    condition: float
    unexplained: float
    error: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", read_only(self.weight))
        object.__setattr__(self, "bias", read_only(self.bias))


def fold(
    moments: Moments, kept: Int[np.ndarray, " k"], removed: Int[np.ndarray, " p"], *, ridge: float
) -> Affine:
    r"""Best affine prediction of removed channels from kept ones.

    Minimises ``E‖z_P - z_S B - c‖² + λ‖B‖²``, whose solution is::

        B = (Σ_SS + λI)⁻¹ Σ_SP        c = μ_P - μ_S B        λ = ridge · s

    and leaves, of the removed variance, a share that is reported without λ::

        unexplained = tr(Σ_PP - 2 Bᵀ Σ_SP + Bᵀ Σ_SS B) / tr(Σ_PP)

    A channel that never varies predicts nothing; it gets a zero row of ``B``
    and does not make the system singular.

    Source: arXiv 2602.05243, affine recovery of MLP channels. There λ is a
    number in squared activation units; here it is relative to the layer's mean
    variance ``s`` (`mean_variance`), so that one value fits every layer.

    Args:
        moments: Activation moments over all ``d = k + p`` channels.
        kept: Indices that stay.
        removed: Indices that go.
        ridge: Regularisation as a share of the mean variance, at least 0.

    Raises:
        IllConditioned: If the system is singular, or its condition number
            passes `MAX_CONDITION`.
        DataError: If the moments are of no vector.

    >>> z = np.array([[0.0, 1.0], [1.0, 3.0], [2.0, 5.0]])  # z1 = 2 z0 + 1
    >>> answer = fold(Moments.of(z), np.array([0]), np.array([1]), ridge=0.0)
    >>> answer.weight.round(6), answer.offset.round(6), round(answer.unexplained, 6)
    (array([[2.]]), array([1.]), 0.0)
    """
    return _predicted(moments.mean, covariance_of(moments), kept, removed, ridge=ridge)


def mean_only(
    moments: Moments, kept: Int[np.ndarray, " k"], removed: Int[np.ndarray, " p"]
) -> Affine:
    """Every removed channel replaced by its mean: ``B = 0, c = μ_P``.

    >>> z = np.array([[0.0, 1.0], [2.0, 5.0]])
    >>> mean_only(Moments.of(z), np.array([0]), np.array([1])).offset
    array([3.])
    """
    return _constant(moments.mean[removed], covariance_of(moments), kept, removed)


def no_repair(
    moments: Moments, kept: Int[np.ndarray, " k"], removed: Int[np.ndarray, " p"]
) -> Affine:
    """Every removed channel replaced by zero: ``B = 0, c = 0``.

    ``unexplained`` counts variance, so it is that of `mean_only`; what the
    lost mean costs is in the ``error`` of `recover_mlp`.
    """
    return _constant(np.zeros(len(removed)), covariance_of(moments), kept, removed)


def recover_mlp(
    moments: Moments,
    kept: Int[np.ndarray, " k"],
    down_weight: Float[np.ndarray, "d o"],
    down_bias: Float[np.ndarray, " o"],
    *,
    repair: Repair,
    ridge: float,
    device: Device = HOST,
) -> Recovered:
    r"""The down projection that reads only kept channels.

    With ``B`` and ``c`` of the repair, removed channels are folded in::

        W ← W_S + B W_P        b ← b + c W_P

    and the error of the output follows from the same moments, without λ::

        error = E‖(z_P - z_S B - c) W_P‖² / E‖(z - μ) W‖²

    which is exact on the vectors that the moments were taken of.

    Args:
        moments: Moments of the hidden vector, all ``d`` channels.
        kept: Indices that stay; rows of the result follow their order.
        down_weight: ``W`` of ``y = z W + b``.
        down_bias: ``b``; zeros for a layer that has none.
        repair: What stands in for the removed channels.
        ridge: As in `fold`; read by ``corp`` only.
        device: Where it is computed.

    Raises:
        IllConditioned: As in `fold`.
        DataError: If the moments are of no vector.

    >>> z = np.array([[0.0, 1.0], [1.0, 3.0], [2.0, 5.0]])  # z1 = 2 z0 + 1
    >>> small = recover_mlp(
    ...     Moments.of(z), np.array([0]), np.array([[1.0], [10.0]]), np.array([0.5]),
    ...     repair="corp", ridge=0.0,
    ... )
    >>> small.weight.round(6), small.bias.round(6)
    (array([[21.]]), array([10.5]))
    """
    removed, mean = _complement(kept, moments.width), moments.mean
    covariance = device.asarray(covariance_of(moments))
    match repair:
        case "corp":
            affine = _predicted(mean, covariance, kept, removed, ridge=ridge)
        case "mean":
            affine = _constant(mean[removed], covariance, kept, removed)
        case "none":
            affine = _constant(np.zeros(len(removed)), covariance, kept, removed)

    exact = down_weight.astype(np.float64)
    dense = device.asarray(exact)
    taken_over = device.asarray(affine.weight) @ rows(dense, removed)
    shift = mean[removed] - mean[kept] @ affine.weight - affine.offset
    mean_lost = shift @ exact[removed]
    order = np.argsort(np.concatenate([kept, removed]))
    lost = rows(array_namespace(dense).concat([-taken_over, rows(dense, removed)]), order)
    return Recovered(
        to_host(rows(dense, kept) + taken_over),
        down_bias + affine.offset @ exact[removed],
        affine.condition,
        affine.unexplained,
        share(
            inner(lost, covariance @ lost) + float(mean_lost @ mean_lost),
            inner(dense, covariance @ dense),
        ),
    )


def share(part: float, whole: float) -> float:
    """``part / whole`` of two sums of squares; 0 of nothing is 0, more is infinite."""
    part = max(part, 0.0)  # a square that rounding took below zero
    if part == 0.0:
        return 0.0
    return part / whole if whole > 0.0 else np.inf


def covariance_of(moments: Moments) -> Float64[np.ndarray, "d d"]:
    """The covariance, zero for channels that vary by no more than float64 rounds their mean."""
    covariance = moments.covariance
    rounding = 64 * np.finfo(np.float64).eps * moments.mean
    constant = moments.variance <= rounding**2
    covariance[constant] = 0.0
    covariance[:, constant] = 0.0
    return covariance


def _predicted(
    mean: Float64[np.ndarray, " d"],
    covariance: Float64[Array, "d d"],
    kept: Int[np.ndarray, " k"],
    removed: Int[np.ndarray, " p"],
    *,
    ridge: float,
) -> Affine:
    """`fold`, where the covariance is."""
    xp = array_namespace(covariance)
    varying = to_host(xp.linalg.diagonal(covariance))[kept] > 0.0
    weight, condition = beside(np.zeros((len(kept), len(removed))), covariance), 1.0
    if varying.any() and len(removed):
        absolute = ridge * mean_variance(covariance)
        system = ridged(block(covariance, kept[varying], kept[varying]), absolute)
        answer, condition = solve_definite(system, block(covariance, kept[varying], removed))
        weight = spread_out(answer, varying)
    unexplained = _unexplained(covariance, kept, removed, weight)
    exact = to_host(weight)
    return Affine(exact, mean[removed] - mean[kept] @ exact, condition, unexplained)


def _constant(
    offset: Float64[np.ndarray, " p"],
    covariance: Float64[Array, "d d"],
    kept: Int[np.ndarray, " k"],
    removed: Int[np.ndarray, " p"],
) -> Affine:
    """Removed channels replaced by numbers."""
    weight = np.zeros((len(kept), len(removed)))
    left = _unexplained(covariance, kept, removed, beside(weight, covariance))
    return Affine(weight, offset, condition=1.0, unexplained=left)


def _complement(kept: Int[np.ndarray, " k"], width: int) -> Int[np.ndarray, " p"]:
    removed = np.setdiff1d(np.arange(width), kept)
    assert len(kept) + len(removed) == width, "kept channels repeat, or are not in the layer"
    return removed


def _unexplained(
    covariance: Float64[Array, "d d"],
    kept: Int[np.ndarray, " k"],
    removed: Int[np.ndarray, " p"],
    weight: Float64[Array, "k p"],
) -> float:
    """Share of the removed variance that ``weight`` leaves; true for any ``weight``."""
    cross = block(covariance, kept, removed)
    missed = block(covariance, kept, kept) @ weight - cross  # λB at the optimum: small
    total = float(to_host(array_namespace(cross).linalg.diagonal(covariance))[removed].sum())
    return share(total - inner(weight, cross) + inner(weight, missed), total)
