"""Attentions and MLPs as records of choices, each with the truth of what can be cut of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.random_writing import Layer

MATMUL = Layer()
ROLES = ("query", "key", "value")


@dataclass(frozen=True, slots=True)
class Scale:
    """A factor: of which operand, Mul or Div, and where it comes from."""

    place: str
    op: str = "Mul"
    source: str = "constant"


@dataclass(frozen=True, slots=True)
class Attention:
    """How an attention is written."""

    groups: int = 2
    shared: int = 1
    width: int = 6
    value_width: int = 4
    layers: Layer = MATMUL
    packing: str = "separate"
    order: str = "sections"
    pick: str = "split"
    picked_first: bool = False
    tokens_first: bool = False
    cross: bool = False
    unbiased: frozenset[str] = frozenset()
    """Roles whose layer has no bias all the same."""
    targets: str = "zeros"
    form: str = "bh"
    early: bool = False
    """``[t, b·h, e]`` in one Reshape, as torch writes it."""
    key_turned: str = "before"
    keys_left: bool = False
    einsum: bool = False
    operator: str = "none"
    """Or how many axes the operands of the operator Attention have."""
    repeat: str = "expand"
    repeat_early: bool = False
    scales: tuple[Scale, ...] = (Scale("logits"),)
    shift: bool = False
    """A constant of every head and channel is added to the queries."""
    queries: str = "plain"
    mask: str = "none"
    bias: str = "none"
    capped: bool = False
    softmax: str = "whole"
    seen: str = "nothing"
    """What else is an output of the model, or read: q, keys and values."""
    gate: str = "none"
    head_major: bool = False
    summed: bool = False
    """The output projection is one Einsum over heads and their channels."""
    output: Layer = MATMUL
    layer_scale: bool = False
    noise: tuple[tuple[str, str], ...] = ()

    @property
    def heads(self) -> str:
        """The letters of the query heads, the outer first."""
        if self.shared == 1:
            return "g"
        return "mg" if self.repeat in {"tile", "concat"} else "gm"

    @property
    def truth(self) -> Mapping[str, object]:
        refused = self._because()
        return {
            "attention": self.groups * self.shared,
            "kv_heads": self.groups,
            "head_width": self.width,
            "value_width": self.value_width,
            "cut": [axis for axis in ("qk", "vo") if axis not in refused],
            "because": refused,
        }

    def _because(self) -> dict[str, str]:
        """The axes that cannot be cut, and words of the reason."""
        alone = self.packing == "heads"
        several = self.groups * self.shared > 1, self.groups > 1
        packed = ("qk", "vo") if self.packing == "qkv" else ("qk",)
        troubles = (
            (alone and several[0], ("qk",), "one linear layer"),
            (alone and several[1], ("vo",), "one linear layer"),
            (self.capped, ("qk",), "Tanh|softcap"),
            (self.queries == "rotated", ("qk",), "rotated"),
            (self.queries in {"normed", "l2"}, ("qk",), "normalised"),
            (self.seen == "query", ("qk",), "read|output"),
            (self.seen == "query layer", packed, "read|output|made of"),
            (self.seen == "cache", ("qk", "vo"), "output"),
            (self.gate == "channel", ("vo",), "one by one"),
        )
        refused: dict[str, list[str]] = {}
        for happens, axes, word in troubles:
            for axis in axes if happens else ():
                refused.setdefault(axis, []).append(word)
        return {axis: "|".join(words) for axis, words in refused.items()}


@dataclass(frozen=True, slots=True)
class Mlp:
    """How an MLP is written."""

    hidden: int = 14
    gate: str = "none"
    pick: str = "split"
    order: str = "sections"
    up: Layer = MATMUL
    down: Layer = MATMUL
    targets: str = "zeros"
    activation: str = "relu"
    before: str = "none"
    """What is done with a constant of every channel before the activation, and behind it."""
    behind: str = "none"
    seen: str = "nothing"
    layer_scale: bool = False
    noise: tuple[tuple[str, str], ...] = ()

    @property
    def truth(self) -> Mapping[str, object]:
        refused = {"hidden": "output|read", "normed": ""}.get(self.seen)
        if refused is not None:
            return {"mlp": self.hidden, "cut": [], "because": {"mlp": refused}}
        return {"mlp": self.hidden, "cut": ["mlp"]}
