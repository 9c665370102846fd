"""First and second moments of activations: streaming, mergeable, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, is_numpy_array
from jaxtyping import Float, Float64, Shaped
from scipy.linalg import blas

from corp_onnx.device import HOST, Array, Device, to_host
from corp_onnx.errors import DataError

ROWS_PER_CHANNEL, LEAST_ROWS = 2, 4096
"""So many vectors are multiplied together, where batches are smaller."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    r"""Mean and scatter of ``count`` activation vectors of width ``d``.

    ::

        mean = 1/n Σ x        scatter = Σ (x - mean)ᵀ (x - mean)

    The scatter is centred, so that a small spread around a large mean survives
    (summing ``x²`` would lose it). Leading axes ``*h`` hold one set of moments
    each, one per attention head for instance.

    Adding two records gives the moments of both sets of vectors together, so
    it does not matter how a data set was cut into batches or files.

    Source: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm
    for computing sample variances", 1979.

    Attributes:
        count: Number of vectors, ``n``.
        mean: Their mean, in activation units.
        scatter: Their centred sum of outer products, in squared units.

    >>> x = np.array([[0.0, 1.0], [2.0, 5.0], [4.0, 3.0]])
    >>> whole = Moments.of(x)
    >>> whole.mean, whole.covariance[0, 1].round(6)
    (array([2., 3.]), np.float64(1.333333))
    >>> parts = Moments.of(x[:1]) + Moments.of(x[1:])
    >>> bool(np.allclose(parts.scatter, whole.scatter))
    True
    """

    count: int
    mean: Float64[np.ndarray, "*h d"]
    scatter: Float64[np.ndarray, "*h d d"]

    def __post_init__(self) -> None:
        assert self.scatter.shape == (*self.mean.shape, self.mean.shape[-1])
        object.__setattr__(self, "mean", read_only(self.mean))
        object.__setattr__(self, "scatter", read_only(self.scatter))

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Moments:
        """Moments of no vector at all, of shape ``(*h, d)``; adding them changes nothing."""
        return Accumulator(shape).moments()

    @classmethod
    def of(cls, x: Float[np.ndarray, "n *h d"]) -> Moments:
        """Moments of one batch; ``Accumulator.add`` says how precise they are.

        Raises:
            DataError: If ``x`` holds NaN or infinity.
        """
        accumulator = Accumulator(x.shape[1:])
        accumulator.add(x)
        return accumulator.moments()

    def __add__(self, other: Moments) -> Moments:
        if self.mean.shape != other.mean.shape:
            raise DataError(
                f"statistics of shape {self.mean.shape} and {other.mean.shape} cannot be merged: "
                "they come from different models; calibrate both parts on the same one"
            )
        if other.count == 0:
            return self
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        root = delta * np.sqrt(self.count * (other.count / count))
        between = root[..., :, None] * root[..., None, :]
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def width(self) -> int:
        """Number of channels, ``d``."""
        return int(self.mean.shape[-1])

    @property
    def variance(self) -> Float64[np.ndarray, "*h d"]:
        """Variance of every channel, in squared activation units.

        Raises:
            DataError: If there is no vector to take it of.
        """
        diagonal = np.diagonal(self.scatter, axis1=-2, axis2=-1)
        variance: np.ndarray = diagonal / self._samples()
        return variance

    @property
    def covariance(self) -> Float64[np.ndarray, "*h d d"]:
        """Centred second moment, ``scatter / count``, in squared activation units.

        Raises:
            DataError: If there is no vector to take it of.
        """
        covariance: np.ndarray = self.scatter / self._samples()
        return covariance

    @property
    def gram(self) -> Float64[np.ndarray, "*h d d"]:
        """Uncentred second moment ``E[xᵀ x]``: the covariance plus ``meanᵀ mean``.

        Raises:
            DataError: If there is no vector to take it of.
        """
        gram: np.ndarray = self.covariance + self.mean[..., :, None] * self.mean[..., None, :]
        return gram

    def _samples(self) -> int:
        """The count, where it must not be zero."""
        if self.count == 0:
            raise DataError("these statistics hold no samples; calibrate the model first")
        return self.count


class Accumulator:
    """Moments in the making: batches go in one by one, nothing of them is kept.

    The one mutable object of the statistics, because a record would copy its
    ``d²`` sums for every batch. Only one triangle of the scatter is summed;
    `moments` mirrors it. The sums, and the products that go into them, are on a device.

    >>> accumulator = Accumulator((2,))
    >>> for batch in (np.array([[0.0, 1.0]]), np.array([[2.0, 5.0], [4.0, 3.0]])):
    ...     accumulator.add(batch)
    >>> accumulator.moments().mean
    array([2., 3.])
    """

    __slots__ = ("_count", "_device", "_mean", "_upper")

    def __init__(self, shape: tuple[int, ...], device: Device = HOST) -> None:
        """Start with no vector, for batches of shape ``(n, *shape)``, ``shape = (*h, d)``."""
        self._count = 0
        self._device = device
        self._mean = device.xp.zeros(shape, dtype=device.xp.float64)
        self._upper = device.xp.zeros((*shape, shape[-1]), dtype=device.xp.float64)

    def add(self, x: Float[np.ndarray, "n *h d"]) -> None:
        """Merge a batch of ``n`` vectors in.

        The batch is centred by its own float64 mean and multiplied in its own
        precision (float32 for float16); everything after that product is
        float64. In float32 the scatter is good to about 1e-6 of its norm.

        Args:
            x: Activations, on the host; axes between the first and the last are kept apart.

        Raises:
            DataError: If ``x`` holds NaN or infinity, or values whose products
                overflow. What was added before stays as it was.
        """
        if x.shape[1:] != self._mean.shape:
            raise ValueError(f"batch of shape {x.shape} for moments of shape {self._mean.shape}")
        if len(x) == 0:
            return
        xp = self._device.xp
        batch = self._device.asarray(x)
        with np.errstate(over="ignore", invalid="ignore"):
            mean = xp.sum(batch, axis=0, dtype=xp.float64) / len(x)
            _require_finite(mean)
            within = _scatter(batch, mean)
        _require_finite(xp.linalg.diagonal(within))

        count = self._count + len(x)
        delta = mean - self._mean
        self._upper += within
        self._add_between(delta * math.sqrt(self._count * (len(x) / count)))
        self._mean += delta * (len(x) / count)
        self._count = count

    def moments(self) -> Moments:
        """What was added so far, as a record of its own."""
        upper = to_host(self._upper)
        scatter = np.triu(upper)
        scatter += np.triu(upper, 1).swapaxes(-1, -2)
        scatter.setflags(write=False)
        return Moments(self._count, to_host(self._mean), scatter)

    def _add_between(self, delta: Float64[Array, "*h d"]) -> None:
        """Add the outer product of ``delta`` with itself, on the host to the triangle alone."""
        if not self._device.is_host:
            self._upper += delta[..., :, None] * delta[..., None, :]
            return
        for head in np.ndindex(delta.shape[:-1]):
            blas.dsyr(1.0, delta[head], a=self._upper[head].T, overwrite_a=1, lower=1)


class Collector:
    """An `Accumulator` in which vectors wait until one product serves several small batches."""

    __slots__ = ("_dtype", "_enough", "_total", "_waiting")

    def __init__(
        self, shape: tuple[int, ...], device: Device = HOST, dtype: type[np.floating] | None = None
    ) -> None:
        """Start with no vector, for batches of shape ``(n, *shape)``.

        Args:
            shape: Of one vector, ``(*h, d)``.
            device: Where products are taken.
            dtype: In what precision; None for that of the vectors.
        """
        self._dtype = dtype
        self._total = Accumulator(shape, device)
        self._enough = max(ROWS_PER_CHANNEL * shape[-1], LEAST_ROWS)
        self._waiting: list[Float[np.ndarray, "n *h d"]] = []

    def add(self, x: Float[np.ndarray, "n *h d"]) -> None:
        """Add a batch.

        Raises:
            DataError: As `Accumulator.add`, perhaps of an earlier batch.
        """
        self._waiting.append(x)
        if sum(map(len, self._waiting)) >= self._enough:
            self._flush()

    def moments(self) -> Moments:
        """What was added so far.

        Raises:
            DataError: As `Accumulator.add`.
        """
        self._flush()
        return self._total.moments()

    def _flush(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self._total.add(np.concatenate(waiting, dtype=self._dtype))


def read_only(values: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The array as a record may hold it: not writable, and nobody else's memory."""
    if values.flags.writeable or values.base is not None:
        values = np.array(values)
        values.setflags(write=False)
    return values


def _scatter(x: Float[Array, "n *h d"], mean: Float64[Array, "*h d"]) -> Float[Array, "*h d d"]:
    """Scatter of ``x`` around ``mean``.

    NumPy sees that both factors are one matrix and computes a triangle only (BLAS syrk); unlike
    SciPy's BLAS it lets other threads run meanwhile.
    """
    xp = array_namespace(x, mean)
    centred = _centred(xp.moveaxis(x, 0, -2), mean[..., None, :])
    return xp.matmul(xp.matrix_transpose(centred), centred)


def _centred(
    rows: Float[Array, "*h n d"], mean: Float64[Array, "*h 1 d"]
) -> Float[Array, "*h n d"]:
    """In the precision of the rows, as if subtracted in float64.

    With NumPy in two steps, the mean as the rows would hold it and what that leaves of it: the
    first is exact for whatever is near the mean, and neither needs the rows in float64.
    """
    xp = array_namespace(rows, mean)
    dtype = xp.result_type(rows, xp.float32)
    if is_numpy_array(rows):
        coarse = mean.astype(dtype)
        centred: np.ndarray = np.subtract(rows, coarse, dtype=dtype)
        centred -= (mean - coarse).astype(dtype)
        return centred
    return xp.astype(rows - mean, dtype)


def _require_finite(values: Float[Array, "..."]) -> None:
    xp = array_namespace(values)
    if not xp.all(xp.isfinite(values)):
        raise DataError(
            "the activations hold NaN or infinity, or numbers too large to multiply; "
            "check the inputs, and that the model gives finite outputs for them"
        )
