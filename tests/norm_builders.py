"""LayerNorm as exporters write it out, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tests.builders import WIDTH, Net


def mean(net: Net, x: str, axis: int = -1) -> str:
    if net.opset >= 18:
        return net("ReduceMean", x, [axis], keepdims=1)
    return net("ReduceMean", x, axes=[axis], keepdims=1)


def written_out(
    net: Net,
    x: str,
    *,
    squared: str = "Pow",
    divided: str = "Div",
    turned: bool = False,
    gamma: bool = True,
    beta: bool = True,
    epsilon: float = 1e-5,
    axis: int = -1,
    power: float = 2.0,
    of_another: bool = False,
) -> str:
    """``(x - mean) / sqrt(mean((x - mean)²) + epsilon) · gamma + beta``, in single steps."""
    centred = net("Sub", x, mean(net, net("Abs", x) if of_another else x, axis))
    square = net("Mul", centred, centred) if squared == "Mul" else net("Pow", centred, power)
    pair = [mean(net, square, axis), epsilon]
    root = net("Sqrt", net("Add", *(pair[::-1] if turned else pair)))
    if divided == "Div":
        y = net("Div", centred, root)
    else:
        y = net("Mul", *[centred, net("Reciprocal", root)][:: -1 if turned else 1])
    rng = np.random.default_rng(3)
    if gamma:
        pair = [y, 1 + 0.2 * rng.standard_normal(WIDTH)]
        y = net("Mul", *(pair[::-1] if turned else pair))
    return net("Add", y, 0.2 * rng.standard_normal(WIDTH)) if beta else y


WRITTEN: Mapping[str, Mapping[str, object]] = {
    "pow": {},
    "mul": {"squared": "Mul"},
    "turned": {"turned": True},
    "reciprocal": {"divided": "Mul"},
    "reciprocal, turned": {"divided": "Mul", "turned": True},
    "no beta": {"beta": False},
    "last axis by number": {"axis": 2},
}

NOT_A_NORM: Mapping[str, Mapping[str, object]] = {
    "another axis": {"axis": 1},
    "a cube": {"power": 4.0},
    "the mean of something else": {"of_another": True},
    "no weights": {"gamma": False, "beta": False},
}


def normed(opset: int, gain: float, **how: object) -> Net:
    """A layer, its norm written out and another layer; ``gain`` makes what is normed large."""
    net = Net(0, opset=opset)
    x = net("Mul", net.linear(net.x(), WIDTH, WIDTH), gain)
    written: Callable[..., str] = written_out
    net.linear(written(net, x, **how), WIDTH, WIDTH)
    return net
