"""The words in which the truth about a block is told."""

from __future__ import annotations

from collections.abc import Mapping

Entry = dict[str, object]
"""A block: its sizes, the axes that can be cut, and keys of what refuses the others."""

Refused = Mapping[str, str | None]
"""Keys by axis; None where nothing refuses it after all."""

REASONS: Mapping[str, str] = {
    "rotary": "queries and keys are rotated by their position",
    "norm": "a norm over a head's or the hidden channels",
    "cosine": "logits are cosines of queries and keys",
    "softcap": "logits pass through a tanh",
    "talking heads": "a linear layer mixes the logits of all heads",
    "disentangled": "queries and keys also meet the keys and queries of positions",
    "decomposed bias": "queries also meet a table of positions",
    "pooled": "queries are pooled over tokens",
    "global query": "queries come from convolutions, and are no linear layer's",
    "channel attention": "the Softmax runs over channels",
    "activation": "a function stands between values and output projection",
    "channels compared": "hidden channels are divided by their common mean",
}
"""Every key that the truth uses."""

QK, VO, MLP = "qk", "vo", "mlp"


def mlp(width: int, refused: Refused | None = None) -> Entry:
    """An MLP of ``width`` hidden channels."""
    return {"mlp": width, **_axes((MLP,), refused or {})}


def attention(
    heads: int,
    head_width: int,
    *,
    kv_heads: int | None = None,
    value_width: int | None = None,
    refused: Refused | None = None,
) -> Entry:
    """An attention of that many heads, with as many heads of keys unless it is said otherwise."""
    sizes = {
        "attention": heads,
        "kv_heads": kv_heads or heads,
        "head_width": head_width,
        "value_width": value_width or head_width,
    }
    return {**sizes, **_axes((QK, VO), refused or {})}


def _axes(axes: tuple[str, ...], refused: Refused) -> Entry:
    why = {axis: key for axis, key in refused.items() if key}
    assert {*why.values()} <= REASONS.keys()
    entry: Entry = {"cut": [axis for axis in axes if axis not in why]}
    return entry | ({"refused": why} if why else {})
