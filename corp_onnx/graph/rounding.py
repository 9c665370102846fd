"""What rounding to a narrower type takes of an array."""

from __future__ import annotations

import numpy as np

MOST_SQUARED_ERROR = 1e-4
"""Of a constant, relative, that rounding it may cause; beyond it, its small numbers vanish."""


def squared_error(values: np.ndarray, dtype: np.dtype) -> float:
    """``Σ (x - x̂)² / Σ x²`` of the finite numbers; infinite where the type cannot hold one.

    >>> squared_error(np.array([1.0, 1e-9]), np.dtype(np.float16)) < MOST_SQUARED_ERROR
    True
    >>> squared_error(np.array([1e-9]), np.dtype(np.float16))
    1.0
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.any():
        return 0.0
    with np.errstate(over="ignore"):
        rounded = finite.astype(dtype).astype(np.float64)
    if not np.isfinite(rounded).all():
        return float("inf")
    return float(np.square(finite - rounded).sum() / np.square(finite).sum())
