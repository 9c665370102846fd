"""Transformers drawn at random: every way of writing a part meets every way of writing the others.

A network is a record of choices, from which its graph is built. Axes have letters: ``b`` samples,
``t`` tokens, ``r`` both in one, ``c`` channels, ``s`` which of query, key and value, ``h`` heads,
``e`` channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto

from tests.builders import Expected, Net, Tiny

LONGEST = 64
"""Rows of tables of positions."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A factor of an operand or of the logits."""

    place: str
    op: str
    source: str


@dataclass(frozen=True, slots=True)
class Attention:
    """How an attention is written."""

    heads: int
    kv_heads: int
    head_width: int
    value_width: int
    layer: str
    packing: str
    order: str
    pick: str
    picked_first: bool
    biases: str
    bias_side: str
    products: str
    keys_turned: str
    targets: str
    repeat: str
    scales: tuple[Scale, ...]
    queries: str
    mask: str
    capped: bool
    softmax: str
    merge: str
    output: str
    layer_scale: bool
    passing: tuple[tuple[str, str], ...]

    @property
    def truth(self) -> Expected:
        axes = ("vo",) if self.queries != "plain" or self.capped else ("qk", "vo")
        sizes = (self.heads, self.kv_heads, self.head_width, self.value_width)
        return ("attention", *sizes, axes)

    def size(self, role: str) -> int:
        return self.value_width if role == "value" else self.head_width

    def count(self, role: str) -> int:
        return self.heads if role == "query" else self.kv_heads


@dataclass(frozen=True, slots=True)
class Mlp:
    """How an MLP is written."""

    hidden: int
    form: str
    up: str
    down: str
    biases: str
    bias_side: str
    activation: str
    vector: str
    layer_scale: bool
    passing: tuple[tuple[str, str], ...]

    @property
    def truth(self) -> Expected:
        return ("mlp", self.hidden)


@dataclass(frozen=True, slots=True)
class Network:
    """All choices that make a network."""

    seed: int
    opset: int
    width: int
    norm: str
    norm_placed: str
    parts: tuple[Attention | Mlp, ...]


def built(network: Network) -> Tiny:
    """The model of a network, and the blocks that are in it."""
    net = Versioned(network.seed, opset=network.opset)
    y = net.input("x", "batch", "tokens", network.width)
    for part in network.parts:
        branch = norm(net, network, y) if network.norm_placed == "before" else y
        writer = _Attention(net, part) if isinstance(part, Attention) else _Mlp(net, part)
        y = net("Add", y, writer.write(branch, network.width))
        if network.norm_placed == "behind":
            y = norm(net, network, y)
    return Tiny(net.build(y), tuple(part.truth for part in network.parts))


class Versioned(Net):
    """A graph whose operators take their axes as their opset wants them."""

    ATTRIBUTES: Mapping[str, tuple[int, str]] = {
        "Squeeze": (13, "axes"),
        "Unsqueeze": (13, "axes"),
        "Split": (13, "split"),
        "ReduceSum": (13, "axes"),
        "ReduceMean": (18, "axes"),
        "ReduceMax": (18, "axes"),
    }
    """Until which opset a second input was an attribute, and its name."""

    def __call__(self, op, *inputs, **options):
        since, name = self.ATTRIBUTES.get(op, (0, ""))
        if self.opset < since and len(inputs) > 1:
            inputs, options[name] = inputs[:1], list(inputs[1])
        return super().__call__(op, *inputs, **options)

    def size(self, axis: int, of: str = "x") -> str:
        """The size of an axis at run time, as a vector of one entry."""
        return self("Gather", self("Shape", of), [axis], axis=0)

    def turned(self, y: str, given: str, wanted: str) -> str:
        """Axes in another order."""
        perm = [given.index(letter) for letter in wanted]
        return y if given == wanted else self("Transpose", y, perm=perm)


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor and the letters of its axes."""

    tensor: str
    axes: str

    @property
    def channels(self) -> int:
        return self.axes.index("c")


class _Writer:
    """What both kinds of blocks are written with."""

    def __init__(self, net: Versioned, part: Attention | Mlp) -> None:
        self.net, self.part, self.passing = net, part, dict(part.passing)

    def passed(self, y: str, place: str) -> str:
        """An operator that changes nothing, where one was drawn."""
        op = self.passing.get(place)
        if op is None:
            return y
        return self.net(op, y, **({"to": TensorProto.FLOAT} if op == "Cast" else {}))

    def entered(self, x: str, kind: str, width: int) -> Named:
        """``[b, t, c]`` in the form that a kind of layer takes."""
        if kind == "gemm":
            return Named(self.net("Reshape", x, [-1, width]), "rc")
        if kind == "conv":
            return Named(self.net("Transpose", x, perm=[0, 2, 1]), "bct")
        return Named(x, "btc")

    def left(self, y: Named, width: int) -> str:
        """Back as ``[b, t, c]``."""
        if y.axes == "rc":
            sizes = [self.net.size(0), self.net.size(1), [width]]
            return self.net("Reshape", y.tensor, self.net("Concat", *map(self._vector, sizes), axis=0))
        return self.net.turned(y.tensor, y.axes, "btc")

    def linear(self, x: Named, kind: str, rows: int, columns: int, *, bias: bool) -> Named:
        """A linear layer of a kind, in the form that it takes."""
        net = self.net
        weight = net.random(rows, columns, gain=1.2 / np.sqrt(rows))
        added = net.random(columns)
        if kind == "conv":
            kernel = weight.T[:, :, None]
            return Named(net("Conv", x.tensor, kernel, *([added] if bias else [])), x.axes)
        if kind == "gemm":
            turned = net.rng.random() < 0.5
            attrs = {"transB": 1, "alpha": 0.8} if turned else {"beta": 0.7}
            given = [weight.T if turned else weight, *([added] if bias else [])]
            return Named(net("Gemm", x.tensor, *given, **attrs), x.axes)
        if kind == "einsum":
            y = net("Einsum", x.tensor, weight, equation="btc,cd->btd")
        else:
            y = net("MatMul", x.tensor, weight)
        return Named(self.biased(y, added) if bias else y, x.axes)

    def biased(self, y: str, added: np.ndarray) -> str:
        if self.part.bias_side == "late":
            y = self.net("Identity", y)
        return self.net("Add", *((added, y) if self.part.bias_side == "left" else (y, added)))

    def finished(self, y: str, width: int) -> str:
        return self.net("Mul", y, self.net.random(width, gain=1.0)) if self.part.layer_scale else y

    def split(self, y: Named, letters: str, sizes: Sequence[int], targets: str = "zeros") -> Named:
        """Channels as several axes; tokens and samples apart, if heads are among them."""
        rows = y.axes == "rc" and "h" in letters
        axes = ("btc" if rows else y.axes).replace("c", letters)
        if rows or (targets == "computed" and y.axes == "btc"):
            pieces = [self.net.size(0), self.net.size(1), list(sizes)]
        elif targets == "open" and y.axes == "btc":
            pieces = [[-1], self.net.size(1), list(sizes)]
        else:
            first = {"btc": [0, 0], "bct": [0], "rc": [-1]}[y.axes]
            pieces = [[*first, *sizes, *([-1] if y.axes == "bct" else [])]]
        target = pieces[0] if len(pieces) == 1 else self.net("Concat", *pieces, axis=0)
        return Named(self.net("Reshape", y.tensor, target), axes)

    def parts(self, y: str, axis: int, sizes: Sequence[int], how: str) -> list[str]:
        """Consecutive parts of an axis."""
        if how == "split":
            return self.net("Split", y, list(sizes), outputs=len(sizes), axis=axis)
        ends = np.cumsum(sizes)
        return [
            self.net("Slice", y, [end - size], [end], [axis])
            for end, size in zip(ends.tolist(), sizes, strict=True)
        ]

    def picked(self, y: Named, letter: str, count: int, how: str) -> list[Named]:
        """Every entry of an axis, which goes."""
        axis, axes = y.axes.index(letter), y.axes.replace(letter, "")
        if how == "gather":
            made = [self.net("Gather", y.tensor, np.int64(i), axis=axis) for i in range(count)]
        else:
            kept = self.parts(y.tensor, axis, [1] * count, how)
            made = [self.net("Squeeze", part, [axis]) for part in kept]
        return [Named(part, axes) for part in made]

    @staticmethod
    def _vector(size):
        return size
