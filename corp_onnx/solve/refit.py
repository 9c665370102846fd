"""A block's last layer, fitted to what the dense model had there, as far as the data support it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace
from jaxtyping import Float64

from corp_onnx.calibration.moments import read_only
from corp_onnx.device import Array, to_host
from corp_onnx.solve.affine import share
from corp_onnx.solve.algebra import inner, ridged, solve_definite
from corp_onnx.solve.joint import Joint, merged

STRENGTHS: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Ridges that are tried, as shares of the mean variance of the features."""

STEPS: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
"""How much of the correction is taken."""

ROUNDING = 1e-6
"""Share of the target's variance that cannot be told from nothing: moments are float32 products."""

Start = Callable[[Joint], Callable[[float], Float64[Array, "k o"]]]
"""From what all features say to the folded weight at any ridge."""

Choice = tuple[float, float]
"""A ridge and a step; ``NO_REFIT`` takes no step."""

NO_REFIT: Choice = (np.inf, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Refit:
    """A layer's new weight and bias, and how far to trust them.

    Attributes:
        weight: ``W``, for the features that are left.
        bias: ``b``.
        start: ``W₀``.
        ridge: That of ``W₀`` which did best on samples held out.
        choice: The ridge of the fit and the step that did best there.
        seen: Squared error on the calibration samples over the variance of the target.
        unseen: The same on samples held out of the fit; None where none were.
    """

    weight: Float64[np.ndarray, "k o"]
    bias: Float64[np.ndarray, " o"]
    start: Float64[np.ndarray, "k o"]
    ridge: float
    choice: Choice
    seen: float
    unseen: float | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", read_only(self.weight))
        object.__setattr__(self, "bias", read_only(self.bias))
        object.__setattr__(self, "start", read_only(self.start))


def refit(
    parts: Sequence[Joint],
    narrow: Callable[[Joint], Joint],
    start: Start,
    ridges: Sequence[float] = (0.0,),
) -> Refit:
    r"""Fit a layer to its target, with a ridge towards its folded weight.

    With ``C`` the covariance of the kept features ``f`` and ``t`` the target::

        ΔW = (C + λI)⁻¹ (Cov(f, t) - C W₀)        W = W₀ + β ΔW        b = E[t] - E[f] W

    First the ridge of ``W₀`` is chosen, then ``λ`` (relative to the mean variance) and ``β``: those
    that do best on each part of the samples when fitted to the others. With all samples ``λ`` is
    smaller by as much as they are more. No refit is one of the choices, and the only one if there
    is but one part, or if the folded weight leaves nothing but rounding to correct.

    Source: ours; ridge regression (Hoerl & Kennard 1970) towards a weight that is not 0, its
    strength by cross-validation (Stone 1974).

    Args:
        parts: Moments of disjoint sets of samples, with different pictures or texts in each.
        narrow: From what all features say to what those say that stay.
        start: ``W₀``, out of what all features say.
        ridges: To choose from for ``W₀``; the first where there is nothing to choose by.

    >>> from corp_onnx.calibration.moments import Moments
    >>> x, e = np.arange(8.0)[:, None] % 5, np.array([[0.1], [-0.1]] * 4)
    >>> t = 3.0 * x + 1.0 + e
    >>> parts = [Joint.of(Moments.of(np.hstack([x, t])[at::2]), 1) for at in (0, 1)]
    >>> fitted = refit(parts, lambda joint: joint, lambda joint: lambda ridge: np.array([[2.0]]))
    >>> fitted.weight.round(1), fitted.bias.round(1)
    (array([[3.]]), array([1.]))
    """
    whole, ridge = merged(parts), ridges[0]
    if len(parts) == 1:
        return _fitted(narrow(whole), start(whole)(ridge), ridge, NO_REFIT, None)
    others = [merged([part for part in parts if part is not held]) for held in parts]
    pairs = [(narrow(held), narrow(train)) for held, train in zip(parts, others, strict=True)]
    folds = [start(train) for train in others]
    folded = {ridge: [fold(ridge) for fold in folds] for ridge in ridges}
    lost = {
        ridge: sum(_error(*pair, each) for pair, each in zip(pairs, starts, strict=True))
        for ridge, starts in folded.items()
    }
    spread = sum(part.total for part in parts)
    if lost[ridge] <= ROUNDING * spread:
        unseen = share(lost[ridge], spread)
        return _fitted(narrow(whole), start(whole)(ridge), ridge, NO_REFIT, unseen)
    ridge = min(lost, key=lost.__getitem__)
    trials = [_trials(*pair, each) for pair, each in zip(pairs, folded[ridge], strict=True)]
    totals = {choice: sum(trial[choice] for trial in trials) for choice in trials[0]}
    best = min(totals, key=totals.__getitem__)
    unseen, shrink = share(totals[best], spread), others[0].count / whole.count
    return _fitted(narrow(whole), start(whole)(ridge), ridge, best, unseen, shrink=shrink)


def _error(held: Joint, train: Joint, weight: Float64[Array, "k o"]) -> float:
    """The error of a weight on samples that it was not made from."""
    return held.error(weight, train.bias(weight))


def _trials(held: Joint, train: Joint, start: Float64[Array, "k o"]) -> dict[Choice, float]:
    """The error of every choice on samples that it was not fitted to.

    Along a step ``β`` the error is a parabola, known from one product with ``ΔW``.
    """
    nothing = _error(held, train, start)
    slope = held.within @ start - held.cross
    shift = held.bias(start) - train.bias(start)
    errors = {NO_REFIT: nothing}
    for strength in STRENGTHS:
        change = _correction(train, start, strength)
        moved = (train.mean - held.mean) @ change
        linear = 2.0 * (inner(change, slope) + inner(shift, moved))
        square = inner(change, held.within @ change) + inner(moved, moved)
        for step in STEPS:
            errors[strength, step] = nothing + step * linear + step**2 * square
    return errors


def _fitted(
    whole: Joint,
    start: Float64[Array, "k o"],
    ridge: float,
    choice: Choice,
    unseen: float | None,
    *,
    shrink: float = 1.0,
) -> Refit:
    """The fit to all samples; more of them than a choice was made with need less of a ridge."""
    strength, step = choice
    weight = start + step * _correction(whole, start, shrink * strength) if step else start
    bias = whole.bias(weight)
    seen = share(whole.error(weight, bias), whole.total)
    return Refit(to_host(weight), to_host(bias), to_host(start), ridge, choice, seen, unseen)


def _correction(
    joint: Joint, start: Float64[Array, "k o"], strength: float
) -> Float64[Array, "k o"]:
    """``ΔW`` at a ridge; zero where no feature varies."""
    xp = array_namespace(joint.within)
    ridge = strength * float(xp.linalg.trace(joint.within)) / joint.mean.shape[0]
    if ridge <= 0.0:
        return xp.zeros_like(start)
    change, _ = solve_definite(ridged(joint.within, ridge), joint.cross - joint.within @ start)
    return change
