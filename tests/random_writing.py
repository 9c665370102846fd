"""What random networks are written with: named axes, and many ways to spell one movement.

Axes have letters: ``b`` samples, ``t`` tokens, ``u`` the tokens that are attended to, ``d``
channels of the model, ``s`` which of query, key and value, ``g`` groups of heads, ``m`` heads of a
group, ``e`` channels of a query, ``v`` of a value, ``n`` hidden channels, ``a`` gate or value.
Letters side by side are one merged axis, no letter is an axis of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import TensorProto, numpy_helper

from tests.builders import Net

Axes = tuple[str, ...]

ATTRIBUTES: Mapping[str, tuple[int, str]] = {
    "Squeeze": (13, "axes"),
    "Unsqueeze": (13, "axes"),
    "Split": (13, "split"),
    "ReduceSum": (13, "axes"),
    "ReduceMean": (18, "axes"),
    "ReduceMax": (18, "axes"),
}
"""Until which opset a second input was an attribute, and its name."""


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor and what its axes are."""

    tensor: str
    axes: Axes

    def axis(self, group: str) -> int:
        return self.axes.index(group)

    def renamed(self, **letters: str) -> Named:
        """The same tensor with other letters."""
        table = str.maketrans(letters)
        return Named(self.tensor, tuple(group.translate(table) for group in self.axes))


class Writing(Net):
    """A graph whose operators take their axes as the opset wants them."""

    def __init__(self, seed: int, *, opset: int, width: int) -> None:
        super().__init__(seed, opset=opset)
        self.spelled = "vector"
        """How a size is read off a shape."""
        self.fixed: dict[str, int] = {}
        """Sizes of samples and tokens that are the same in every run."""
        self.sizes: dict[str, int] = {"d": width}
        """Of every letter but those of samples and tokens, for the part that is being written."""
        self.tokens: dict[str, tuple[str, int]] = {}
        """The input and the axis that tell how many samples or tokens there are."""

    def __call__(self, op, *inputs, **options):
        until, name = ATTRIBUTES.get(op, (0, ""))
        if self.opset < until and len(inputs) > 1:
            inputs, options[name] = inputs[:1], list(inputs[1])
        return super().__call__(op, *inputs, **options)

    def static(self, group: str) -> int | None:
        """The size of a merged axis; None if it differs from run to run."""
        sizes = [{**self.fixed, **self.sizes}.get(letter) for letter in group]
        return None if None in sizes else prod(sizes)

    def dimensions(self, axes: Axes) -> tuple[str | int, ...]:
        """How a graph declares these axes."""
        others = "tokens" if self.tokens.get("u", ("", 1))[0] == "x" else "others"
        names = {"b": "batch", "t": "tokens", "u": others}
        return tuple(self.static(group) or names.get(group, group) for group in axes)

    def entry(self, tensor: str, axis: int) -> str:
        """The size of an axis at run time as a vector of one entry, spelled as was drawn."""
        if self.spelled == "part" and self.opset >= 15:
            return self("Shape", tensor, start=axis, end=axis + 1)
        sizes = self("Shape", tensor)
        if self.spelled == "scalar":
            return self("Unsqueeze", self("Gather", sizes, np.int64(axis), axis=0), [0])
        if self.spelled == "narrow":
            narrow = self("Slice", self("Cast", sizes, to=TensorProto.INT32), [axis], [axis + 1])
            return self("Cast", narrow, to=TensorProto.INT64)
        if self.spelled == "slice":
            return self("Slice", sizes, [axis], [axis + 1], [0])
        return self("Gather", sizes, [axis], axis=0)

    def size(self, group: str, of: Named | None = None) -> str:
        """A size at run time, as a vector of one entry, of ``of`` if that has the axis."""
        if of is not None and group in of.axes:
            return self.entry(of.tensor, of.axis(group))
        letters = [letter for letter in group if letter in self.tokens]
        known = prod(self.sizes[letter] for letter in group if letter not in self.tokens)
        made = None
        for letter in letters:
            name, axis = self.tokens[letter]
            one = self.entry(name, axis)
            made = one if made is None else self("Mul", made, one)
        return made if known == 1 else self("Mul", made, [known])

    def share(self, group: str, of: Named) -> str | None:
        """A fixed size computed from that of an axis of ``of`` which holds it."""
        for axis, whole in enumerate(of.axes):
            if group and group != whole and group in whole and self.static(whole):
                size = self.entry(of.tensor, axis)
                return self("Div", size, [self.static(whole) // self.static(group)])
        return None

    def turned(self, y: Named, axes: Axes) -> Named:
        """The same axes in another order."""
        if y.axes == axes:
            return y
        perm = [y.axes.index(group) for group in axes]
        return Named(self("Transpose", y.tensor, perm=perm), axes)

    def reshaped(self, y: Named, axes: Axes, how: str) -> Named:
        """Axes split and merged; the target is spelled ``how`` (see `TARGETS`)."""
        if y.axes == axes:
            return y
        return Named(self("Reshape", y.tensor, self._target(y, axes, how)), axes)

    def _target(self, y: Named, axes: Axes, how: str) -> str | list[int]:
        entries = self._entries(y, axes, how)
        pieces = [
            self.size(entry, y if how == "own" else None) if isinstance(entry, str) else [entry]
            for entry in entries
        ]
        if how == "own":
            shares = [self.share(group, y) for group in axes]
            last = max((i for i, made in enumerate(shares) if made), default=None)
            if last is not None:
                pieces[last] = shares[last]
        if all(isinstance(piece, list) for piece in pieces):
            return [piece[0] for piece in pieces]
        return self("Concat", *pieces, axis=0)

    def _entries(self, y: Named, axes: Axes, how: str) -> list[int | str]:
        """What a target says of every axis: a size, 0, -1, or the axis if it must be computed."""
        short = how in {"zeros", "open"}
        entries: list[int | str] = [
            static
            if (static := self.static(group)) is not None
            else 0
            if short and y.axes[place : place + 1] == (group,)
            else group
            for place, group in enumerate(axes)
        ]
        unknown = [place for place, entry in enumerate(entries) if isinstance(entry, str)]
        if len(unknown) == 1 and short:
            entries[unknown[0]] = -1
        elif how == "open" and not unknown:
            entries[max(i for i, entry in enumerate(entries) if entry != 0)] = -1
        return entries

    def placed(self, y: Named, axes: Axes) -> Named:
        """The axes of ``y`` among ``axes``, in that order, with axes of one for those it lacks."""
        y = self.turned(y, tuple(group for group in axes if group in y.axes))
        missing = [place for place, group in enumerate(axes) if group not in y.axes]
        if not missing:
            return y
        given = tuple(group if group in y.axes else "" for group in axes)
        return Named(self("Unsqueeze", y.tensor, missing), given)

    def parts(self, y: Named, axis: int, sizes: Sequence[int], how: str) -> list[str]:
        """Consecutive parts of an axis."""
        ends = np.cumsum(sizes).tolist()
        if how == "even split" and len({*sizes}) == 1:
            attrs = {"num_outputs": len(sizes)} if self.opset >= 18 else {}
            return self("Split", y.tensor, outputs=len(sizes), axis=axis, **attrs)
        if how in {"split", "even split"}:
            return self("Split", y.tensor, list(sizes), outputs=len(sizes), axis=axis)
        if how.startswith("gather"):
            ranges = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
            return [self("Gather", y.tensor, entries, axis=axis) for entries in ranges]
        bounds = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        # The last part reaches as far as there is, as exporters write it.
        bounds[-1] = (bounds[-1][0], 2**63 - 1)
        return [self("Slice", y.tensor, [start], [end], [axis]) for start, end in bounds]

    def picked(self, y: Named, group: str, how: str) -> list[Named]:
        """Every entry of an axis, which goes."""
        axis, count = y.axis(group), self.static(group)
        axes = tuple(other for other in y.axes if other != group)
        if how in {"gather", "gather back"}:
            first = 0 if how == "gather" else -count
            made = [self("Gather", y.tensor, np.int64(first + i), axis=axis) for i in range(count)]
        else:
            kept = self.parts(y, axis, [1] * count, "gather" if how == "gather one" else how)
            made = [self("Squeeze", part, [axis]) for part in kept]
        return [Named(part, axes) for part in made]

    def passed(self, y: Named, how: str | None) -> Named:
        """Movement that leaves everything where it is, where any was drawn."""
        return y if how is None else Named(NOISE[how](self, y.tensor, len(y.axes)), y.axes)


PICKS = ("split", "even split", "slice", "gather", "gather one", "gather back")
SPELLINGS = ("vector", "scalar", "slice", "part", "narrow")
TARGETS = ("zeros", "open", "computed", "own")
"""Sizes copied by 0 or left open by -1 where need be; wherever possible; read off the inputs;
or off the tensor itself, the width of a head included."""


def _round(net, y, rank):
    turned = net("Transpose", y, perm=[*range(1, rank), 0])
    return net("Transpose", turned, perm=[rank - 1, *range(rank - 1)])


def _flat(net, y, rank):
    return net("Reshape", net("Flatten", y, axis=rank - 1), net("Shape", y))


def _halves(net, y, rank):
    first = net("Slice", y, [0], [1], [-1])
    return net("Concat", first, net("Slice", y, [1], [1 << 40], [-1]), axis=-1)


NOISE: Mapping[str, Callable[[Writing, str, int], str]] = {
    "identity": lambda net, y, _: net("Identity", y),
    "cast": lambda net, y, _: net("Cast", y, to=TensorProto.FLOAT),
    "dropout": lambda net, y, _: net("Dropout", y),
    "whole slice": lambda net, y, _: net("Slice", y, [0], [1 << 40], [-1]),
    "one joined": lambda net, y, _: net("Concat", y, axis=0),
    "same shape": lambda net, y, _: net("Reshape", y, net("Shape", y)),
    "expanded": lambda net, y, _: net("Expand", y, net("Shape", y)),
    "boxed behind": lambda net, y, _: net("Squeeze", net("Unsqueeze", y, [-1]), [-1]),
    "boxed": lambda net, y, _: net("Squeeze", net("Unsqueeze", y, [1]), [1]),
    "tiled once": lambda net, y, rank: net("Tile", y, [1] * rank),
    "turned twice": _round,
    "flat": _flat,
    "halves": _halves,
}
"""Movement that changes nothing."""

MIXED_NOISE = ("identity", "cast", "dropout", "boxed", "same shape", "one joined", "turned twice")
"""What may stand between any two operators."""


WHOLE_NOISE = tuple(name for name in NOISE if name not in {"halves", "flat"})
"""What keeps every axis whole on the way; hidden channels that are not are refused."""


# Linear layers


def entered(net: Writing, x: Named, kind: str, how: str) -> Named:
    """Activations in the form that a kind of layer takes."""
    (first, second, channels) = x.axes
    if kind == "gemm":
        return net.reshaped(x, (first + second, channels), how)
    if kind == "flat gemm":
        return Named(net("Flatten", x.tensor, axis=2), (first + second, channels))
    if kind == "conv":
        return net.turned(x, (first, channels, second))
    if kind == "picture":
        y = net.turned(x, (first, channels, second))
        return Named(net("Unsqueeze", y.tensor, [3]), (*y.axes, ""))
    return x


def left(net: Writing, y: Named, axes: Axes, how: str) -> Named:
    """Back in three axes, the channels last."""
    if y.axes[-1] == "":
        y = Named(net("Squeeze", y.tensor, [3]), y.axes[:3])
    if len(y.axes) == 2:
        return net.reshaped(y, axes, "computed" if how == "own" else how)
    return net.turned(y, axes)


@dataclass(frozen=True, slots=True)
class Layer:
    """How linear layers are written."""

    kind: str = "matmul"
    bias: str = "right"
    """``none``, or on which side of an Add behind a MatMul; anything for the others."""
    weight: str = "plain"


KINDS = ("matmul", "gemm", "flat gemm", "conv", "picture", "einsum")
BIASES = ("none", "left", "right", "late", "boxed")
WEIGHTS = ("plain", "identity", "transposed", "half")


def linear(net: Writing, x: Named, layer: Layer, columns: str, rows: str = "d") -> Named:
    """A linear layer in the form that its input has."""
    sizes = net.static(rows), net.static(columns)
    weight, bias = net.random(*sizes, gain=1.2 / np.sqrt(sizes[0])), net.random(sizes[1])
    if layer.bias == "boxed" and layer.kind not in {"conv", "picture"}:
        bias = bias[None]
    axes = tuple(columns if group == rows else group for group in x.axes)
    added = [] if layer.bias == "none" else [bias]
    if layer.kind in {"conv", "picture"}:
        kernel = weight.T.reshape(*weight.T.shape, *[1] * (len(axes) - 2))
        return Named(net("Conv", x.tensor, kernel, *added), axes)
    if "gemm" in layer.kind:
        turned = layer.weight == "transposed"
        attrs = {"transB": 1, "alpha": 0.8} if turned else {"beta": 0.7}
        return Named(net("Gemm", x.tensor, weight.T if turned else weight, *added, **attrs), axes)
    if layer.kind == "einsum":
        made = net("Einsum", x.tensor, weight, equation="xyz,zw->xyw")
    else:
        made = net("MatMul", x.tensor, stored(net, weight, layer.weight))
    if layer.bias == "none":
        return Named(made, axes)
    made = net("Identity", made) if layer.bias == "late" else made
    return Named(net("Add", *((bias, made) if layer.bias == "left" else (made, bias))), axes)


def stored(net: Writing, weight: np.ndarray, how: str) -> str:
    """A weight, behind an operator or none."""
    if how == "transposed":
        return net("Transpose", weight.T, perm=[1, 0])
    name = net.const(weight)
    if how == "half":
        net.tensors[-1].CopyFrom(numpy_helper.from_array(weight.astype(np.float16), name))
        return net("Cast", name, to=TensorProto.FLOAT)
    return net("Identity", name) if how == "identity" else name


def linear_by_axes(net: Writing, x: Named, layer: Layer, columns: Axes, rows: Axes) -> Named:
    """A sum over one or several axes of a weight that has as many; its bias has them as well."""
    sizes = [net.static(group) for group in (*rows, *columns)]
    inner = np.prod(sizes[: len(rows)])
    weight = net.random(*sizes, gain=1.2 / np.sqrt(inner))
    kept = tuple(group for group in x.axes if group not in rows)
    axes = (*kept, *columns)
    letters = dict(zip(dict.fromkeys((*x.axes, *columns)), "xyzwvu", strict=False))
    given, weighed, made = (
        "".join(letters[group] for group in groups) for groups in (x.axes, (*rows, *columns), axes)
    )
    y = net("Einsum", x.tensor, weight, equation=f"{given},{weighed}->{made}")
    if layer.bias == "none":
        return Named(y, axes)
    return Named(net("Add", y, net.random(*sizes[len(rows) :])), axes)
