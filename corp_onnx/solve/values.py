"""The values of ``best``: what stays of every head, and the output projection over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace
from jaxtyping import Float64, Int, Int64

from corp_onnx.blocks.records import Output
from corp_onnx.device import HOST, Array, Device, beside, to_host
from corp_onnx.solve.algebra import block, mean_variance, pseudo_inverse, rows
from corp_onnx.solve.folds import Evidence, ValueOutputFold
from corp_onnx.solve.joint import Joint, merged
from corp_onnx.solve.lowrank import (
    NEGLIGIBLE,
    Truncated,
    shared,
    truncate_value_output,
)
from corp_onnx.solve.narrow import Branch, taken_over
from corp_onnx.solve.refit import refit


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

    def side_along(
        self, maps: Float64[np.ndarray, "g e r"], dense: int
    ) -> Float64[np.ndarray, "d k"]:
        """``P = diag(P_1 … P_h)``, with the channels of every head where they are."""
        width = maps.shape[2]
        narrow = np.zeros((dense, len(self.places) * width))
        for head, (channels, group) in enumerate(zip(self.places, self.value_heads, strict=True)):
            narrow[channels, head * width : (head + 1) * width] = maps[group]
        return narrow


def narrow_values(
    parts: Sequence[Joint],
    branch: Branch,
    heads: Heads,
    width: int,
    *,
    ridges: Sequence[float],
    device: Device = HOST,
) -> ValueOutputFold:
    r"""Truncate the values of every head, then fit the output projection over all heads.

    With ``P = diag(P_1 … P_h)`` of `truncate_value_output`, and what every head could do by itself,
    ``W_own`` of `_by_itself`, the fit starts from::

        W₀ = W_own + (Pᵀ Σ P + λI)⁻¹ Pᵀ Σ (W - P W_own)        λ = ridge · s(Pᵀ Σ P)

    in which other heads help to say what one head lost. Where nothing is lost nothing changes. Of
    several ridges it is the one that does best on samples held out.

    Source: ours, as is `truncate_value_output`.
    """
    places, weight = heads.places, device.asarray(branch.scaled)
    parts = [part.on(device) for part in parts]
    found = truncated_values(merged(parts), branch, heads, width)
    (maps,) = found.maps
    narrow = device.asarray(heads.side_along(maps, len(branch.weight)))
    condition = 1.0

    def start(joint: Joint) -> Callable[[float], Float64[Array, "k o"]]:
        within = joint.mapped(narrow).within
        own = _by_itself(joint, weight, places, maps[heads.value_heads])
        lost = narrow.T @ joint.within @ (weight - narrow @ own)

        def at(ridge: float) -> Float64[Array, "k o"]:
            nonlocal condition
            change, condition = taken_over(within, lost, ridge * mean_variance(within))
            return own + change

        return at

    fitted = refit(parts, lambda joint: joint.mapped(narrow), start, ridges)
    evidence = Evidence(
        float(found.curve[width]), max(condition, found.condition), fitted.seen, fitted.unseen
    )
    layer, bias = branch.layer(fitted)
    return ValueOutputFold(
        branch.block, maps, layer.reshape(len(places), width, -1), bias, evidence
    )


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


def _side_by_side(
    rows: Sequence[Float64[np.ndarray, "e _"]],
) -> Float64[np.ndarray, "g e o"]:
    """Rows of all groups in one array: groups of fewer heads are filled up with zeros."""
    longest = max(one.shape[1] for one in rows)
    return np.stack([np.pad(one, ((0, 0), (0, longest - one.shape[1]))) for one in rows])
