"""Queries, keys and values out of linear layers: separate or packed, and split into heads."""

from __future__ import annotations

from tests.random_choices import Attention
from tests.random_writing import (
    Axes,
    Layer,
    Named,
    Writing,
    entered,
    left,
    linear,
    linear_by_axes,
)


class Part:
    """What is written of one attention, into a graph."""

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

    def _passed(self, y: Named, place: str) -> Named:
        return self.net.passed(y, self.noise.get(place))


class Projections(Part):
    """From activations to the channels of every role, by heads."""

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
