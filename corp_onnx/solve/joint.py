"""What a linear layer reads together with what it should give: all that fitting it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from jaxtyping import Float64, Int

from corp_onnx.moments import Moments
from corp_onnx.solve.affine import covariance_of


@dataclass(frozen=True, slots=True, eq=False)
class Joint:
    """Moments of the features ``f`` of a layer and of its target ``t``, together.

    Of the target only the variance of every channel is kept: fitting asks for no more.
    """

    count: int
    mean: Float64[np.ndarray, " d"]
    target_mean: Float64[np.ndarray, " o"]
    within: Float64[np.ndarray, "d d"]
    """Covariance of the features."""
    cross: Float64[np.ndarray, "d o"]
    """``Cov(f, t)``."""
    spread: Float64[np.ndarray, " o"]
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
        moments: Moments, weight: Float64[np.ndarray, "d o"], bias: Float64[np.ndarray, " o"]
    ) -> Joint:
        """The target is what the layer itself makes of the features: ``t = f W + b``."""
        covariance = covariance_of(moments)
        cross = covariance @ weight
        spread = np.einsum("do,do->o", weight, cross)
        mean = moments.mean
        return Joint(moments.count, mean, mean @ weight + bias, covariance, cross, spread)

    def __add__(self, other: Joint) -> Joint:
        """Of both sets of samples (Chan, Golub & LeVeque 1979)."""
        share = other.count / (self.count + other.count)
        step, target_step = other.mean - self.mean, other.target_mean - self.target_mean
        between = share * (1.0 - share)

        def merged(one: np.ndarray, two: np.ndarray, apart: np.ndarray) -> np.ndarray:
            result: np.ndarray = (1.0 - share) * one + share * two + between * apart
            return result

        return Joint(
            self.count + other.count,
            self.mean + share * step,
            self.target_mean + share * target_step,
            merged(self.within, other.within, np.outer(step, step)),
            merged(self.cross, other.cross, np.outer(step, target_step)),
            merged(self.spread, other.spread, target_step**2),
        )

    @property
    def features(self) -> Moments:
        """Moments of the features alone."""
        return Moments(self.count, self.mean, self.within * self.count)

    @property
    def total(self) -> float:
        """Variance of the target, all channels together."""
        return float(self.spread.sum())

    def picked(self, kept: Int[np.ndarray, " k"]) -> Joint:
        """The same with some of the features."""
        return replace(
            self,
            mean=self.mean[kept],
            within=self.within[np.ix_(kept, kept)],
            cross=self.cross[kept],
        )

    def mapped(self, narrow: Float64[np.ndarray, "d k"]) -> Joint:
        """The same of the features ``f P``."""
        return replace(
            self,
            mean=self.mean @ narrow,
            within=narrow.T @ self.within @ narrow,
            cross=narrow.T @ self.cross,
        )

    def bias(self, weight: Float64[np.ndarray, "d o"]) -> Float64[np.ndarray, " o"]:
        """The bias that goes best with a weight: ``b = E[t] - E[f] W``."""
        bias: np.ndarray = self.target_mean - self.mean @ weight
        return bias

    def error(self, weight: Float64[np.ndarray, "d o"], bias: Float64[np.ndarray, " o"]) -> float:
        """``E‖t - f W - b‖²``, exact on the vectors that the moments were taken of."""
        shift = self.bias(weight) - bias
        left = self.total + float(np.vdot(weight, self.within @ weight - 2.0 * self.cross))
        return max(left, 0.0) + float(shift @ shift)


def merged(parts: Sequence[Joint]) -> Joint:
    """Of all sets of samples; there is at least one."""
    return reduce(Joint.__add__, parts)
