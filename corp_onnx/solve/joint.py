"""What a linear layer reads together with what it should give: all that fitting it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from array_api_compat import array_namespace
from jaxtyping import Float64, Int

from corp_onnx.calibration.moments import Moments
from corp_onnx.device import HOST, Array, Device
from corp_onnx.solve.affine import covariance_of
from corp_onnx.solve.algebra import block, column_products, inner, rows


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """Moments of the features ``f`` of a layer and of its target ``t``, together.

    Of the target only the variance of every channel is kept: fitting asks for no more. The arrays
    are NumPy's, or `on` a device.
    """

    count: int
    mean: Float64[Array, " d"]
    target_mean: Float64[Array, " o"]
    within: Float64[Array, "d d"]
    """Covariance of the features."""
    cross: Float64[Array, "d o"]
    """``Cov(f, t)``."""
    spread: Float64[Array, " o"]
    """Variance of every target channel."""

    @staticmethod
    def of(moments: Moments, width: int) -> Joint:
        """Take moments of ``[f, t]`` apart, behind ``width`` features."""
        covariance = covariance_of(moments)
        return Joint(
            moments.count,
            moments.mean[:width],
            moments.mean[width:],
            covariance[:width, :width],
            covariance[:width, width:],
            np.diagonal(covariance)[width:],
        )

    @staticmethod
    def own(
        moments: Moments,
        weight: Float64[np.ndarray, "d o"],
        bias: Float64[np.ndarray, " o"],
        *,
        device: Device = HOST,
    ) -> Joint:
        """The target is what the layer itself makes of the features: ``t = f W + b``."""
        covariance, matrix = device.asarray(covariance_of(moments)), device.asarray(weight)
        cross = covariance @ matrix
        spread = column_products(matrix, cross)
        mean = device.asarray(moments.mean)
        target_mean = device.asarray(moments.mean @ weight + bias)
        return Joint(moments.count, mean, target_mean, covariance, cross, spread)

    def on(self, device: Device) -> Joint:
        """The same, on a device."""
        arrays = (self.mean, self.target_mean, self.within, self.cross, self.spread)
        return Joint(self.count, *map(device.asarray, arrays))

    def __add__(self, other: Joint) -> Joint:
        """Of both sets of samples."""
        count = self.count + other.count
        return replace(self.mixed(other, other.count / count), count=count)

    def mixed(self, other: Joint, share: float) -> Joint:
        """Of both, with so large a share for the other, by Chan, Golub & LeVeque 1979.

        The count stays: this is another weighting of samples that were counted already.
        """
        step, target_step = other.mean - self.mean, other.target_mean - self.target_mean
        between = share * (1.0 - share)

        def merged(one: Array, two: Array, apart: Array) -> Array:
            return (1.0 - share) * one + share * two + between * apart

        return Joint(
            self.count,
            self.mean + share * step,
            self.target_mean + share * target_step,
            merged(self.within, other.within, step[:, None] * step[None, :]),
            merged(self.cross, other.cross, step[:, None] * target_step[None, :]),
            merged(self.spread, other.spread, target_step**2),
        )

    @property
    def features(self) -> Moments:
        """Moments of the features alone; of arrays on the host."""
        return Moments(self.count, self.mean, self.within * self.count)

    @property
    def total(self) -> float:
        """Variance of the target, all channels together."""
        return float(array_namespace(self.spread).sum(self.spread))

    def picked(self, kept: Int[np.ndarray, " k"]) -> Joint:
        """The same with some of the features."""
        return replace(
            self,
            mean=rows(self.mean, kept),
            within=block(self.within, kept, kept),
            cross=rows(self.cross, kept),
        )

    def mapped(self, narrow: Float64[Array, "d k"]) -> Joint:
        """The same of the features ``f P``."""
        return replace(
            self,
            mean=self.mean @ narrow,
            within=narrow.T @ self.within @ narrow,
            cross=narrow.T @ self.cross,
        )

    def bias(self, weight: Float64[Array, "d o"]) -> Float64[Array, " o"]:
        """The bias that goes best with a weight: ``b = E[t] - E[f] W``."""
        return self.target_mean - self.mean @ weight

    def error(self, weight: Float64[Array, "d o"], bias: Float64[Array, " o"]) -> float:
        """``E‖t - f W - b‖²``, exact on the vectors that the moments were taken of."""
        shift = self.bias(weight) - bias
        left = self.total + inner(weight, self.within @ weight - 2.0 * self.cross)
        return max(left, 0.0) + float(shift @ shift)


def merged(parts: Sequence[Joint]) -> Joint:
    """Of all sets of samples; there is at least one."""
    return reduce(Joint.__add__, parts)
