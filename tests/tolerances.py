"""How far apart two correct computations may be, derived instead of tried out."""

from __future__ import annotations

import numpy as np


def rounding(*, width: int, condition: float = 1.0, dtype: type = np.float64) -> float:
    """Relative error that rounding alone may cause: ``eps · condition · width``.

    ``width`` is the longest sum on the way, ``condition`` that of the system
    that is solved (1 for mere products).
    """
    return float(np.finfo(dtype).eps) * condition * width


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative Frobenius distance; absolute where the expected array is zero."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / (np.linalg.norm(expected) or 1.0))
