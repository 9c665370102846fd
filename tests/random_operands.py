"""Queries, keys and values as operands of products: repeated, rotated, normed and scaled."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from tests.random_choices import Scale
from tests.random_projections import Part
from tests.random_writing import Axes, Named

LONGEST = 32
"""Rows of tables of positions."""


class Operands(Part):
    """From channels by heads to the operands of products."""

    def _operand(self, y: Named, role: str) -> Named:
        """A projection, by heads, in the form that the products take."""
        part, net = self.part, self.net
        letter = "v" if role == "value" else "e"
        token = "t" if role == "query" else "u"
        if (
            role != "query"
            and part.shared > 1
            and part.repeat_early
            and part.operator == "none"
            and part.form != "five"
        ):
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
            return net.turned(self._one_head(y), ("b", token, letter))
        own = heads if role == "query" or heads in y.axes else "g"
        first = (heads if heads in y.axes else own, "b") if part.form == "hb" else ("b", own)
        if not (part.einsum and part.form in {"bh", "hb"}):
            y = net.turned(y, (*first, token, letter))
        if role != "query":
            y = self._repeated(y)
        if part.form == "flat":
            y = net.turned(y, ("b", heads, token, letter))
            return net.reshaped(y, ("b" + heads, token, letter), part.targets)
        if part.form == "five":
            return net.reshaped(y, ("b", *heads, token, letter), part.targets)
        return y

    def _repeated(self, y: Named) -> Named:
        """Every group of keys or values as often as it has heads."""
        net, part = self.net, self.part
        heads = part.heads
        if part.shared == 1 or part.operator != "none" or "g" not in y.axes:
            return y  # alone, left to the operator, repeated already, or merged with samples
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

    def _fitted(self, y: Named, axes: Axes) -> Named:
        """What meets logits or mixed values, in their form."""
        net, part, heads = self.net, self.part, self.part.heads
        if part.form == "five" and heads in y.axes:
            axis = y.axis(heads)
            y = net.reshaped(y, (*y.axes[:axis], *heads, *y.axes[axis + 1 :]), "computed")
        if part.form == "single":
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

    def _one_head(self, y: Named) -> Named:
        """Without the axis of heads, if there is one."""
        if "g" not in y.axes:
            return y
        axes = tuple(group for group in y.axes if group != "g")
        return Named(self.net("Squeeze", y.tensor, [y.axis("g")]), axes)

    def _rows(self, table: np.ndarray, *letters: str) -> Named:
        """The first rows of a table, as many as there are tokens."""
        name = self.net("Slice", table, [0], self.net.size(letters[0]), [0])
        return Named(name, letters)
