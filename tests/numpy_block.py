"""One transformer block written twice: as an ONNX model, and in NumPy from the same weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.special import erf

from corp_onnx.graph.model import Model, from_proto
from tests.builders import HEAD, HEADS, HIDDEN, WIDTH, Net, erf_gelu, split_heads

EPSILON = 1e-5
QUERY_SCALE = HEAD**-0.5

Weights = Mapping[str, np.ndarray]


def draw(rng: np.random.Generator) -> Weights:
    """Weights in float32, so that both ways of writing start from the same numbers."""
    shapes = {
        "query": (WIDTH, HEADS * HEAD),
        "key": (WIDTH, HEADS * HEAD),
        "value": (WIDTH, HEADS * HEAD),
        "output": (HEADS * HEAD, WIDTH),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    weights = {}
    for name, (rows, columns) in shapes.items():
        weights[name] = rng.standard_normal((rows, columns)) * 1.5 / np.sqrt(rows)
        weights[f"{name}_bias"] = rng.standard_normal(columns) * 0.5
    for name in ("first_norm", "second_norm"):
        weights[name] = rng.uniform(0.5, 1.5, WIDTH)
        weights[f"{name}_bias"] = rng.standard_normal(WIDTH) * 0.5
    return {name: values.astype(np.float32) for name, values in weights.items()}


def as_model(weights: Weights) -> Model:
    """The block as an exporter would write it; the query is scaled before the product."""
    net = Net(0)

    def linear(x: str, name: str) -> str:
        return net("Add", net("MatMul", x, weights[name]), weights[f"{name}_bias"])

    def norm(x: str, name: str) -> str:
        return net("LayerNormalization", x, weights[name], weights[f"{name}_bias"], epsilon=EPSILON)

    x = net.x()
    y = norm(x, "first_norm")
    query, key, value = (split_heads(net, linear(y, name)) for name in ("query", "key", "value"))
    query = net("Mul", query, QUERY_SCALE)
    logits = net("MatMul", query, net("Transpose", key, perm=[0, 1, 3, 2]))
    mixed = net("MatMul", net("Softmax", logits, axis=-1), value)
    rows = net("Reshape", net("Transpose", mixed, perm=[0, 2, 1, 3]), [0, 0, HEADS * HEAD])
    x = net("Add", x, linear(rows, "output"))
    hidden = erf_gelu(net, linear(norm(x, "second_norm"), "up"))
    return from_proto(net.build(net("Add", x, linear(hidden, "down"))))


def forward(weights: Weights, x: np.ndarray) -> dict[str, np.ndarray]:
    """The same in float64: queries and keys ``[n, h, e]``, hidden vectors ``[n, d]``, output."""
    exact = {name: values.astype(np.float64) for name, values in weights.items()}

    def linear(y: np.ndarray, name: str) -> np.ndarray:
        return y @ exact[name] + exact[f"{name}_bias"]

    def norm(y: np.ndarray, name: str) -> np.ndarray:
        centred = y - y.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
        return centred / deviation * exact[name] + exact[f"{name}_bias"]

    def heads(y: np.ndarray) -> np.ndarray:
        return y.reshape(*y.shape[:-1], HEADS, HEAD)

    x = x.astype(np.float64)
    y = norm(x, "first_norm")
    query, key, value = (heads(linear(y, name)) for name in ("query", "key", "value"))
    query = query * QUERY_SCALE
    powers = np.exp(np.einsum("bqhe,bkhe->bhqk", query, key))
    mixed = np.einsum("bhqk,bkhe->bqhe", powers / powers.sum(axis=-1, keepdims=True), value)
    x = x + linear(mixed.reshape(*x.shape[:-1], HEADS * HEAD), "output")
    raw = linear(norm(x, "second_norm"), "up")
    hidden = raw * (1 + erf(raw / np.sqrt(2))) / 2
    return {
        "query": query.reshape(-1, HEADS, HEAD),
        "key": key.reshape(-1, HEADS, HEAD),
        "hidden": hidden.reshape(-1, HIDDEN),
        "output": x + linear(hidden, "down"),
    }
