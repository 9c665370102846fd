"""The method ``best``, block by block: what stays of every axis, and the layer that repairs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace
from jaxtyping import Float64, Int, Int64

from corp_onnx.blocks.records import Output
from corp_onnx.device import HOST, Array, Device, beside, to_host
from corp_onnx.moments import Moments
from corp_onnx.solve.affine import share
from corp_onnx.solve.algebra import (
    block,
    inner,
    pseudo_inverse,
    ridged,
    rows,
    solve_definite,
    spread_out,
)
from corp_onnx.solve.elimination import eliminate
from corp_onnx.solve.folds import Evidence, MlpFold, OutputFold, QueryKeyFold, ValueOutputFold
from corp_onnx.solve.joint import Joint, merged
from corp_onnx.solve.lowrank import (
    NEGLIGIBLE,
    Truncated,
    shared,
    truncate_query_key,
    truncate_value_output,
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


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Where the channels of every head are among those that an output projection reads."""

    places: Int64[np.ndarray, "h e"]
    value_heads: Int64[np.ndarray, " h"]
    """The value head that every head mixes."""

    @staticmethod
    def of(output: Output) -> Heads:
        """Out of what is known of the way to an output projection."""
        head, position = output.places.T
        places = np.empty((head.max() + 1, position.max() + 1), dtype=int)
        places[head, position] = np.arange(len(head))
        return Heads(places, output.value_heads)

    @property
    def groups(self) -> int:
        """How many value heads there are."""
        return int(self.value_heads.max()) + 1


def narrow_mlp(
    parts: Sequence[Joint],
    branch: Branch,
    width: int,
    *,
    ridge: float,
    kept: Int[np.ndarray, " k"] | None = None,
    device: Device = HOST,
) -> MlpFold:
    r"""Eliminate channels, let the kept ones stand in for them, then fit the down projection.

    The weight that the fit starts from is the affine recovery, seen from the output::

        W₀ = W_S + (Σ_SS + λI)⁻¹ Σ_SP W_P        λ = ridge · tr(Σ) / d

    Args:
        parts: Hidden vector and target, of disjoint sets of samples.
        branch: The down projection.
        width: How many channels stay.
        ridge: Relative, for the elimination and for ``W₀``.
        kept: Channels that stay, instead of the elimination's choice.
        device: Where it is computed.
    """
    parts = [part.on(device) for part in parts]
    whole, weight = merged(parts), device.asarray(branch.scaled)
    dense = weight.shape[0]
    if kept is None:
        kept = eliminate(whole.within, weight, ridge=ridge, keep=width).kept(dense, width)
    removed = np.setdiff1d(np.arange(dense), kept)
    conditions = []

    def narrowing(joint: Joint) -> tuple[Joint, Float64[Array, "k o"]]:
        narrow = joint.picked(kept)
        lost = block(joint.within, kept, removed) @ rows(weight, removed)
        absolute = ridge * float(device.xp.linalg.trace(joint.within)) / dense
        change, condition = _taken_over(narrow.within, lost, absolute)
        conditions.append(condition)
        return narrow, rows(weight, kept) + change

    fitted = refit(parts, narrowing)
    evidence = Evidence(
        _unexplained(whole, weight, kept, removed, device.asarray(fitted.start)),
        max(conditions),
        fitted.seen,
        fitted.unseen,
    )
    return MlpFold(branch.block, kept, *branch.layer(fitted), evidence)


def narrow_values(
    parts: Sequence[Joint],
    branch: Branch,
    heads: Heads,
    width: int,
    *,
    ridge: float,
    device: Device = HOST,
) -> ValueOutputFold:
    r"""Truncate the values of every head, then fit the output projection over all heads.

    With ``P = diag(P_1 … P_h)`` of `truncate_value_output`, and what every head could do by itself,
    ``W_own`` of `_by_itself`, the fit starts from::

        W₀ = W_own + (Pᵀ Σ P + λI)⁻¹ Pᵀ Σ (W - P W_own)        λ = ridge · tr(Pᵀ Σ P) / (h r)

    in which other heads help to say what one head lost. Where nothing is lost nothing changes.
    """
    places, weight = heads.places, device.asarray(branch.scaled)
    parts = [part.on(device) for part in parts]
    found = truncated_values(merged(parts), branch, heads, width)
    (maps,) = found.maps
    of_heads = maps[heads.value_heads]
    narrow = device.asarray(_side_along(places, of_heads, len(branch.weight)))
    conditions = [found.condition]

    def narrowing(joint: Joint) -> tuple[Joint, Float64[Array, "k o"]]:
        mapped = joint.mapped(narrow)
        absolute = ridge * float(device.xp.linalg.trace(mapped.within)) / mapped.mean.shape[0]
        own = _by_itself(joint, weight, places, of_heads)
        lost = narrow.T @ joint.within @ (weight - narrow @ own)
        change, condition = _taken_over(mapped.within, lost, absolute)
        conditions.append(condition)
        return mapped, own + change

    fitted = refit(parts, narrowing)
    evidence = Evidence(float(found.curve[width]), max(conditions), fitted.seen, fitted.unseen)
    layer, bias = branch.layer(fitted)
    return ValueOutputFold(
        branch.block, maps, layer.reshape(len(places), width, -1), bias, evidence
    )


def narrow_output(parts: Sequence[Joint], branch: Branch, *, device: Device = HOST) -> OutputFold:
    """Fit the output projection of an attention whose values stay as they are."""
    weight = device.asarray(branch.scaled)
    fitted = refit([part.on(device) for part in parts], lambda joint: (joint, weight))
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


def truncated_values(joint: Joint, branch: Branch, heads: Heads, width: int) -> Truncated:
    """Heads that share one value head together, then `truncate_value_output`."""
    places, of_head = heads.places, heads.value_heads
    covariances = np.stack([to_host(block(joint.within, head, head)) for head in places])
    scaled = branch.scaled
    of_groups = [
        np.concatenate([scaled[head] for head in places[of_head == group]], axis=1)
        for group in range(heads.groups)
    ]
    pooled = beside(shared(covariances, of_head, heads.groups), joint.within)
    return truncate_value_output(pooled, beside(_side_by_side(of_groups), joint.within), width)


def _side_along(
    places: Int[np.ndarray, "h e"], maps: Float64[np.ndarray, "h e r"], dense: int
) -> Float64[np.ndarray, "d k"]:
    """``diag(P_1 … P_h)``, with the channels of every head where they are."""
    width = maps.shape[2]
    narrow = np.zeros((dense, len(places) * width))
    for head, channels in enumerate(places):
        narrow[channels, head * width : (head + 1) * width] = maps[head]
    return narrow


def _by_itself(
    joint: Joint,
    weight: Float64[Array, "d o"],
    places: Int[np.ndarray, "h e"],
    maps: Float64[np.ndarray, "h e r"],
) -> Float64[Array, "k o"]:
    r"""The rows with which every head's narrow values stand in best for its dense ones.

    With ``C = PᵀΣP`` of every head and its rows ``W``::

        W_own = C⁺ PᵀΣW + (I - C⁺C) P⁺ W

    The second term is for directions that vary nowhere in the samples: they keep what they had.
    """
    own = []
    for channels, of_head in zip(places, maps, strict=True):
        narrow, dense = beside(of_head, weight), rows(weight, channels)
        crossed = narrow.T @ block(joint.within, channels, channels)
        within = crossed @ narrow
        inverse = pseudo_inverse(within, negligible=NEGLIGIBLE)
        as_it_was = pseudo_inverse(narrow.T @ narrow, negligible=NEGLIGIBLE**2) @ (narrow.T @ dense)
        own.append(inverse @ (crossed @ dense - within @ as_it_was) + as_it_was)
    return array_namespace(weight).concat(own)


def _taken_over(
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


def _side_by_side(
    rows: Sequence[Float64[np.ndarray, "e _"]],
) -> Float64[np.ndarray, "g e o"]:
    """Rows of all groups in one array: groups of fewer heads are filled up with zeros."""
    longest = max(one.shape[1] for one in rows)
    return np.stack([np.pad(one, ((0, 0), (0, longest - one.shape[1]))) for one in rows])
