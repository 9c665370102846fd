"""Attention written in a random way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from tests.random_writing import Axes, Layer, Named, Writing, entered, left, linear, linear_by_axes

LONGEST = 32
"""Rows of tables of positions."""

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
    layers: Layer = Layer()
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
    output: Layer = Layer()
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
            (self.capped, ("qk",), "Tanh"),
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


class AttentionWriter:
    """Writes one attention into a graph."""

    def __init__(self, net: Writing, part: Attention) -> None:
        self.net, self.part, self.noise = net, part, dict(part.noise)
        net.sizes |= {"g": part.groups, "m": part.shared, "e": part.width, "v": part.value_width}
        net.sizes |= {"s": 2 if part.packing == "kv" else 3}
        net.tokens |= {"u": ("other", 1) if part.cross else ("x", 1)}
        attended = net.fixed.get("u" if part.cross else "t")
        net.sizes.pop("u", None)
        net.sizes |= {"u": attended} if attended else {}
        self.given = net.dimensions(("b", "u"))
        self.lead = {
            "bh": ("b", part.heads),
            "hb": (part.heads, "b"),
            "flat": ("b" + part.heads,),
            "five": ("b", *part.heads),
            "single": ("b",),
        }[part.form]
        self.outputs: list[Named] = []

    def write(self, x: str) -> str:
        """The tensor ``[b, t, d]`` behind the output projection of an attention to ``x``."""
        own = self._entry(Named(x, ("b", "t", "d")), "entry")
        other = self._entry(Named("other", ("b", "u", "d")), "entry") if self.part.cross else own
        query, key, value = self._operands(own, other)
        self.query = query
        logits = self._masked(self._scaled(self._logits(query, key), "logits"))
        weights = self._passed(self._softmax(self._passed(logits, "logits")), "probabilities")
        mixed = self._gated(self._passed(self._mixed(weights, value), "mixed"), x)
        return self._output(mixed)

    def _passed(self, y: Named, place: str) -> Named:
        return self.net.passed(y, self.noise.get(place))

    def _entry(self, x: Named, place: str) -> Named:
        batch, tokens, channels = x.axes
        axes = (tokens, batch, channels) if self.part.tokens_first else x.axes
        return self._passed(self.net.turned(x, axes), place)

    # Projections

    def _operands(self, own: Named, other: Named) -> tuple[Named, Named, Named]:
        part = self.part
        if part.packing == "qkv":
            made = self._packed(own, ROLES)
        elif part.packing == "kv":
            made = [self._alone(own, "query"), *self._packed(other, ROLES[1:])]
        else:
            made = [self._alone(own if role == "query" else other, role) for role in ROLES]
        made[1:] = [y.renamed(t="u") for y in made[1:]]
        made = [self._operand(y, role) for y, role in zip(made, ROLES, strict=True)]
        if part.seen == "cache":
            self.outputs += made[1:]
        if part.seen == "query":
            self.outputs.append(self._summed(made[0]))
        return made[0], made[1], made[2]

    def _look_at(self, y: Named, role: str) -> None:
        """Let somebody else read the layer of the queries, if that was drawn."""
        if role == "query" and self.part.seen == "query layer":
            self.outputs.append(self._summed(y))

    def _summed(self, y: Named) -> Named:
        """Somebody else's view of a tensor."""
        return Named(self.net("ReduceMax", y.tensor, [-1], keepdims=0), y.axes[:-1])

    def _columns(self, role: str) -> str:
        """The letters of a layer's output channels."""
        return {"query": self.part.heads + "e", "key": "ge", "value": "gv"}[role]

    def _layer(self, role: str) -> Layer:
        layers = self.part.layers
        return Layer(layers.kind, "none", layers.weight) if role in self.part.unbiased else layers

    def _projected(self, x: Named, columns: str, role: str) -> Named:
        how = "zeros" if self.part.targets == "own" else self.part.targets
        y = linear(
            self.net, entered(self.net, x, self._layer(role).kind, how), self._layer(role), columns
        )
        self._look_at(y, role)
        y = self._passed(y, f"{role} layer")
        return Named(self.net("Squeeze", y.tensor, [3]), y.axes[:3]) if y.axes[-1] == "" else y

    def _alone(self, x: Named, role: str) -> Named:
        columns = self._columns(role)
        if self.part.packing == "heads":
            return self._by_head(x, role)
        if self.part.packing == "einsum":
            letters = (columns[:-1], columns[-1])
            y = linear_by_axes(self.net, x, self._layer(role), letters, ("d",))
            self._look_at(y, role)
            return self._passed(y, f"{role} split")
        y = self._projected(x, columns, role)
        y = self._scaled(y, f"{role} layer")
        return self._apart(y, (columns[:-1], columns[-1]), x.axes)

    def _by_head(self, x: Named, role: str) -> Named:
        """One layer for every head, joined behind."""
        columns = self._columns(role)
        heads = [
            linear(self.net, x, Layer("matmul", self._layer(role).bias), columns[-1])
            for _ in range(self.net.static(columns[:-1]))
        ]
        joined = self.net("Concat", *(y.tensor for y in heads), axis=-1)
        y = Named(joined, (*x.axes[:-1], columns))
        self._look_at(y, role)
        return self._apart(y, (columns[:-1], columns[-1]), x.axes)

    def _apart(self, y: Named, letters: Axes, given: Axes) -> Named:
        """Channels as several axes, samples and tokens as ``given``."""
        part, columns = self.part, "".join(letters)
        tokens = given[:2]
        if part.early and part.form == "flat" and part.tokens_first and len(letters) == 2:
            if y.axes[0] != tokens[0] or y.axes[1] != tokens[1]:
                y = left(self.net, y, (*tokens, columns), part.targets)
            return self.net.reshaped(
                y, (tokens[0], tokens[1] + letters[0], letters[1]), part.targets
            )
        if part.form == "single" and len(letters) == 2:
            y = left(self.net, y, (*tokens, columns), "computed") if len(y.axes) == 2 else y
            return Named(y.tensor, tuple(letters[1] if a == columns else a for a in y.axes))
        channels = y.axes.index(columns)
        if len(y.axes) == 2:
            return self.net.reshaped(y, (*tokens, *letters), part.targets)
        return self.net.reshaped(
            y, (*y.axes[:channels], *letters, *y.axes[channels + 1 :]), part.targets
        )

    def _packed(self, x: Named, roles: tuple[str, ...]) -> list[Named]:
        part, net = self.part, self.net
        if part.order == "sections":
            return self._sections(x, roles)
        net.sizes["s"] = len(roles)
        y = self._projected(x, part.order, roles[0])
        y = self._apart(y, tuple(part.order), x.axes)
        if part.picked_first:
            y = net.turned(y, ("s", *(group for group in y.axes if group != "s")))
        picked = [
            self._passed(one, f"{r} split")
            for one, r in zip(net.picked(y, "s", part.pick), roles, strict=True)
        ]
        return [
            y.renamed(e="v") if role == "value" else y
            for y, role in zip(picked, roles, strict=True)
        ]

    def _sections(self, x: Named, roles: tuple[str, ...]) -> list[Named]:
        """Queries, keys and values side by side, of any width."""
        net, columns = self.net, [self._columns(role) for role in roles]
        sizes = [net.static(group) for group in columns]
        net.sizes["c"] = sum(sizes)
        y = self._projected(x, "c", roles[0])
        axis = y.axis("c")
        made = net.parts(y, axis, sizes, self.part.pick)
        found = []
        for tensor, group, role in zip(made, columns, roles, strict=True):
            one = Named(tensor, (*y.axes[:axis], group, *y.axes[axis + 1 :]))
            one = self._passed(one, f"{role} split")
            found.append(self._apart(one, (group[:-1], group[-1]), x.axes))
        return found

    # Operands

    def _operand(self, y: Named, role: str) -> Named:
        """A projection, by heads, in the form that the products take."""
        part, net = self.part, self.net
        letter = "v" if role == "value" else "e"
        token = "t" if role == "query" else "u"
        if role != "query" and part.shared > 1 and part.repeat_early and part.form != "five":
            y = self._repeated(y)
        if role != "query" and part.form == "five":
            axes = ("b", "g", token, letter)
            y = net.turned(y, axes)
            y = Named(net("Unsqueeze", y.tensor, [2]), ("b", "g", "", token, letter))
        else:
            y = self._led(y, role, token, letter)
        y = self._adorned(y, role)
        return self._passed(self._scaled(y, role), f"{role} operand")

    def _led(self, y: Named, role: str, token: str, letter: str) -> Named:
        part, net, heads = self.part, self.net, self.part.heads
        merged = "b" + (heads if role == "query" or part.shared == 1 else "g")
        if merged in y.axes:
            y = net.turned(y, (merged, token, letter))
            if role == "query" or part.shared == 1:
                return y
            y = net.reshaped(y, ("b", "g", token, letter), "computed")
        if part.form == "single":
            if "g" in y.axes:
                y = self._one_head(y)
            return net.turned(y, ("b", token, letter))
        own = heads if role == "query" or heads in y.axes else "g"
        first = (heads if heads in y.axes else own, "b") if part.form == "hb" else ("b", own)
        if not (part.einsum and part.form in {"bh", "hb"}):
            y = net.turned(y, (*first, token, letter))
        if role != "query" and part.shared > 1 and heads not in y.axes:
            y = self._repeated(y)
        if part.form == "flat":
            y = net.turned(y, ("b", heads, token, letter))
            return net.reshaped(y, ("b" + heads, token, letter), part.targets)
        if part.form == "five":
            return net.reshaped(y, ("b", *heads, token, letter), part.targets)
        return y

    def _one_head(self, y: Named) -> Named:
        """Without the axis of heads."""
        axes = tuple(group for group in y.axes if group != "g")
        return Named(self.net("Squeeze", y.tensor, [y.axis("g")]), axes)

    def _repeated(self, y: Named) -> Named:
        """Every group of keys or values as often as it has heads."""
        net, part = self.net, self.part
        heads = part.heads
        if "g" not in y.axes:  # merged with samples, by one Reshape
            return y
        axis = y.axis("g")
        made = (*y.axes[:axis], heads, *y.axes[axis + 1 :])
        if part.repeat == "gather":
            index = np.repeat(np.arange(part.groups), part.shared)
            return Named(net("Gather", y.tensor, index, axis=axis), made)
        if part.repeat == "concat":
            return Named(net("Concat", *[y.tensor] * part.shared, axis=axis), made)
        if part.repeat == "tile":
            counts = [part.shared if place == axis else 1 for place in range(len(y.axes))]
            return Named(net("Tile", y.tensor, counts), made)
        boxed = net("Unsqueeze", y.tensor, [axis + 1])
        wide = (*y.axes[: axis + 1], "m", *y.axes[axis + 1 :])
        if part.repeat == "joined":
            many = Named(net("Concat", *[boxed] * part.shared, axis=axis + 1), wide)
            return net.reshaped(many, made, part.targets)
        if part.repeat == "expand":
            ones = [1] * len(wide)
            ones[axis + 1] = part.shared
            target = ones
        else:
            target = net(
                "Concat",
                *(
                    net.size(group, y) if net.static(group) is None else [net.static(group)]
                    for group in wide
                ),
                axis=0,
            )
        many = Named(net("Expand", boxed, target), wide)
        return net.reshaped(many, made, part.targets)

    def _adorned(self, y: Named, role: str) -> Named:
        """Positions, norms and shifts of queries and keys."""
        part, net = self.part, self.net
        if role == "value":
            return y
        if part.shift and role == "query" and part.heads in y.axes:
            heads = part.heads
            shift = Named(net.const(net.random(net.static(heads), part.width)), (heads, "e"))
            y = Named(net("Add", y.tensor, net.placed(shift, y.axes).tensor), y.axes)
        if part.queries == "rotated":
            return self._rotated(y)
        if part.queries == "l2":
            square = net("ReduceSum", net("Mul", y.tensor, y.tensor), [y.axis("e")], keepdims=1)
            return Named(net("Div", y.tensor, net("Sqrt", net("Add", square, 0.1))), y.axes)
        if part.queries == "normed":
            axis = [y.axis("e")]
            centred = net("Sub", y.tensor, net("ReduceMean", y.tensor, axis, keepdims=1))
            square = net("ReduceMean", net("Mul", centred, centred), axis, keepdims=1)
            return Named(net("Div", centred, net("Sqrt", net("Add", square, 0.1))), y.axes)
        return y

    def _rotated(self, y: Named) -> Named:
        net, width = self.net, self.part.width
        angles = np.arange(LONGEST)[:, None] * 10.0 ** -np.arange(width // 2)
        token = "t" if "t" in y.axes else "u"
        cosine, sine = (
            net.placed(self._rows(np.concatenate([f(angles)] * 2, axis=1), token, "e"), y.axes)
            for f in (np.cos, np.sin)
        )
        first, second = net.parts(y, y.axis("e"), [width // 2] * 2, "slice")
        half = net("Concat", net("Neg", second), first, axis=y.axis("e"))
        straight, turned = net("Mul", y.tensor, cosine.tensor), net("Mul", half, sine.tensor)
        return Named(net("Add", straight, turned), y.axes)

    def _rows(self, table: np.ndarray, *letters: str) -> Named:
        """The first rows of a table, as many as there are tokens."""
        name = self.net("Slice", table, [0], self.net.size(letters[0]), [0])
        return Named(name, letters)

    def _scaled(self, y: Named, place: str) -> Named:
        for scale in self.part.scales:
            if scale.place == place or (scale.place == "both" and place in {"query", "key"}):
                y = self._scaled_by(y, scale)
        return y

    def _scaled_by(self, y: Named, scale: Scale) -> Named:
        net, width = self.net, self.part.width
        power = 0.25 if scale.place == "both" else 0.5
        sign = 1 if scale.op == "Div" else -1
        if scale.source == "constant":
            factor = net.const(width ** (sign * power))
        elif scale.source == "vector" and y.axes[-1] in {"e", "v"}:
            factor = net.const(np.exp(net.random(net.static(y.axes[-1]))))
        else:
            factor = self._from_shape(y, sign * power)
        return Named(net(scale.op, y.tensor, factor), y.axes)

    def _from_shape(self, y: Named, power: float) -> str:
        """A power of the width of a head, read off the shape of the operand where it has one."""
        net = self.net
        axis = next((i for i, group in enumerate(y.axes) if group in {"e", "v"}), None)
        if axis is None:
            size = net("Gather", net("Shape", self.query.tensor), np.int64(self.query.axis("e")))
        else:
            size = net("Gather", net("Shape", y.tensor), np.int64(axis))
        root = net("Sqrt", net("Cast", size, to=TensorProto.FLOAT))
        root = root if abs(power) == 0.5 else net("Sqrt", root)
        return root if power > 0 else net("Div", 1.0, root)

    # Products

    def _logits(self, query: Named, key: Named) -> Named:
        net, part = self.net, self.part
        rows, columns = ("u", "t") if part.keys_left else ("t", "u")
        if part.einsum and part.form != "five":
            left, right = (key, query) if part.keys_left else (query, key)
            equation = (
                f"{self._sum(left)},{self._sum(right)}->{self._sum_of((*self.lead, rows, columns))}"
            )
            return Named(
                net("Einsum", left.tensor, right.tensor, equation=equation),
                (*self.lead, rows, columns),
            )
        first, second = (key, query) if part.keys_left else (query, key)
        lead = second.axes[:-2]
        if part.key_turned == "chain" and len(lead) == 2:
            axes = (lead[0], columns, lead[1], "e")
            second = net.turned(net.turned(second, axes), (*lead, "e", columns))
        else:
            second = net.turned(second, (*lead, "e", columns))
        return Named(net("MatMul", first.tensor, second.tensor), (*self.lead, rows, columns))

    def _sum(self, y: Named) -> str:
        return self._sum_of(y.axes)

    def _sum_of(self, axes: Axes) -> str:
        """One letter for every axis."""
        return "".join(
            {"b" + self.part.heads: "z", self.part.heads: "h"}.get(group, group) for group in axes
        )

    def _mixed(self, weights: Named, value: Named) -> Named:
        net, part = self.net, self.part
        if part.einsum and part.form != "five":
            axes = (*self.lead, "t", "v")
            equation = f"{self._sum(weights)},{self._sum(value)}->{self._sum_of(axes)}"
            return Named(net("Einsum", weights.tensor, value.tensor, equation=equation), axes)
        if part.keys_left:
            lead = value.axes[:-2]
            turned = net.turned(value, (*lead, "v", "u"))
            return Named(net("MatMul", turned.tensor, weights.tensor), (*self.lead, "v", "t"))
        return Named(net("MatMul", weights.tensor, value.tensor), (*self.lead, "t", "v"))

    # Logits

    def _masked(self, logits: Named) -> Named:
        net, part = self.net, self.part
        if part.capped:
            small = net("Tanh", net("Div", logits.tensor, 3.0))
            logits = Named(net("Mul", small, 3.0), logits.axes)
        if part.bias != "none":
            bias = self._fitted(self._relative(), logits.axes)
            logits = Named(net("Add", logits.tensor, bias.tensor), logits.axes)
        if part.mask == "added":
            mask = self._fitted(self._given("added"), logits.axes)
            return Named(net("Add", logits.tensor, mask.tensor), logits.axes)
        if part.mask in {"keeps", "drops"}:
            mask = self._fitted(self._given(part.mask), logits.axes)
            options = (logits.tensor, net.const(-1e4))
            options = options if part.mask == "keeps" else options[::-1]
            return Named(net("Where", mask.tensor, *options), logits.axes)
        if part.mask == "computed":
            mask = self._fitted(self._given("seen"), logits.axes)
            gap = net("Mul", net("Sub", 1.0, net("Cast", mask.tensor, to=TensorProto.FLOAT)), -1e4)
            return Named(net("Add", gap, logits.tensor), logits.axes)
        if part.mask == "causal":
            later = self._fitted(self._places("Greater", "ut"), logits.axes)
            return Named(net("Where", later.tensor, net.const(-1e4), logits.tensor), logits.axes)
        return logits

    def _places(self, op: str, letters: str) -> Named:
        """The places of two tokens, compared."""
        net = self.net
        places = [
            net("Range", np.int64(0), net("Squeeze", net.size(letter), [0]), np.int64(1))
            for letter in letters
        ]
        columns = [net("Unsqueeze", y, ["tu".index(a) ^ 1]) for a, y in zip(letters, places, strict=True)]
        return Named(net(op, *columns), ("t", "u"))

    def _given(self, kind: str) -> Named:
        """A mask ``[b, u]`` that is an input."""
        tokens = "others" if self.part.cross else "tokens"
        name = f"{kind}_of_{tokens}"
        dtype = {"added": np.float32, "seen": np.int64}.get(kind, np.bool_)
        if all(value.name != name for value in self.net.inputs):
            self.net.input(name, *self.given, dtype=dtype)
        return Named(name, ("b", "u"))

    def _relative(self) -> Named:
        """A bias of every head and pair of tokens."""
        net, heads = self.net, self.part.heads
        count = net.static(heads)
        if self.part.bias == "constant":
            rows = self._rows(net.random(LONGEST, LONGEST, count, gain=1.0), "t", "u", heads)
            return Named(net("Slice", rows.tensor, [0], net.size("u"), [1]), rows.axes)
        pairs = self._places("Sub", "tu").tensor
        table = net.random(2 * LONGEST, count, gain=1.0)
        return Named(
            net("Gather", table, net("Add", pairs, np.int64(LONGEST)), axis=0), ("t", "u", heads)
        )

    def _fitted(self, y: Named, axes: Axes) -> Named:
        """What meets logits or mixed values, in their form."""
        net, part, heads = self.net, self.part, self.part.heads
        if part.form == "five" and heads in y.axes:
            axis = y.axis(heads)
            y = net.reshaped(y, (*y.axes[:axis], *heads, *y.axes[axis + 1 :]), "computed")
        if part.form == "single" and heads in y.axes:
            y = self._one_head(y)
        if part.form != "flat":
            return net.placed(y, axes)
        if "b" not in y.axes and heads not in y.axes:
            return net.placed(y, axes)
        apart = net.placed(y, ("b", heads, *axes[1:]))
        ones = [[1]] * (len(axes) - 1)
        wide = net("Concat", net.size("b"), [net.static(heads)], *ones, axis=0)
        many = Named(net("Expand", apart.tensor, wide), ("b", heads, *apart.axes[2:]))
        return net.reshaped(many, ("b" + heads, *many.axes[2:]), "computed")

    def _softmax(self, logits: Named) -> Named:
        net, part = self.net, self.part
        axis, rank = logits.axis("u"), len(logits.axes)
        axis = axis if part.softmax in {"positive", "float"} else axis - rank
        if part.softmax in {"whole", "positive"}:
            return Named(net("Softmax", logits.tensor, axis=axis), logits.axes)
        given = logits.tensor
        if part.softmax == "shifted":
            given = net("Sub", given, net("ReduceMax", given, [axis], keepdims=1))
        powers = net("Exp", given)
        return Named(net("Div", powers, net("ReduceSum", powers, [axis], keepdims=1)), logits.axes)

    # Output

    def _gated(self, mixed: Named, x: str) -> Named:
        net, part, heads = self.net, self.part, self.part.heads
        if part.gate == "none":
            return mixed
        if part.gate == "constant":
            gate = Named(net.const(net.random(net.static(heads), gain=1.0)), (heads,))
        else:
            columns = heads if part.gate == "head" else heads + "v"
            y = linear(net, Named(x, ("b", "t", "d")), Layer(), columns)
            gate = Named(net("Sigmoid", y.tensor), y.axes)
            if part.gate == "channel":
                gate = net.reshaped(gate, ("b", "t", heads, "v"), "zeros")
        gate = self._fitted(gate, mixed.axes)
        return Named(net("Mul", mixed.tensor, gate.tensor), mixed.axes)

    def _output(self, mixed: Named) -> str:
        net, part, heads = self.net, self.part, self.part.heads
        outer = ("t", "b") if part.tokens_first else ("b", "t")
        if part.summed:
            y = self._by_heads(mixed)
            y = linear_by_axes(net, y, part.output, ("d",), (heads, "v"))
            return self._finished(net.turned(y, ("b", "t", "d")))
        if part.early and part.form == "flat" and part.tokens_first and not part.head_major:
            y = net.turned(mixed, ("t", "b" + heads, "v"))
            y = net.reshaped(y, ("t", "b", heads + "v"), part.targets)
        else:
            y = self._by_heads(mixed)
            inner = ("v", heads) if part.head_major else (heads, "v")
            y = net.turned(y, (*outer, *inner))
            y = net.reshaped(y, (*outer, "".join(inner)), part.targets)
        y = self._passed(y, "merged")
        columns = y.axes[-1]
        y = linear(net, entered(net, y, part.output.kind, "computed"), part.output, "d", columns)
        y = left(net, y, (*outer, "d"), "computed")
        return self._finished(net.turned(y, ("b", "t", "d")))

    def _finished(self, y: Named) -> str:
        net, part = self.net, self.part
        return net("Mul", y.tensor, net.random(net.sizes["d"])) if part.layer_scale else y.tensor

    def _by_heads(self, mixed: Named) -> Named:
        """Mixed values with samples and heads on axes of their own."""
        net, part, heads = self.net, self.part, self.part.heads
        last = mixed.axes[-2:]
        if part.form == "single":
            return Named(net("Unsqueeze", mixed.tensor, [1]), ("b", heads, *last))
        if part.form == "flat":
            return net.reshaped(mixed, ("b", heads, *last), part.targets)
        if part.form == "five":
            return net.reshaped(mixed, ("b", heads, *last), part.targets)
        return mixed
