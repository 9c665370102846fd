"""Tiny transformers whose blocks join the residual stream in different ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tests.builders import (
    HEAD,
    HEADS,
    HIDDEN,
    WIDTH,
    Net,
    conv,
    depthwise,
    layer_norm,
    merge_heads,
    mix,
    mlp,
    projections,
    relu,
    scaled,
    softmax,
    split_heads,
)


def attend(net: Net, x: str) -> str:
    """Attention without a residual."""
    return merge_heads(net, mix(net, *(split_heads(net, y) for y in projections(net, x))))


def feed(net: Net, x: str) -> str:
    return mlp(net, x, relu)


def pre_norm(net: Net, x: str) -> str:
    x = net("Add", x, attend(net, layer_norm(net, x)))
    return net("Add", x, feed(net, layer_norm(net, x)))


def layer_scale(net: Net, x: str) -> str:
    """Scaled per channel, on either side of the sum, and by a number as well."""
    branch = net("Mul", attend(net, layer_norm(net, x)), net.random(WIDTH))
    x = net("Add", branch, x)
    branch = net("Div", net("Mul", net.random(WIDTH), feed(net, layer_norm(net, x))), 2.0)
    return net("Add", x, branch)


def post_norm(net: Net, x: str) -> str:
    x = net("LayerNormalization", net("Add", x, attend(net, x)), net.random(WIDTH, gain=1.0))
    return net("LayerNormalization", net("Add", feed(net, x), x), net.random(WIDTH, gain=1.0))


def parallel(net: Net, x: str) -> str:
    """Both branches read one norm and join one stream, as in GPT-J and Falcon."""
    normal = layer_norm(net, x)
    return net("Add", net("Add", attend(net, normal), feed(net, normal)), x)


def parallel_packed(net: Net, x: str) -> str:
    """The same with hidden channels, queries, keys and values from one layer, as in ViT-22B."""
    inner = HEADS * HEAD
    sizes = [HIDDEN, inner, inner, inner]
    whole = net.linear(layer_norm(net, x), WIDTH, sum(sizes))
    hidden, *heads = net("Split", whole, sizes, outputs=4, axis=2)
    mixed = merge_heads(net, mix(net, *(split_heads(net, y) for y in heads)))
    fed = net.linear(relu(net, hidden), HIDDEN, WIDTH)
    return net("Add", net("Add", x, fed), mixed)


def chained(net: Net, x: str) -> str:
    """One MLP ends in the layer that the next begins with, and joins the stream behind it."""
    y = relu(net, net.linear(x, WIDTH, 14))
    y = relu(net, net.linear(y, 14, 15))
    return net("Add", x, net.linear(y, 15, WIDTH))


def differential(net: Net, x: str) -> str:
    """Two kinds of probabilities mix one set of values, as in a differential transformer."""
    y = layer_norm(net, x)
    query, key, value = (split_heads(net, part) for part in projections(net, y))
    other = [split_heads(net, net.linear(y, WIDTH, HEADS * HEAD)) for _ in range(2)]
    swapped = [net("Transpose", keys, perm=[0, 1, 3, 2]) for keys in (key, other[1])]
    products = (net("MatMul", *pair) for pair in zip((query, other[0]), swapped, strict=True))
    first, second = (softmax(net, scaled(net, logits)) for logits in products)
    joined = net("Sub", first, net("Mul", second, net.random(1, HEADS, 1, 1)))
    return net("Add", x, merge_heads(net, net("MatMul", joined, value)))


LAYERS: Mapping[str, Callable[[Net, str], str]] = {
    "pre_norm": pre_norm,
    "layer_scale": layer_scale,
    "post_norm": post_norm,
    "parallel": parallel,
    "parallel_packed": parallel_packed,
    "chained": chained,
    "differential": differential,
}


def stacked(name: str, *, layers: int = 2, seed: int = 0, dtype: type = np.float32):
    """Several layers of one kind behind each other."""
    net = Net(seed, dtype=dtype)
    x = net.x()
    for _ in range(layers):
        x = LAYERS[name](net, x)
    return net.build(net.linear(x, WIDTH, 3))


def read_at(places: Sequence[int], *, seed: int = 0):
    """Pre-norm layers, of whose stream some tokens are classified, as a class token is."""
    net = Net(seed)
    x = net.x()
    for _ in range(2):
        x = pre_norm(net, x)
    tokens = net("Gather", layer_norm(net, x), np.array(places), axis=1)
    return net.build(net.linear(tokens, WIDTH, 5))


def class_token(seed: int = 0):
    """The first token is classified."""
    return read_at([0], seed=seed)


def features_and_class(seed: int = 0):
    """Features of all tokens, the first of them once more, and an input as it came."""
    net = Net(seed)
    given = net.x()
    x = layer_norm(net, pre_norm(net, pre_norm(net, given)))
    return net.build(x, net("Gather", x, np.array(0), axis=1), net("Gather", given, 3, axis=1))


def mean_token(seed: int = 0):
    """The mean of all tokens is classified."""
    net = Net(seed)
    x = net("ReduceMean", layer_norm(net, pre_norm(net, net.x())), [1], keepdims=0)
    return net.build(net.linear(x, WIDTH, 5))


def mean_of_seen(seed: int = 0):
    """The mean of all tokens that are no padding is classified, as sentence encoders do it."""
    net = Net(seed)
    x, seen = net.x(), net.input("seen", "batch", "tokens")
    mask = net("Mul", net("Sub", 1.0, net("Unsqueeze", seen, [1, 2])), -1e4)
    operands = [split_heads(net, y) for y in projections(net, layer_norm(net, x))]
    mixed = mix(net, *operands, lambda net, logits: net("Add", logits, mask))
    x = net("Add", x, merge_heads(net, mixed))
    x = layer_norm(net, net("Add", x, feed(net, layer_norm(net, x))))
    weight = net("Unsqueeze", seen, [2])
    total = net("ReduceSum", net("Mul", x, weight), [1], keepdims=0)
    return net.build(net("Div", total, net("ReduceSum", weight, [1], keepdims=0)))


def tokens_first(seed: int = 0):
    """MLPs over ``[tokens, samples, channels]``, and the first token of every sample."""
    net = Net(seed)
    x = net("Transpose", net.x(), perm=[1, 0, 2])
    for _ in range(2):
        x = net("Add", x, feed(net, layer_norm(net, x)))
    return net.build(net.linear(net("Gather", x, np.array(0), axis=0), WIDTH, 5))


def mixed_once(mixing: np.ndarray, seed: int = 0):
    """Between two MLPs token 0 takes over from others as ``mixing`` says; it is what is read."""
    net = Net(seed)
    x = net.x()
    x = net("Add", x, feed(net, x))
    x = net("Einsum", mixing, x, equation="st,btd->bsd")
    x = net("Add", x, net("Mul", feed(net, x), 1e-3))
    return net.build(net("Gather", x, np.array(0), axis=1))


def gemm(seed: int = 0):
    """Tokens of all samples in one axis inside of the MLP, joined to the stream as they were."""
    net = Net(seed)
    x = net.x()
    for _ in range(2):
        rows = net("Reshape", x, [-1, WIDTH])
        y = relu(net, net("Gemm", rows, net.weight(WIDTH, 14), net.random(14)))
        y = net("Gemm", y, net.weight(14, WIDTH), net.random(WIDTH))
        x = net("Add", x, net("Reshape", y, net("Shape", x)))
    return net.build(x)


def convolutions(seed: int = 0):
    """Channels on axis 1, scaled per channel: ConvNeXt."""
    net = Net(seed)
    x = net.x("batch", WIDTH, 3, 4)
    for _ in range(2):
        y = relu(net, depthwise(net, conv(net, x, WIDTH, 14)))
        y = net("Mul", conv(net, y, 14, WIDTH), net.random(WIDTH, 1, 1))
        x = net("Add", x, y)
    return net.build(x)


def no_stream(seed: int = 0):
    """Two MLPs that join nothing: something nonlinear reads the first."""
    net = Net(seed)
    return net.build(feed(net, layer_norm(net, feed(net, net.x()))))


def no_last_layer(seed: int = 0):
    """Mixed values enter a norm before anything projects them."""
    net = Net(seed)
    mixed = mix(net, *(split_heads(net, y) for y in projections(net, net.x())))
    flat = net("Reshape", net("Transpose", mixed, perm=[0, 2, 1, 3]), [0, 0, HEADS * HEAD])
    return net.build(feed(net, layer_norm(net, net.linear(net("Tanh", flat), HEADS * HEAD, WIDTH))))
