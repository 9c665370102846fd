"""Tiny attentions as exporters and operators write them beyond the plain form.

Four query heads of six channels, two key and value heads where they are shared; values of four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from onnx import TensorProto, helper

from corp_onnx.graph.operators import MICROSOFT
from tests.builders import VALUE, WIDTH, Net, Tiny, softmax

HEADS, KV_HEADS, HEAD = 4, 2, 6
BOTH, QK, VO = ("qk", "vo"), ("qk",), ("vo",)
SHAPE = ("batch", "tokens", WIDTH)

Make = Callable[[Net], str]


def expected(heads=HEADS, kv_heads=HEADS, width=HEAD, value=VALUE, axes=BOTH):
    return ("attention", heads, kv_heads, width, value, axes)


def built(make: Make, *, opset: int = 18, **truth) -> Callable[[int], Tiny]:
    """A model of one attention: ``make`` gives the tensor after its output projection."""

    def build(seed: int) -> Tiny:
        net = Net(seed, opset=opset)
        y = make(net)
        proto = net.build(*(y if isinstance(y, tuple) else (y,)))
        for value in proto.graph.output:
            if not value.type.tensor_type.elem_type:  # behind an operator without a schema
                value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, SHAPE))
        return Tiny(proto, (expected(**truth),) if truth.get("axes") != () else ())

    return build


def linears(net, heads, width=HEAD, value=VALUE, kv_heads=None):
    """Query, key and value of ``x``, channels last."""
    if not net.inputs:
        net.x()
    kv_heads = kv_heads or heads
    sizes = (heads * width, kv_heads * width, kv_heads * value)
    return [net.linear("x", WIDTH, size) for size in sizes]


def split(net, y, heads, perm=(0, 2, 1, 3)):
    return net("Transpose", net("Reshape", y, [0, 0, heads, -1]), perm=list(perm))


def separate(net, heads=HEADS, kv_heads=None):
    query, *others = linears(net, heads, kv_heads=kv_heads)
    return [split(net, query, heads), *(split(net, y, kv_heads or heads) for y in others)]


def products(net, query, key, value, between=lambda net, y: y, after=lambda net, y: y):
    """``softmax(q kᵀ) v``, ``[b, h, t, e]`` each."""
    logits = net("MatMul", query, net("Transpose", key, perm=[0, 1, 3, 2]))
    probabilities = softmax(net, between(net, net("Mul", logits, HEAD**-0.5)))
    return net("MatMul", after(net, probabilities), value)


def merged(net, mixed, heads=HEADS, value=VALUE):
    rows = net("Reshape", net("Transpose", mixed, perm=[0, 2, 1, 3]), [0, 0, heads * value])
    return net.linear(rows, heads * value, WIDTH)


def plain(net, **changes):
    return merged(net, products(net, *separate(net), **changes))


# Grouped heads


def grouped(repeat: Callable[[Net, str], str], *, keys=True, values=True) -> Make:
    """Keys, values or both are repeated for the query heads."""

    def make(net):
        query, key, value = linears(net, HEADS, kv_heads=KV_HEADS)
        if not keys:
            key = net.linear("x", WIDTH, HEADS * HEAD)
        if not values:
            value = net.linear("x", WIDTH, HEADS * VALUE)
        key = repeat(net, split(net, key, KV_HEADS)) if keys else split(net, key, HEADS)
        value = repeat(net, split(net, value, KV_HEADS)) if values else split(net, value, HEADS)
        return merged(net, products(net, split(net, query, HEADS), key, value))

    return make


def by_expand(net, y):
    """As transformers writes repeat_kv, sizes taken from shapes."""
    sizes = net("Shape", y)
    front, back = net("Slice", sizes, [0], [2]), net("Slice", sizes, [2], [4])
    wide = net("Concat", front, [HEADS // KV_HEADS], back, axis=0)
    y = net("Expand", net("Unsqueeze", y, [2]), wide)
    batch = net("Slice", sizes, [0], [1])
    return net("Reshape", y, net("Concat", batch, [HEADS], back, axis=0))


def by_gather(net, y):
    return net("Gather", y, np.repeat(np.arange(KV_HEADS), HEADS // KV_HEADS), axis=1)


def by_uneven_gather(net, y):
    return net("Gather", y, np.array([1, 0, 0, 0]), axis=1)


def by_tile(net, y):
    """Heads 0, 1, 0, 1: neighbours read different keys."""
    return net("Tile", y, [1, HEADS // KV_HEADS, 1, 1])


def by_concat(net, y):
    return net("Concat", y, y, axis=1)


def five_axes(net):
    """Queries as ``[b, g, m, t, e]``; keys and values broadcast over the fourth axis."""
    query, key, value = linears(net, HEADS, kv_heads=KV_HEADS)
    query = net(
        "Transpose", net("Reshape", query, [0, 0, KV_HEADS, -1, HEAD]), perm=[0, 2, 3, 1, 4]
    )
    key, value = (net("Unsqueeze", split(net, y, KV_HEADS), [2]) for y in (key, value))
    logits = net("MatMul", query, net("Transpose", key, perm=[0, 1, 2, 4, 3]))
    mixed = net("MatMul", softmax(net, logits), value)
    rows = net("Transpose", mixed, perm=[0, 3, 1, 2, 4])
    return net.linear(net("Reshape", rows, [0, 0, HEADS * VALUE]), HEADS * VALUE, WIDTH)


def one_for_all(net):
    """One key and one value head that broadcast."""
    query, key, value = separate(net, HEADS, 1)
    return merged(net, products(net, query, key, value))


def packed_grouped(net):
    """Queries, keys and values of fewer heads in one layer."""
    sizes = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * VALUE]
    whole = net.linear(net.x(), WIDTH, sum(sizes))
    query, key, value = net("Split", whole, sizes, outputs=3, axis=2)
    key, value = (by_expand(net, split(net, y, KV_HEADS)) for y in (key, value))
    return merged(net, products(net, split(net, query, HEADS), key, value))


# Operators that split heads themselves


def operator(heads=HEADS, kv_heads=HEADS, flat=True, **attrs) -> Make:
    """The standard operator with ``[b, t, h·e]`` or ``[b, h, t, e]``."""

    def make(net):
        made = linears(net, heads, kv_heads=kv_heads)
        if not flat:
            counts = (heads, kv_heads, kv_heads)
            made = [split(net, y, count) for y, count in zip(made, counts, strict=True)]
            return merged(net, net("Attention", *made, **attrs), heads)
        given = {"q_num_heads": heads, "kv_num_heads": kv_heads, **attrs}
        return net.linear(net("Attention", *made, **given), heads * VALUE, WIDTH)

    return make


def multi_head(mask: Callable[[Net], Sequence[str]] = lambda net: (), **attrs) -> Make:
    """ONNX Runtime's MultiHeadAttention."""

    def make(net):
        made = linears(net, HEADS)
        y = net("MultiHeadAttention", *made, *mask(net), domain=MICROSOFT, num_heads=HEADS, **attrs)
        return net.linear(y, HEADS * VALUE, WIDTH)

    return make


def multi_head_bias(net):
    """A bias inside the operator."""
    bias = net.random(HEADS * (2 * HEAD + VALUE))
    made = linears(net, HEADS)
    y = net("MultiHeadAttention", *made, bias, domain=MICROSOFT, num_heads=HEADS)
    return net.linear(y, HEADS * VALUE, WIDTH)


def token_mask(net):
    return "", net(
        "Cast", net.input("keeps", "batch", "tokens", dtype=np.bool_), to=TensorProto.INT32
    )


def added_mask(net):
    batch, tokens = net("Shape", "x", end=1), net("Shape", "x", start=1, end=2)
    mask = net.input("added", "batch", 1, 1, "tokens")
    return "", "", net("Expand", mask, net("Concat", batch, [1], tokens, tokens, axis=0))


# What is packed with a part that cannot be cut


def multiplied_mask(net, logits):
    """The mask of every pair of tokens is a product of those of both, as for tiles of a picture."""
    seen = net.input("seen", "batch", "tokens")
    column = net("Unsqueeze", net("Sub", 1.0, seen), [1, 3])
    pairs = net("MatMul", column, net("Transpose", column, perm=[0, 1, 3, 2]))
    return net("Add", net("Mul", pairs, -1e4), logits)


def softplus_scaled(net):
    """A learned scale of every channel of the queries, kept above zero by Softplus."""
    query, *others = separate(net)
    scale = net("Softplus", net.random(HEADS, 1, HEAD))
    return merged(net, products(net, net("Mul", query, scale), *others))


def packed(net, heads=HEADS, width=HEAD):
    """``[b, h, t, e]`` each, from one layer; values as wide as queries."""
    whole = net.linear(net.x(), WIDTH, 3 * heads * width)
    y = net("Transpose", net("Reshape", whole, [0, 0, 3, heads, width]), perm=[2, 0, 3, 1, 4])
    return [net("Gather", y, np.int64(index), axis=0) for index in range(3)]


def packed_with(change: Callable[[Net, str], str], key=None) -> Make:
    """Queries and keys of a packed layer are changed on their way; values are not."""

    def make(net):
        query, keys, value = packed(net)
        made = change(net, query), (key or change)(net, keys), value
        return merged(net, products(net, *made), value=HEAD)

    return make


def normed(net, y):
    return net("LayerNormalization", y, net.random(HEAD))


def normed_by_hand(net, y):
    """RMSNorm in single operators."""
    square = net("ReduceMean", net("Mul", y, y), [-1], keepdims=1)
    return net("Mul", net("Div", y, net("Sqrt", net("Add", square, 1e-6))), net.random(HEAD))


def unit(net, y):
    """A vector of length one: attention by cosines."""
    return net("Div", y, net("Clip", net("ReduceL2", y, [-1], keepdims=1), np.float32(1e-6)))


def angles(net, width):
    """Positions of tokens times frequencies, ``[t, width]``, computed at run time."""
    length = net("Gather", net("Shape", "x"), np.int64(1), axis=0)
    place = net("Cast", net("Range", np.int64(0), length, np.int64(1)), to=TensorProto.FLOAT)
    return net("Mul", net("Unsqueeze", place, [1]), 0.1 + np.arange(width) % (HEAD // 2))


def rotated(net, y):
    """``y · cos + rotate_half(y) · sin``."""
    turn = angles(net, HEAD)
    half = HEAD // 2
    first = net("Slice", y, [0], [half], [3])
    second = net("Slice", y, [half], [np.iinfo(np.int64).max], [3])
    swapped = net("Concat", net("Neg", second), first, axis=3)
    return net("Add", net("Mul", y, net("Cos", turn)), net("Mul", swapped, net("Sin", turn)))


def rotated_in_pairs(net, y):
    """Neighbouring channels are one pair."""
    turn = angles(net, HEAD // 2)
    pairs = net("Reshape", y, [0, 0, 0, HEAD // 2, 2])
    first, second = (net("Gather", pairs, np.int64(index), axis=4) for index in range(2))
    cos, sin = net("Cos", turn), net("Sin", turn)
    made = (
        net("Sub", net("Mul", first, cos), net("Mul", second, sin)),
        net("Add", net("Mul", second, cos), net("Mul", first, sin)),
    )
    joined = net("Concat", *(net("Unsqueeze", part, [4]) for part in made), axis=4)
    return net("Reshape", joined, [0, 0, 0, HEAD])


def rotated_but_first(net, y):
    """A class token is not rotated, the others are."""
    first, others = net("Slice", y, [0], [1], [2]), net("Slice", y, [1], [2**60], [2])
    turn = net("Slice", angles(net, HEAD), [1], [2**60], [0])
    half = HEAD // 2
    parts = net("Split", others, [half, half], outputs=2, axis=3)
    swapped = net("Concat", net("Neg", parts[1]), parts[0], axis=3)
    turned = net("Add", net("Mul", others, net("Cos", turn)), net("Mul", swapped, net("Sin", turn)))
    return net("Concat", first, turned, axis=2)


def part_rotated(net, y):
    """Only the first channels of every head are rotated, as in Phi."""
    some, rest = net("Split", y, [4, 2], outputs=2, axis=3)
    turn = angles(net, 4)
    first, second = net("Split", some, [2, 2], outputs=2, axis=3)
    swapped = net("Concat", net("Neg", second), first, axis=3)
    made = net("Add", net("Mul", some, net("Cos", turn)), net("Mul", swapped, net("Sin", turn)))
    return net("Concat", made, rest, axis=3)


def wholly_rotated(net, y):
    """As an exporter writes a rotation of a part that happens to be all: the rest is empty."""
    rest = net("Slice", y, [HEAD], [2**60], [3])
    return net("Concat", rotated(net, y), rest, axis=3)


def same(net, y):
    return y


def query_in_bias(net):
    """Relative positions that the queries take part in."""
    query, key, value = packed(net)
    length = net("Shape", "x", start=1, end=2)
    table = net("Slice", net.random(HEAD, 64), [0], length, [1])
    bias = net("MatMul", query, table)
    mixed = products(net, query, key, value, lambda net, y: net("Add", y, bias))
    return merged(net, mixed, value=HEAD)


def query_moved_in_bias(net):
    """The same, and the queries are scaled for one product and moved for the other."""
    query, key, value = packed(net)
    length = net("Shape", "x", start=1, end=2)
    table = net("Slice", net.random(HEAD, 64), [0], length, [1])
    bias = net("MatMul", net("Reshape", query, [-1, HEADS, 0, HEAD], allowzero=0), table)
    scaled = net("Mul", query, 0.5)
    mixed = products(net, scaled, key, value, lambda net, y: net("Add", y, bias))
    return merged(net, mixed, value=HEAD)


def bounded(low):
    """Logits that are cut off below."""
    return lambda net: plain(net, between=lambda net, y: net("Max", y, np.float32(low)))


def keys_shown(net):
    """Keys are an output as well, as of a model that fills a cache."""
    query, key, value = packed(net)
    return merged(net, products(net, query, key, value), value=HEAD), key


# Probabilities and mixed values


def talking(net, y):
    """A linear map of heads, channels last."""
    y = net("Transpose", y, perm=[0, 2, 3, 1])
    y = net("Add", net("MatMul", y, net.weight(HEADS, HEADS)), net.random(HEADS))
    return net("Transpose", y, perm=[0, 3, 1, 2])


def talking_on_rows(net, y):
    """The same as a Gemm, which needs all axes but the last in one."""
    y = net("Transpose", y, perm=[0, 2, 3, 1])
    rows = net("Gemm", net("Reshape", y, [-1, HEADS]), net.weight(HEADS, HEADS), net.random(HEADS))
    return net("Transpose", net("Reshape", rows, net("Shape", y)), perm=[0, 3, 1, 2])


def talking_by_conv(net, y):
    return net("Conv", y, net.random(HEADS, HEADS, 1, 1))


def gated(net, y):
    """Every probability times something that depends on the data."""
    gate = net("Sigmoid", net("ReduceMean", "x", [2], keepdims=1))
    return net("Mul", y, net("Unsqueeze", gate, [1]))


def gates_behind(net):
    """Mixed values are scaled head by head, by constants and by the data."""
    mixed = products(net, *separate(net))
    mixed = net("Mul", mixed, net.random(HEADS, 1, 1))
    gates = net("Sigmoid", net.linear("x", WIDTH, HEADS))
    gates = net("Unsqueeze", net("Transpose", gates, perm=[0, 2, 1]), [3])
    return merged(net, net("Mul", mixed, gates))


def keys_first(net):
    """``k qᵀ``, summed to one over keys, and ``vᵀ p``: everything the other way round."""
    query, key, value = linears(net, HEADS)
    logits = net("MatMul", split(net, key, HEADS), split(net, query, HEADS, (0, 2, 3, 1)))
    probabilities = net("Softmax", net("Mul", logits, 0.4), axis=2)
    mixed = net("MatMul", split(net, value, HEADS, (0, 2, 3, 1)), probabilities)
    rows = net("Reshape", net("Transpose", mixed, perm=[0, 3, 1, 2]), [0, 0, HEADS * VALUE])
    return net.linear(rows, HEADS * VALUE, WIDTH)


def over_queries(net):
    """Tokens compete for queries, as in slot attention."""
    query, key, value = separate(net)
    logits = net("MatMul", query, net("Transpose", key, perm=[0, 1, 3, 2]))
    return merged(net, net("MatMul", net("Softmax", logits, axis=2), value))


# Convolutions


def conv(net, x, rows, columns, **attrs):
    kernel = net("Identity", net.random(columns, rows, 1, 1, gain=1.5 / np.sqrt(rows)))
    return net("Conv", x, kernel, net.random(columns), **attrs)


def convolved(net):
    """A packed 1x1 convolution, ``v pᵀ``, and a convolution as output projection."""
    whole = conv(net, net.input("x", "batch", WIDTH, 3, 5), WIDTH, 3 * HEADS * HEAD)
    heads = net("Reshape", whole, [0, HEADS, 3 * HEAD, -1])
    query, key, value = net("Split", heads, [HEAD] * 3, outputs=3, axis=2)
    logits = net("MatMul", net("Transpose", query, perm=[0, 1, 3, 2]), key)
    probabilities = softmax(net, net("Mul", logits, HEAD**-0.5))
    mixed = net("MatMul", value, net("Transpose", probabilities, perm=[0, 1, 3, 2]))
    image = net("Reshape", mixed, [0, HEADS * HEAD, 3, 5])
    return conv(net, image, HEADS * HEAD, WIDTH)


def sink(net, logits):
    """A learned logit of every head beside those of the keys, as in gpt-oss.

    To it what is constant along a row of logits is not: keys must not be centred, so they stay.
    """
    shape = net("Shape", logits)
    one = net("Concat", net("Slice", shape, [0], [3]), [1], axis=0)
    return net("Concat", logits, net("Expand", net.random(1, HEADS, 1, 1), one), axis=-1)


def without_sink(net, probabilities):
    """What is left of a row after the sink took its share."""
    return net("Slice", probabilities, [0], [-1], [3])


def convolved_apart(net):
    """Keys and values of a smaller image, by strided convolutions."""
    net.input("x", "batch", WIDTH, 4, 6)
    query = conv(net, "x", WIDTH, HEADS * HEAD)
    key = conv(net, "x", WIDTH, HEADS * HEAD, strides=[2, 2])
    value = conv(net, "x", WIDTH, HEADS * VALUE, strides=[2, 2])
    query, key, value = (
        net("Reshape", y, [0, HEADS, -1, t]) for y, t in ((query, 24), (key, 6), (value, 6))
    )
    logits = net("MatMul", net("Transpose", query, perm=[0, 1, 3, 2]), key)
    mixed = net("MatMul", softmax(net, logits), net("Transpose", value, perm=[0, 1, 3, 2]))
    rows = net("Reshape", net("Transpose", mixed, perm=[0, 2, 1, 3]), [0, 24, HEADS * VALUE])
    return net.linear(rows, HEADS * VALUE, WIDTH)


def convolved_normed(net):
    """Packed convolutions whose queries and keys are normalised."""
    whole = conv(net, net.input("x", "batch", WIDTH, 3, 5), WIDTH, 3 * HEADS * HEAD)
    heads = net("Reshape", whole, [0, 3, HEADS, HEAD, 15])
    made = [net("Gather", heads, np.int64(index), axis=1) for index in range(3)]
    query, key, value = (net("Transpose", y, perm=[0, 1, 3, 2]) for y in made)
    return merged(net, products(net, normed(net, query), normed(net, key), value), value=HEAD)


def heads_in_batch(net, taken=lambda net, sizes: net("Gather", sizes, [1], axis=0), shape=SHAPE):
    """Tokens first and heads beside samples, then apart, as ``nn.MultiheadAttention`` has them.

    Of the sizes that keys have in between only their length is taken.
    """
    width = HEADS * HEAD
    y = net("Transpose", net.x(*shape), perm=[1, 0, 2])
    whole = net("Reshape", net.linear(y, WIDTH, 3 * width), [0, 0, 3, width])
    apart = net("Transpose", whole, perm=[2, 0, 1, 3])
    parts = [net("Gather", apart, np.int64(index), axis=0) for index in range(3)]
    beside = [net("Transpose", net("Reshape", y, [0, -1, HEAD]), perm=[1, 0, 2]) for y in parts]
    length = taken(net, net("Shape", beside[1]))
    sizes = net("Concat", net("Shape", "x", end=1), [HEADS], [-1], [HEAD], axis=0)
    heads = [net("Reshape", y, sizes) for y in beside]
    mask = net("ConstantOfShape", length)
    mixed = products(net, *heads, lambda net, y: net("Add", y, mask))
    rows = net("Reshape", net("Transpose", mixed, perm=[2, 0, 1, 3]), [0, 0, width])
    return net("Transpose", net.linear(rows, width, WIDTH), perm=[1, 0, 2])


GROUPED: Mapping[str, Callable[[int], Tiny]] = {
    "expanded": built(grouped(by_expand), kv_heads=KV_HEADS),
    "gathered": built(grouped(by_gather), kv_heads=KV_HEADS),
    "gathered_unevenly": built(grouped(by_uneven_gather), kv_heads=KV_HEADS),
    "tiled": built(grouped(by_tile), kv_heads=KV_HEADS),
    "joined": built(grouped(by_concat), kv_heads=KV_HEADS),
    "keys_only": built(grouped(by_expand, values=False), kv_heads=KV_HEADS),
    "five_axes": built(five_axes, kv_heads=KV_HEADS),
    "one_for_all": built(one_for_all, kv_heads=1),
    "packed_grouped": built(packed_grouped, kv_heads=KV_HEADS),
    "operator_grouped": built(operator(kv_heads=KV_HEADS, flat=False), opset=23, kv_heads=KV_HEADS),
    "operator_flat_grouped": built(operator(kv_heads=KV_HEADS), opset=23, kv_heads=KV_HEADS),
}
"""Query heads that share key or value heads."""


def rows_of(net, x):
    return net("Reshape", x, [-1, WIDTH])


def on_rows(net):
    """Packed, on rows, and split before heads are told apart: what onnxsim makes of three layers.

    The mixed values are reshaped twice: for their product, and for their size alone.
    """
    front = net("Slice", net("Shape", net.x()), [0], [2])
    sizes = [HEADS * HEAD, HEADS * HEAD, HEADS * VALUE]
    y = net("MatMul", rows_of(net, "x"), net.weight(WIDTH, sum(sizes)))
    made = []
    parts = net("Split", y, sizes, outputs=3, axis=-1)
    for part, width in zip(parts, (HEAD, HEAD, VALUE), strict=True):
        apart = net("Reshape", part, net("Concat", front, [HEADS, width], axis=0))
        made.append(
            net("Transpose", net("Add", apart, net.random(HEADS, width)), perm=[0, 2, 1, 3])
        )
    mixed = net("Transpose", products(net, *made), perm=[0, 2, 1, 3])
    measured = net("Reshape", mixed, [0, 0, HEADS * VALUE])
    rows = net("Reshape", mixed, [-1, HEADS * VALUE])
    y = net("Gemm", rows, net.weight(HEADS * VALUE, WIDTH), net.random(WIDTH))
    front = net("Slice", net("Shape", measured), [0], [2])
    return net("Reshape", y, net("Concat", front, [WIDTH], axis=0))


def in_windows(zero):
    """On rows; tokens are told apart twice, first samples, then windows of three.

    ``zero`` says how the second Reshape writes the number of samples.
    """

    def make(net):
        rows = rows_of(net, net.x("batch", 6, WIDTH))
        made = []
        for width in (HEAD, HEAD, VALUE):
            size = HEADS * width
            y = net("Gemm", rows, net.weight(WIDTH, size), net.random(size))
            apart = net("Reshape", y, [-1, 6, size])
            apart = net("Reshape", apart, [zero, 2, 3, HEADS, width])
            made.append(net("Transpose", apart, perm=[0, 1, 3, 2, 4]))
        logits = net("MatMul", made[0], net("Transpose", made[1], perm=[0, 1, 2, 4, 3]))
        mixed = net("MatMul", softmax(net, net("Mul", logits, HEAD**-0.5)), made[2])
        whole = net(
            "Reshape", net("Transpose", mixed, perm=[0, 1, 3, 2, 4]), [-1, 6, HEADS * VALUE]
        )
        return net.linear(whole, HEADS * VALUE, WIDTH)

    return make


MORE: Mapping[str, Callable[[int], Tiny]] = {
    **GROUPED,
    "values_only": built(grouped(by_expand, keys=False), kv_heads=HEADS),
    "operator_flat": built(operator(), opset=23),
    "operator_flat_scale": built(operator(scale=0.3, is_causal=1), opset=24),
    "multi_head": built(multi_head()),
    "multi_head_bias": built(multi_head_bias),
    "multi_head_scale": built(multi_head(scale=0.3, unidirectional=1)),
    "multi_head_token_mask": built(multi_head(token_mask)),
    "multi_head_added_mask": built(multi_head(added_mask)),
    "multiplied_mask": built(lambda net: plain(net, between=multiplied_mask)),
    "softplus_scale": built(softplus_scaled),
    "packed_normed": built(packed_with(normed), value=HEAD, axes=VO),
    "packed_normed_query": built(packed_with(normed, same), value=HEAD, axes=VO),
    "packed_normed_by_hand": built(packed_with(normed_by_hand), value=HEAD, axes=VO),
    "packed_cosine": built(packed_with(unit), value=HEAD, axes=VO),
    "packed_rotated": built(packed_with(rotated), value=HEAD, axes=VO),
    "packed_rotated_in_pairs": built(packed_with(rotated_in_pairs), value=HEAD, axes=VO),
    "packed_rotated_but_first": built(packed_with(rotated_but_first), value=HEAD, axes=VO),
    "packed_part_rotated": built(packed_with(part_rotated), value=HEAD, axes=VO),
    "packed_wholly_rotated": built(packed_with(wholly_rotated), value=HEAD, axes=VO),
    "query_in_bias": built(query_in_bias, value=HEAD, axes=VO),
    "query_moved_in_bias": built(query_moved_in_bias, value=HEAD, axes=VO),
    "bounded": built(bounded(-0.5), axes=VO),
    "bounded_by_nothing": built(bounded(np.finfo(np.float32).min)),
    "keys_shown": built(keys_shown, value=HEAD, axes=VO),
    "talking": built(lambda net: plain(net, between=talking, after=talking), axes=VO),
    "talking_on_rows": built(
        lambda net: plain(net, between=talking_on_rows, after=talking_on_rows), axes=VO
    ),
    "heads_in_batch": built(heads_in_batch, value=HEAD),
    "on_rows": built(on_rows),
    "windows_on_rows": built(in_windows(-1)),
    "talking_after": built(lambda net: plain(net, after=talking)),
    "talking_by_conv": built(lambda net: plain(net, between=talking_by_conv), axes=VO),
    "gated": built(lambda net: plain(net, after=gated)),
    "gates_behind": built(gates_behind),
    "sink": built(lambda net: plain(net, between=sink, after=without_sink), axes=VO),
    "keys_first": built(keys_first),
    "over_queries": built(over_queries),
    "convolved": built(convolved, value=HEAD),
    "convolved_apart": built(convolved_apart),
    "convolved_normed": built(convolved_normed, value=HEAD, axes=VO),
}
"""Every tiny attention by name, made from a seed."""
