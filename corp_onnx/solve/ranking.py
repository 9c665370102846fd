"""Which channels to keep, by the paper's rankings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import numpy as np
from jaxtyping import Float, Float64, Int

from corp_onnx.calibration.moments import Moments
from corp_onnx.errors import PlanError

Norms = Sequence[Float64[np.ndarray, "*h c"]]
Ranking = Callable[[Float64[np.ndarray, "*h c"], Norms], Float64[np.ndarray, "*h c"]]


def _energy(energies: Float64[np.ndarray, "*h c"], norms: Norms) -> Float64[np.ndarray, "*h c"]:
    """The energies alone."""
    return energies


def _energy_norm(
    energies: Float64[np.ndarray, "*h c"], norms: Norms
) -> Float64[np.ndarray, "*h c"]:
    """The energies times the norm of every weight vector that carries the channel."""
    return energies * prod(norms)


RANKINGS: Mapping[str, Ranking] = {"energy": _energy, "energy-norm": _energy_norm}
"""What ``--ranking`` may name; `score` says what each means."""


def score(
    ranking: str, energies: Float64[np.ndarray, "*h c"], norms: Norms = ()
) -> Float64[np.ndarray, "*h c"]:
    r"""How much every channel ``j`` matters, larger is more.

    ::

        energy         e_j
        energy-norm    e_j · Π ‖w_j‖

    For an MLP ``e_j = E[z_j²]``, and the weights are the column of the up
    projection and the row of the down projection. A gated MLP has two columns
    that make the channel, gate and up: both norms count, which the paper, that
    has no gated model, leaves open. For query-key ``e_j = E[q_j² k_j²]``, query
    and key of the same token, per head, and the weights are the columns of the
    query and of the key projection. Query heads that share a key head count
    together: their energies are added, their columns one above the other.

    Source: arXiv 2602.05243, the rankings.

    Args:
        ranking: A name of `RANKINGS`.
        energies: ``e_j``, as `channel_energy` or the calibration gives them.
        norms: ``‖w_j‖``, one array per weight; ignored by ``energy``.

    Raises:
        PlanError: If there is no ranking of that name.

    >>> score("energy-norm", np.array([1.0, 2.0]), [np.array([3.0, 1.0]), np.array([1.0, 0.5])])
    array([3., 1.])
    """
    if ranking not in RANKINGS:
        raise PlanError(f"no ranking is called {ranking!r}; choose one of {', '.join(RANKINGS)}")
    return RANKINGS[ranking](energies, norms)


def channel_energy(moments: Moments) -> Float64[np.ndarray, "*h d"]:
    """``E[z_j²]`` of every channel: its variance plus its squared mean.

    Raises:
        DataError: If the moments are of no vector.

    >>> channel_energy(Moments.of(np.array([[1.0, 0.0], [3.0, 2.0]])))
    array([5., 2.])
    """
    energy: np.ndarray = moments.variance + moments.mean**2
    return energy


def column_norms(weight: Float[np.ndarray, "d o"]) -> Float64[np.ndarray, " o"]:
    """Euclidean norm of every column: of what makes each output of a linear layer."""
    norms: np.ndarray = np.linalg.norm(weight.astype(np.float64), axis=0)
    return norms


def row_norms(weight: Float[np.ndarray, "d o"]) -> Float64[np.ndarray, " d"]:
    """Euclidean norm of every row: of what each input of a linear layer is worth."""
    return column_norms(weight.T)


def highest(scores: Float64[np.ndarray, "*h c"], keep: int) -> Int[np.ndarray, "*h k"]:
    """Indices of the ``keep`` highest scores along the last axis, ascending.

    Of equal scores the lower index wins, so that the choice is the same on
    every machine.

    Args:
        scores: Scores of ``c`` channels, each head for itself.
        keep: How many stay, ``0 <= keep <= c``.

    >>> highest(np.array([2.0, 9.0, 2.0, 5.0]), 3)
    array([0, 1, 3])
    """
    assert 0 <= keep <= scores.shape[-1]
    order = np.argsort(-scores, axis=-1, kind="stable")
    return np.sort(order[..., :keep], axis=-1)
