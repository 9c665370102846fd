"""Which MLP channels go: one after the other, always the one that repair replaces best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace
from array_api_compat import device as place_of
from jaxtyping import Float, Float64, Int64

from corp_onnx.calibration.moments import read_only
from corp_onnx.device import Array, to_host
from corp_onnx.solve.algebra import (
    block,
    inner,
    inverse_definite,
    mean_variance,
    ridged,
    row_products,
    rows,
)

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
    covariance: Float64[Array, "d d"],
    weight: Float[Array, "d o"],
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
        ridge: λ as a share of `mean_variance`, above 0 where Σ is singular.
        keep: How many channels stay, at least.

    Raises:
        IllConditioned: If ``Σ + λI`` has no Cholesky factorisation.

    >>> sigma = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])  # 0 and 1 are equal
    >>> found = eliminate(sigma, np.ones((3, 1)), ridge=1e-9)
    >>> int(found.order[1]), found.costs.round(3)
    (2, array([0., 2.]))
    """
    xp = array_namespace(covariance, weight)
    width, mean = covariance.shape[0], mean_variance(covariance)
    variances = to_host(xp.linalg.diagonal(covariance))
    constant = np.flatnonzero(variances <= NEVER_VARIES * mean)[: width - keep]
    left = np.setdiff1d(np.arange(width), constant)
    exact = xp.astype(weight, xp.float64)
    places: list[int] = []
    costs: list[float] = []
    if len(left) > keep:
        inverse = inverse_definite(ridged(block(covariance, left, left), ridge * mean))
        surgeon = _Surgeon(inverse, rows(exact, left))
        places, costs = surgeon.remove(len(left) - keep)
    return Elimination(
        np.concatenate([constant, left[places]]),
        np.concatenate([np.zeros(len(constant)), costs]),
        inner(exact, covariance @ exact),
    )


class _Surgeon:
    """``H`` and ``W`` of the channels that are left, brought up to date now and then."""

    def __init__(self, inverse: Float64[Array, "d d"], weight: Float64[Array, "d o"]) -> None:
        self.inverse, self.weight = inverse, weight
        self.numbers = np.arange(weight.shape[0])

    def remove(self, count: int) -> tuple[list[int], list[float]]:
        """The numbers of the channels that go, and what each costs."""
        order: list[int] = []
        costs: list[float] = []
        while len(order) < count:
            gone, cost = self._some(min(LAZY, count - len(order)))
            order += self.numbers[gone].tolist()
            costs += cost
            stay = np.delete(np.arange(len(self.numbers)), gone)
            self.numbers = self.numbers[stay]
            self.inverse = block(self.inverse, stay, stay)
            self.weight = rows(self.weight, stay)
        return order, costs

    def _some(self, count: int) -> tuple[list[int], list[float]]:
        """Choose ``count`` channels one by one, then bring all others up to date.

        ``columns`` holds ``H_:j / √H_jj`` of every choice as it was when its turn came, and
        ``changes`` the ``w_j / √H_jj``; what is not yet subtracted are their products.
        """
        xp, place = array_namespace(self.inverse, self.weight), place_of(self.inverse)
        diagonal = xp.asarray(xp.linalg.diagonal(self.inverse), copy=True)
        norms = row_products(self.weight, self.weight)
        columns = xp.zeros((norms.shape[0], count), dtype=xp.float64, device=place)
        changes = xp.zeros((count, self.weight.shape[1]), dtype=xp.float64, device=place)
        here = xp.ones(norms.shape, dtype=xp.bool, device=place)
        gone: list[int] = []
        costs: list[float] = []
        for step in range(count):
            chosen = int(xp.argmin(xp.where(here, norms / diagonal, xp.inf)))
            root = xp.sqrt(diagonal[chosen])
            done, rest = columns[:, :step], changes[:step, :]
            column = (self.inverse[:, chosen] - done @ done[chosen, :]) / root
            row = (self.weight[chosen, :] - done[chosen, :] @ rest) / root
            overlap = self.weight @ row - done @ (rest @ row)
            columns[:, step], changes[step, :], here[chosen] = column, row, False
            diagonal = xp.where(here, diagonal - column**2, 1.0)  # of the gone no longer asked for
            norms = xp.maximum(norms + column * (column * (row @ row) - 2 * overlap), 0.0)
            gone.append(chosen)
            costs.append(float(row @ row))
        self.inverse -= columns @ columns.T
        self.weight -= columns @ changes
        return gone, costs
