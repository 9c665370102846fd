"""Linear algebra in the namespace of its arrays; for NumPy's by BLAS and LAPACK directly.

The standard of array namespaces has no triangular solve, and cannot tell BLAS that a matrix is
symmetric. So each function here has two ways to one answer.
"""

from __future__ import annotations

import numpy as np
from array_api_compat import array_namespace, is_numpy_array
from array_api_compat import device as place_of
from jaxtyping import Bool, Float64, Int
from scipy import linalg
from scipy.linalg import lapack

from corp_onnx.device import Array, beside, to_host
from corp_onnx.errors import IllConditioned

MAX_CONDITION = 1e12
"""Beyond this, float64 leaves no more than four digits of a solution."""

OUTLYING = 1e4
"""Times the median variance: no channel counts for more in the mean."""
SOLVABLE = 1e-7
"""Share of the largest variance that the mean is taken to be at least."""


def inner(a: Float64[Array, "..."], b: Float64[Array, "..."]) -> float:
    """Sum of the products of all entries, ``tr(Aᵀ B)``."""
    xp = array_namespace(a, b)
    return float(xp.reshape(a, (-1,)) @ xp.reshape(b, (-1,)))


def row_products(a: Float64[Array, "d o"], b: Float64[Array, "d o"]) -> Float64[Array, " d"]:
    """The inner product of every row of one matrix with that of the other."""
    if is_numpy_array(a):
        return np.einsum("do,do->d", a, b)
    return array_namespace(a, b).sum(a * b, axis=1)


def column_products(a: Float64[Array, "d o"], b: Float64[Array, "d o"]) -> Float64[Array, " o"]:
    """The inner product of every column of one matrix with that of the other."""
    if is_numpy_array(a):
        return np.einsum("do,do->o", a, b)
    return array_namespace(a, b).sum(a * b, axis=0)


def rows(matrix: Float64[Array, "d *o"], numbers: Int[np.ndarray, " k"]) -> Float64[Array, "k *o"]:
    """Some rows of a matrix, or entries of a vector, in the order of their numbers."""
    if is_numpy_array(matrix):
        return matrix[numbers]
    return array_namespace(matrix).take(matrix, beside(numbers, matrix), axis=0)


def block(
    matrix: Float64[Array, "d d"], down: Int[np.ndarray, " k"], across: Int[np.ndarray, " p"]
) -> Float64[Array, "k p"]:
    """The entries where some rows and some columns meet."""
    if is_numpy_array(matrix):
        return matrix[np.ix_(down, across)]
    return array_namespace(matrix).take(rows(matrix, down), beside(across, matrix), axis=1)


def spread_out(
    some: Float64[Array, "k o"], present: Bool[np.ndarray, " d"]
) -> Float64[Array, "d o"]:
    """Rows put where they are present, and rows of zeros between them.

    >>> spread_out(np.array([[1.0], [2.0]]), np.array([True, False, True])).tolist()
    [[1.0], [0.0], [2.0]]
    """
    if is_numpy_array(some):
        whole = np.zeros((len(present), some.shape[1]))
        whole[present] = some
        return whole
    xp = array_namespace(some)
    numbers = np.where(present, np.cumsum(present) - 1, some.shape[0])
    return rows(xp.concat([some, xp.zeros_like(some[:1, :])]), numbers)


def mean_variance(covariance: Float64[Array, "d d"]) -> float:
    """``s``, what a ridge is a share of: the mean variance, outlying channels counted for less.

    ``s = Σ_j min(v_j, c m) / d``, with ``m`` the median of the variances ``v`` that are not 0: a
    single channel a thousand times as large as the others would drown them in its ridge. At least
    a part of the largest variance, so that ``Σ + λI`` can be solved.

    >>> mean_variance(np.diag([1.0, 1.0, 4.0]))
    2.0
    """
    xp = array_namespace(covariance)
    variances = to_host(xp.linalg.diagonal(covariance))
    varying = variances[variances > 0.0]
    if not len(varying):
        return 0.0
    counted = np.minimum(variances, OUTLYING * np.median(varying))
    return max(float(counted.mean()), SOLVABLE * float(varying.max()))


def ridged(matrix: Float64[Array, "d d"], ridge: float) -> Float64[Array, "d d"]:
    """``A + λI``, another array."""
    if is_numpy_array(matrix):
        system = matrix.copy()
        system[np.diag_indices_from(system)] += ridge
        return system
    return matrix + ridge * _identity(matrix)


def solve_definite(
    system: Float64[Array, "k k"], cross: Float64[Array, "k p"]
) -> tuple[Float64[Array, "k p"], float]:
    """Solution of a positive definite system, and the system's condition number in the 1-norm.

    With NumPy the condition is LAPACK's estimate, and ``system`` is overwritten by its factor.
    Elsewhere the inverse is solved for beside the answer, and the condition is exact.

    Raises:
        IllConditioned: If the system is singular, or its condition passes `MAX_CONDITION`.
    """
    try:
        solved = _by_cholesky if is_numpy_array(system) else _in_namespace
        answer, reciprocal = solved(system, cross)
    except linalg.LinAlgError as error:
        raise IllConditioned(_advice(system.shape[0], "is singular")) from error
    if not reciprocal * MAX_CONDITION >= 1.0:
        found = f"has condition {1 / reciprocal:.1e}" if reciprocal > 0.0 else "is singular"
        raise IllConditioned(_advice(system.shape[0], found))
    return answer, float(1.0 / reciprocal)


def inverse_definite(system: Float64[Array, "d d"]) -> Float64[Array, "d d"]:
    """``A⁻¹`` of a positive definite matrix, where the inverse itself is what is needed.

    Raises:
        IllConditioned: If it has no Cholesky factorisation.
    """
    try:
        if is_numpy_array(system):
            factor = linalg.cholesky(system, lower=True)
            inverse, _ = lapack.dpotri(factor, lower=1)
            return np.tril(inverse) + np.tril(inverse, -1).T
        require_definite(system)
        inverse = array_namespace(system).linalg.solve(system, _identity(system))
        return (inverse + inverse.T) / 2.0
    except linalg.LinAlgError as error:
        raise IllConditioned(
            f"the covariance of {system.shape[0]} channels is singular; calibrate with more "
            "samples or raise --ridge"
        ) from error


def pseudo_inverse(matrix: Float64[Array, "r r"], *, negligible: float) -> Float64[Array, "r r"]:
    """Of a positive semidefinite matrix, without directions below a share of the largest."""
    if is_numpy_array(matrix):
        return np.linalg.pinv(matrix, rcond=negligible, hermitian=True)
    return array_namespace(matrix).linalg.pinv(matrix, rtol=negligible)


def require_definite(system: Float64[Array, "k k"]) -> None:
    """Fail if a matrix has no Cholesky factor.

    On a device that does not say so (CuPy, unless asked to wait for every answer), the factor that
    it gives is no factor. A true one leaves ``|LLᵀ - A| ≤ (k + 1) eps max A_ii`` (Higham, Accuracy
    and Stability of Numerical Algorithms, theorem 10.3), and the product here rounds as much again.

    Raises:
        LinAlgError: If it is not positive definite.
    """
    xp = array_namespace(system)
    factor = xp.linalg.cholesky(system)
    apart = float(xp.max(xp.abs(factor @ factor.T - system)))
    largest = float(xp.max(xp.linalg.diagonal(system)))
    if not apart <= 2 * (system.shape[0] + 1) * float(np.finfo(np.float64).eps) * largest:
        raise linalg.LinAlgError("no factor")


def _by_cholesky(
    system: Float64[np.ndarray, "k k"], cross: Float64[np.ndarray, "k p"]
) -> tuple[Float64[np.ndarray, "k p"], float]:
    """The answer, and the estimated reciprocal of the condition; LAPACK works in ``system``."""
    norm = np.linalg.norm(system, 1)
    factor = linalg.cho_factor(system.T, lower=True, overwrite_a=True)
    reciprocal, _ = lapack.dpocon(factor[0], norm, uplo="L")
    return linalg.cho_solve(factor, cross), reciprocal


def _in_namespace(
    system: Float64[Array, "k k"], cross: Float64[Array, "k p"]
) -> tuple[Float64[Array, "k p"], float]:
    """The answer, and the reciprocal of the condition."""
    require_definite(system)
    xp = array_namespace(system, cross)
    both = xp.linalg.solve(system, xp.concat([cross, _identity(system)], axis=1))
    answer, inverse = both[:, : cross.shape[1]], both[:, cross.shape[1] :]
    return answer, 1.0 / (_norm(system) * _norm(inverse))


def _norm(matrix: Float64[Array, "k k"]) -> float:
    """The largest sum of magnitudes of a column."""
    xp = array_namespace(matrix)
    return float(xp.max(xp.sum(xp.abs(matrix), axis=0)))


def _identity(like: Float64[Array, "d d"]) -> Float64[Array, "d d"]:
    xp = array_namespace(like)
    return xp.eye(like.shape[0], dtype=like.dtype, device=place_of(like))


def _advice(channels: int, found: str) -> str:
    return (
        f"the system of {channels} kept channels {found} (condition may be {MAX_CONDITION:.0e}); "
        "calibrate with more samples or raise --ridge"
    )
