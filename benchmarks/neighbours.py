"""How well vectors of a frozen encoder sort samples into classes: nearest neighbours by cosine."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def accuracy(
    gallery: Float[np.ndarray, "n d"],
    gallery_labels: Int[np.ndarray, " n"],
    query: Float[np.ndarray, "m d"],
    query_labels: Int[np.ndarray, " m"],
    *,
    neighbours: int,
) -> float:
    """Share of queries whose class wins the vote of their nearest gallery vectors.

    A tie goes to the class whose neighbours are more alike.

    >>> east_north = np.eye(2)
    >>> accuracy(east_north, np.array([0, 1]), np.array([[5.0, 1.0]]), np.array([0]), neighbours=1)
    1.0
    """
    cosine = _unit(query) @ _unit(gallery).T
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :neighbours]
    votes = np.zeros((len(query), int(gallery_labels.max()) + 1))
    rows = np.arange(len(query))
    for column in nearest.T:
        # Cosines are at most 1: together they decide a tie and nothing else.
        np.add.at(
            votes, (rows, gallery_labels[column]), 1 + cosine[rows, column] / (2 * neighbours)
        )
    return float((votes.argmax(axis=1) == query_labels).mean())


def _unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    exact = vectors.astype(np.float64)
    units: np.ndarray = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    return units
