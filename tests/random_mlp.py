"""MLPs written in a random way."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tests.random_choices import Mlp
from tests.random_writing import Named, Writing, entered, left, linear


def _erf(net, y):
    inner = net("Add", net("Erf", net("Div", y, np.sqrt(2.0))), 1.0)
    return net("Mul", net("Mul", y, inner), 0.5)


def _tanh(net, y):
    cubic = net("Add", y, net("Mul", net("Pow", y, 3.0), 0.044715))
    inner = net("Add", net("Tanh", net("Mul", cubic, np.sqrt(2 / np.pi))), 1.0)
    return net("Mul", net("Mul", y, 0.5), inner)


def _cubed(net, y):
    cubic = net("Mul", net("Mul", y, y), y)
    inner = net("Mul", net("Add", y, net("Mul", cubic, 0.044715)), np.sqrt(2 / np.pi))
    return net("Mul", y, net("Mul", net("Add", net("Tanh", inner), 1.0), 0.5))


def _selected(net, y):
    return net("Where", net("Greater", y, 0.0), y, net("Mul", y, 0.1))


def _fast(net, y):
    return net("Mul", y, net("Sigmoid", net("Mul", y, 1.702)))


def _hard(net, y):
    return net("Div", net("Mul", y, net("Clip", net("Add", y, 3.0), 0.0, 6.0)), 6.0)


ACTIVATIONS: Mapping[str, tuple[int, Callable[[Writing, str], str]]] = {
    "relu": (11, lambda net, y: net("Relu", y)),
    "erf gelu": (11, _erf),
    "tanh gelu": (11, _tanh),
    "cubed gelu": (11, _cubed),
    "quick gelu": (11, _fast),
    "silu": (11, lambda net, y: net("Mul", net("Sigmoid", y), y)),
    "softplus": (11, lambda net, y: net("Mul", y, net("Tanh", net("Softplus", y)))),
    "elu": (11, lambda net, y: net("Elu", y, alpha=0.7)),
    "leaky": (11, lambda net, y: net("LeakyRelu", y, alpha=0.2)),
    "selected": (11, _selected),
    "hard": (11, _hard),
    "squared": (11, lambda net, y: net("Pow", net("Relu", y), 2.0)),
    "hard op": (14, lambda net, y: net("HardSwish", y)),
    "mish": (18, lambda net, y: net("Mish", y)),
    "gelu": (20, lambda net, y: net("Gelu", y)),
    "gelu tanh": (20, lambda net, y: net("Gelu", y, approximate="tanh")),
}
"""Since which opset, and how."""

VECTORS = ("none", "mul", "add", "prelu", "div", "sub left", "single")


class MlpWriter:
    """Writes one MLP into a graph."""

    def __init__(self, net: Writing, part: Mlp) -> None:
        self.net, self.part, self.noise = net, part, dict(part.noise)
        net.sizes |= {"n": part.hidden, "a": 2}
        self.outputs: list[Named] = []

    def write(self, x: str) -> str:
        """The tensor ``[b, t, d]`` behind an MLP of ``x``."""
        net, part = self.net, self.part
        given = self._passed(Named(x, ("b", "t", "d")), "entry")
        entry = entered(net, given, part.up.kind, part.targets)
        hidden = self._passed(self._gated(entry), "hidden")
        if part.seen == "hidden":
            self.outputs.append(hidden)
        if part.seen == "normed":
            hidden = self._normed(hidden)
        hidden = self._entered_again(hidden)
        y = linear(net, hidden, part.down, "d", "n")
        y = left(net, y, ("b", "t", "d"), "computed")
        return net("Mul", y.tensor, net.random(net.sizes["d"])) if part.layer_scale else y.tensor

    def _passed(self, y: Named, place: str) -> Named:
        return self.net.passed(y, self.noise.get(place))

    def _entered_again(self, hidden: Named) -> Named:
        """The hidden tensor in the form that the down projection takes."""
        if self.part.up.kind == self.part.down.kind:
            return hidden
        three = left(self.net, hidden, ("b", "t", "n"), "computed")
        return entered(self.net, three, self.part.down.kind, self.part.targets)

    def _gated(self, x: Named) -> Named:
        net, part = self.net, self.part
        if part.gate == "none":
            return self._active(self._passed(linear(net, x, part.up, "n"), "up"))
        if part.gate == "two":
            gate, up = (
                self._passed(linear(net, x, part.up, "n"), place) for place in ("gate", "up")
            )
        else:
            gate, up = self._halves(x)
        gate = self._active(gate)
        return Named(
            net(
                "Mul",
                *(
                    (gate.tensor, up.tensor)
                    if part.gate != "packed right"
                    else (up.tensor, gate.tensor)
                ),
            ),
            up.axes,
        )

    def _halves(self, x: Named) -> list[Named]:
        """Gate and values out of one layer."""
        net, part = self.net, self.part
        columns = "an" if part.order == "sections" else part.order
        y = self._passed(linear(net, x, part.up, columns), "up")
        axis = y.axis(columns)
        if part.order == "sections":
            made = net.parts(y, axis, [part.hidden] * 2, part.pick)
            axes = (*y.axes[:axis], "n", *y.axes[axis + 1 :])
            return [Named(tensor, axes) for tensor in made]
        apart = net.reshaped(y, (*y.axes[:axis], *columns, *y.axes[axis + 1 :]), part.targets)
        return net.picked(apart, "a", part.pick)

    def _active(self, y: Named) -> Named:
        net, part = self.net, self.part
        y = self._with_vector(y, part.before)
        y = Named(ACTIVATIONS[part.activation][1](net, y.tensor), y.axes)
        return self._with_vector(self._passed(y, "active"), part.behind)

    def _with_vector(self, y: Named, how: str) -> Named:
        net, rank, axis = self.net, len(y.axes), y.axis("n")
        if how == "none":
            return y
        shape = [1] * (rank - axis)
        shape[0] = self.part.hidden
        vector = net.const(0.5 + np.abs(net.random(*shape)))
        if how == "single":
            return Named(net("Mul", y.tensor, 1.25), y.axes)
        if how == "sub left":
            return Named(net("Sub", vector, y.tensor), y.axes)
        op = {"mul": "Mul", "add": "Add", "prelu": "PRelu", "div": "Div"}[how]
        return Named(net(op, y.tensor, vector), y.axes)

    def _normed(self, y: Named) -> Named:
        """A norm over hidden channels mixes them."""
        net, axis = self.net, [y.axis("n")]
        square = net("ReduceMean", net("Mul", y.tensor, y.tensor), axis, keepdims=1)
        return Named(net("Div", y.tensor, net("Sqrt", net("Add", square, 0.1))), y.axes)
