"""Slow, obvious references: from raw data, one formula at a time, by generic solvers."""

from __future__ import annotations

import numpy as np


def two_pass(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scatter of ``x [n, d]`` in float64: first the mean, then the rest."""
    exact = x.astype(np.float64)
    mean = exact.sum(axis=0) / len(exact)
    return mean, sum(np.outer(row - mean, row - mean) for row in exact)


def vectors(
    rng: np.random.Generator, spectrum: np.ndarray, *, samples: int, mean: float = 3.0
) -> np.ndarray:
    """Float64 ``[n, d]`` whose covariance has exactly the given eigenvalues."""
    width = len(spectrum)
    noise = rng.standard_normal((samples, width))
    orthonormal, _ = np.linalg.qr(noise - noise.mean(axis=0))
    axes, _ = np.linalg.qr(rng.standard_normal((width, width)))
    centred = np.sqrt(samples) * (orthonormal * np.sqrt(spectrum)) @ axes.T
    return centred + mean * rng.standard_normal(width)


def lstsq_affine(
    z: np.ndarray, kept: np.ndarray, removed: np.ndarray, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    """``B`` and ``c`` by least squares on the samples, the ridge as extra rows."""
    centred = z - z.mean(axis=0)
    absolute = ridge * (centred**2).sum() / z.size
    pull = np.sqrt(len(z) * absolute) * np.eye(len(kept))
    rows = np.vstack([centred[:, kept], pull])
    targets = np.vstack([centred[:, removed], np.zeros((len(kept), len(removed)))])
    weight, *_ = np.linalg.lstsq(rows, targets, rcond=None)
    return weight, z[:, removed].mean(axis=0) - z[:, kept].mean(axis=0) @ weight


def kronecker_bilinear(
    left: np.ndarray, right: np.ndarray, target: np.ndarray, ridge: float
) -> np.ndarray:
    """``G M H + λM = C`` as one linear system of ``r²`` unknowns."""
    system = np.kron(right.T, left) + ridge * np.eye(target.size)
    solution = np.linalg.solve(system, target.flatten(order="F"))
    return solution.reshape(target.shape, order="F")


def squared_error(actual: np.ndarray, expected: np.ndarray, *, centre: bool) -> float:
    """``‖actual - expected‖²`` over ``‖expected‖²``, or over its variance."""
    scale = expected - expected.mean(axis=0) if centre else expected
    return float(((actual - expected) ** 2).sum() / (scale**2).sum())


def eliminated_one_by_one(
    covariance: np.ndarray, weight: np.ndarray, ridge: float, keep: int
) -> tuple[list[int], list[float]]:
    """Try every removal in turn by solving for what stays: order, and what each adds."""
    width = len(covariance)
    system = covariance + ridge * np.trace(covariance) / width * np.eye(width)

    def left_with(kept: list[int]) -> float:
        removed = [j for j in range(width) if j not in kept]
        lost = system[np.ix_(removed, removed)]
        if kept:
            cross = system[np.ix_(kept, removed)]
            lost = lost - cross.T @ np.linalg.solve(system[np.ix_(kept, kept)], cross)
        return float(np.trace(weight[removed].T @ lost @ weight[removed]))

    kept, order, costs, before = list(range(width)), [], [], 0.0
    while len(kept) > keep:
        errors = {j: left_with([i for i in kept if i != j]) for j in kept}
        chosen = min(errors, key=errors.__getitem__)
        kept.remove(chosen)
        order.append(chosen)
        costs.append(errors[chosen] - before)
        before = errors[chosen]
    return order, costs


def lstsq_fit(
    features: np.ndarray, target: np.ndarray, start: np.ndarray, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias by least squares on samples, an absolute ridge towards ``start`` as rows."""
    f, t = features - features.mean(axis=0), target - target.mean(axis=0)
    pull = np.sqrt(len(f) * ridge) * np.eye(f.shape[1])
    change, *_ = np.linalg.lstsq(
        np.vstack([f, pull]), np.vstack([t - f @ start, np.zeros_like(start)]), rcond=None
    )
    weight = start + change
    return weight, target.mean(axis=0) - features.mean(axis=0) @ weight
