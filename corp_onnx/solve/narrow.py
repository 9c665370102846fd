"""The method ``best``, block by block: what stays of every axis, and the layer that repairs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace
from jaxtyping import Float64, Int

from corp_onnx.calibration.moments import Moments
from corp_onnx.device import HOST, Array, Device, to_host
from corp_onnx.solve.affine import share
from corp_onnx.solve.algebra import (
    block,
    inner,
    mean_variance,
    ridged,
    rows,
    solve_definite,
    spread_out,
)
from corp_onnx.solve.elimination import eliminate
from corp_onnx.solve.folds import Evidence, MlpFold, OutputFold, QueryKeyFold
from corp_onnx.solve.joint import Joint, merged
from corp_onnx.solve.lowrank import (
    Truncated,
    truncate_query_key,
)
from corp_onnx.solve.refit import Refit, refit

LEAST_GAIN = 1e-6
"""Share of the largest gain below which a channel of the branch counts as this much."""


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """The last layer of a block, ``y = f W + b``, and the stream that ``gain · y`` is added to."""

    block: str
    weight: Float64[np.ndarray, "d o"]
    gain: Float64[np.ndarray, " o"]

    @property
    def scaled(self) -> Float64[np.ndarray, "d o"]:
        """The weight as the stream sees it."""
        scaled: np.ndarray = self.weight * self.gain
        return scaled

    def layer(self, fitted: Refit) -> tuple[Float64[np.ndarray, "k o"], Float64[np.ndarray, " o"]]:
        """Weight and bias in front of the gain, from those behind it."""
        least = LEAST_GAIN * np.abs(self.gain).max()
        gain = np.where(np.abs(self.gain) < least, np.copysign(least, self.gain), self.gain)
        return fitted.weight / gain, fitted.bias / gain


def narrow_mlp(
    parts: Sequence[Joint],
    branch: Branch,
    width: int,
    *,
    ridges: Sequence[float],
    kept: Int[np.ndarray, " k"] | None = None,
    device: Device = HOST,
) -> MlpFold:
    r"""Eliminate channels, let the kept ones stand in for them, then fit the down projection.

    The weight that the fit starts from is the affine recovery, seen from the output::

        W₀ = W_S + (Σ_SS + λI)⁻¹ Σ_SP W_P        λ = ridge · s

    Args:
        parts: Hidden vector and target, of disjoint sets of samples.
        branch: The down projection.
        width: How many channels stay.
        ridges: Relative; the first for the elimination, and for ``W₀`` the one that does best on
            samples held out.
        kept: Channels that stay, instead of the elimination's choice.
        device: Where it is computed.
    """
    parts = [part.on(device) for part in parts]
    whole, weight = merged(parts), device.asarray(branch.scaled)
    dense = weight.shape[0]
    if kept is None:
        kept = eliminate(whole.within, weight, ridge=ridges[0], keep=width).kept(dense, width)
    removed = np.setdiff1d(np.arange(dense), kept)
    condition = 1.0

    def start(joint: Joint) -> Callable[[float], Float64[Array, "k o"]]:
        lost = block(joint.within, kept, removed) @ rows(weight, removed)
        within, scale = block(joint.within, kept, kept), mean_variance(joint.within)

        def at(ridge: float) -> Float64[Array, "k o"]:
            nonlocal condition
            change, condition = taken_over(within, lost, ridge * scale)
            return rows(weight, kept) + change

        return at

    fitted = refit(parts, lambda joint: joint.picked(kept), start, ridges)
    evidence = Evidence(
        _unexplained(whole, weight, kept, removed, device.asarray(fitted.start)),
        condition,
        fitted.seen,
        fitted.unseen,
    )
    return MlpFold(branch.block, kept, *branch.layer(fitted), evidence)


def narrow_output(parts: Sequence[Joint], branch: Branch, *, device: Device = HOST) -> OutputFold:
    """Fit the output projection of an attention whose values stay as they are."""
    weight = device.asarray(branch.scaled)
    parts = [part.on(device) for part in parts]
    fitted = refit(parts, lambda joint: joint, lambda joint: lambda ridge: weight)
    evidence = Evidence(0.0, 1.0, fitted.seen, fitted.unseen)
    return OutputFold(branch.block, *branch.layer(fitted), evidence)


def narrow_query_key(
    block: str,
    query: Moments,
    centred_key: Moments,
    key_heads: Int[np.ndarray, " h"],
    width: int,
    *,
    device: Device = HOST,
) -> QueryKeyFold:
    """Truncate the logits of every head; query heads that read one key head share one map."""
    found = truncated_query_key(query, centred_key, key_heads, width, device=device)
    of_query, of_key = found.maps
    left = float(found.curve[width])
    return QueryKeyFold(block, of_query[key_heads], of_key, Evidence(left, found.condition, left))


def truncated_query_key(
    query: Moments,
    centred_key: Moments,
    key_heads: Int[np.ndarray, " h"],
    width: int,
    *,
    device: Device = HOST,
) -> Truncated:
    """Query heads that read one key head together, then `truncate_query_key`."""
    grams = np.zeros((len(centred_key.mean), *query.covariance.shape[1:]))
    np.add.at(grams, key_heads, query.gram)
    return truncate_query_key(device.asarray(grams), device.asarray(centred_key.gram), width)


def taken_over(
    within: Float64[Array, "k k"], wanted: Float64[Array, "k o"], ridge: float
) -> tuple[Float64[Array, "k o"], float]:
    """``(C + λI)⁻¹ X`` over the features that vary at all, and the condition number."""
    xp = array_namespace(within, wanted)
    present = to_host(xp.linalg.diagonal(within)) > 0.0
    if not (present.any() and bool(xp.any(wanted))):
        return xp.zeros_like(wanted), 1.0
    varying = np.flatnonzero(present)
    system = ridged(block(within, varying, varying), ridge)
    answer, condition = solve_definite(system, rows(wanted, varying))
    return spread_out(answer, present), condition


def _unexplained(
    joint: Joint,
    weight: Float64[Array, "d o"],
    kept: Int[np.ndarray, " k"],
    removed: Int[np.ndarray, " p"],
    start: Float64[Array, "k o"],
) -> float:
    """Share of what removed channels gave to the output that kept ones do not make up for."""
    gone = rows(weight, removed)
    lost = block(joint.within, kept, removed) @ gone
    change = start - rows(weight, kept)
    energy = inner(gone, block(joint.within, removed, removed) @ gone)
    again = block(joint.within, kept, kept) @ change
    return share(energy + inner(change, again - 2.0 * lost), energy)
