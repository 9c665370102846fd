"""Which MLP channels go: one after the other, always the one that repair replaces best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64
from scipy import linalg

from corp_onnx.errors import IllConditioned
from corp_onnx.moments import read_only

LAZY = 64
"""Removals that are carried out together on the whole matrix."""

NEVER_VARIES = 1e-12
"""Share of the mean variance below which a channel is a constant, and goes first."""


@dataclass(frozen=True, slots=True, eq=False)
class Elimination:
    """The order in which channels go, and what each of them adds to the error.

    Attributes:
        order: Channels, the first to go first.
        costs: What the removal of each adds to the expected squared error of the output, with
            all kept channels standing in as well as they can; λ is part of it.
        total: Expected squared output around its mean: all costs are shares of it.
    """

    order: Int64[np.ndarray, " p"]
    costs: Float64[np.ndarray, " p"]
    total: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", read_only(self.order))
        object.__setattr__(self, "costs", read_only(self.costs))

    def kept(self, width: int, count: int) -> Int64[np.ndarray, " k"]:
        """The ``count`` channels of ``width`` that stay, in their order."""
        return np.setdiff1d(np.arange(width), self.order[: width - count])

    def curve(self) -> Float64[np.ndarray, " p1"]:
        """Relative error after 0, 1, 2, … removals."""
        summed = np.concatenate([[0.0], np.cumsum(self.costs)])
        curve: np.ndarray = summed / self.total if self.total else np.zeros_like(summed)
        return curve


def eliminate(
    covariance: Float64[np.ndarray, "d d"],
    weight: Float[np.ndarray, "d o"],
    *,
    ridge: float,
    keep: int = 1,
) -> Elimination:
    r"""Remove channels until ``keep`` are left, each time the one that is missed least.

    The kept channels take over what a removed one did, as well as a linear map can. With
    ``H = (Σ + λI)⁻¹`` over the channels that are left and ``w_j`` row ``j`` of the weight as it is
    by then, compensated, the removal of ``j`` costs, and changes::

        cost_j = ‖w_j‖² / H_jj        W ← W - H_:j w_j / H_jj        H ← H - H_:j H_j: / H_jj

    This is the optimal brain surgeon (Hassibi & Stork 1993) for a linear layer, where its quadratic
    error is exact. Every choice is made on the weights as they are: of two equal channels one goes,
    and then the other is dear. Rows and columns are brought up to date lazily, ``LAZY`` removals at
    a time, which changes no choice.

    A channel that never varies costs nothing and goes first.

    Args:
        covariance: ``Σ`` of the hidden vector.
        weight: ``W`` of the layer that reads it; scaled by what is behind it, if that matters.
        ridge: λ as a share of the mean variance, above 0 where Σ is singular.
        keep: How many channels stay, at least.

    Raises:
        IllConditioned: If ``Σ + λI`` has no Cholesky factorisation.

    >>> sigma = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])  # 0 and 1 are equal
    >>> found = eliminate(sigma, np.ones((3, 1)), ridge=1e-9)
    >>> int(found.order[1]), found.costs.round(3)
    (2, array([0., 2.]))
    """
    width = len(covariance)
    absolute = ridge * float(np.trace(covariance)) / width
    constant = np.flatnonzero(
        np.diagonal(covariance) <= NEVER_VARIES * np.trace(covariance) / width
    )[: width - keep]
    left = np.setdiff1d(np.arange(width), constant)
    places: list[int] = []
    costs: list[float] = []
    if len(left) > keep:
        inverse = _inverse(covariance[np.ix_(left, left)], absolute)
        surgeon = _Surgeon(inverse, np.array(weight[left], np.float64))
        places, costs = surgeon.remove(len(left) - keep)
    exact = weight.astype(np.float64)
    return Elimination(
        np.concatenate([constant, left[places]]),
        np.concatenate([np.zeros(len(constant)), costs]),
        float(np.vdot(exact, covariance @ exact)),
    )


class _Surgeon:
    """``H`` and ``W`` of the channels that are left, brought up to date now and then."""

    def __init__(
        self, inverse: Float64[np.ndarray, "d d"], weight: Float64[np.ndarray, "d o"]
    ) -> None:
        self.inverse, self.weight = inverse, weight
        self.numbers = np.arange(len(weight))

    def remove(self, count: int) -> tuple[list[int], list[float]]:
        """The numbers of the channels that go, and what each costs."""
        order: list[int] = []
        costs: list[float] = []
        while len(order) < count:
            gone, cost = self._some(min(LAZY, count - len(order)))
            order += self.numbers[gone].tolist()
            costs += cost
            stay = np.ones(len(self.numbers), bool)
            stay[gone] = False
            self.numbers = self.numbers[stay]
            self.inverse = self.inverse[np.ix_(stay, stay)]
            self.weight = self.weight[stay]
        return order, costs

    def _some(self, count: int) -> tuple[list[int], list[float]]:
        """Choose ``count`` channels one by one, then bring all others up to date.

        ``columns`` holds ``H_:j / √H_jj`` of every choice as it was when its turn came, and
        ``rows`` the ``w_j / √H_jj``; what is not yet subtracted are their products.
        """
        diagonal = np.diagonal(self.inverse).copy()
        norms = np.einsum("io,io->i", self.weight, self.weight)
        columns = np.zeros((len(diagonal), count))
        rows = np.zeros((count, self.weight.shape[1]))
        gone: list[int] = []
        costs: list[float] = []
        for step in range(count):
            scores = norms / diagonal
            scores[gone] = np.inf
            chosen = int(np.argmin(scores))
            root = np.sqrt(diagonal[chosen])
            done = columns[:, :step]
            column = (self.inverse[:, chosen] - done @ done[chosen]) / root
            row = (self.weight[chosen] - done[chosen] @ rows[:step]) / root
            overlap = self.weight @ row - done @ (rows[:step] @ row)
            diagonal -= column**2
            norms += column * (column * (row @ row) - 2 * overlap)
            columns[:, step], rows[step] = column, row
            gone.append(chosen)
            costs.append(float(row @ row))
            diagonal[gone] = 1.0  # no longer asked for
            np.maximum(norms, 0.0, out=norms)
        self.inverse -= columns @ columns.T
        self.weight -= columns @ rows
        return gone, costs


def _inverse(covariance: Float64[np.ndarray, "d d"], ridge: float) -> Float64[np.ndarray, "d d"]:
    """``(Σ + λI)⁻¹``, by its Cholesky factor: here the inverse itself is what is needed."""
    system = covariance + ridge * np.eye(len(covariance))
    try:
        factor = linalg.cholesky(system, lower=True)
    except linalg.LinAlgError as error:
        raise IllConditioned(
            f"the covariance of {len(system)} channels is singular; calibrate with more samples or "
            "raise --ridge"
        ) from error
    inverse, _ = linalg.lapack.dpotri(factor, lower=1)
    whole: np.ndarray = np.tril(inverse) + np.tril(inverse, -1).T
    return whole
