"""Multiply-adds against counts by hand, and against the published sizes of DeiT."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from corp_onnx.blocks import Mlp, find_blocks
from corp_onnx.graph.macs import count
from corp_onnx.graph.model import from_proto
from corp_onnx.graph.shapes import evaluate
from corp_onnx.graph.sizes import input_sizes
from corp_onnx.solve.folds import EXACT, MlpFold, QueryKeyFold, Solution
from corp_onnx.surgery.operate import operate
from tests.builders import HEAD, HEADS, WIDTH, Net, merge_heads, separate

TOKENS = 197
CLASSES = 1000
DEPTH = 12

DEIT = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
"""Width and heads."""


class Blank(Net):
    """A net whose large weights have shapes but no values."""

    def blank(self, *shape):
        if np.prod(shape) <= 1000:
            return self.const(np.zeros(shape))
        name = f"blank_{len(self.tensors)}"
        self.tensors.append(TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape))
        return name

    def layer(self, x, rows, columns):
        return self("Add", self("MatMul", x, self.blank(rows, columns)), self.blank(columns))


class Filled(Blank):
    """The same with values, in every weight another: layers of equal ones would go on sharing."""

    def blank(self, *shape):
        return self.const(np.full(shape, float(len(self.tensors))))


def deit(net, width, heads, *, hidden=None, head=64):
    """DeiT for 224 pixels in patches of 16, with hidden and query-key widths of its own."""
    patches = net("Conv", net.input("x", "batch", 3, 224, 224), net.blank(width, 3, 16, 16),
                  net.blank(width), strides=[16, 16])  # fmt: skip
    rows = net("Transpose", net("Reshape", patches, [0, width, -1]), perm=[0, 2, 1])
    shape = net("Concat", net("Shape", "x", end=1), [1, width], axis=0)
    x = net("Concat", net("Expand", net.blank(1, 1, width), shape), rows, axis=1)
    x = net("Add", x, net.blank(1, TOKENS, width))
    for _ in range(DEPTH):
        x = net("Add", x, deit_attention(net, norm(net, x, width), width, heads, head))
        up = net("Gelu", net.layer(norm(net, x, width), width, hidden or 4 * width))
        x = net("Add", x, net.layer(up, hidden or 4 * width, width))
    first = net("Gather", norm(net, x, width), np.int64(0), axis=1)
    return net.build(net("Gemm", first, net.blank(CLASSES, width), net.blank(CLASSES), transB=1))


def deit_attention(net, x, width, heads, head):
    sizes = (head, head, 64)
    query, key, value = (
        net("Transpose", net("Reshape", net.layer(x, width, heads * size), [0, 0, heads, size]),
            perm=[0, 2, 1, 3])
        for size in sizes
    )  # fmt: skip
    logits = net("MatMul", query, net("Transpose", key, perm=[0, 1, 3, 2]))
    mixed = net("MatMul", net("Softmax", net("Mul", logits, 0.125), axis=-1), value)
    rows = net("Reshape", net("Transpose", mixed, perm=[0, 2, 1, 3]), [0, 0, heads * 64])
    return net.layer(rows, heads * 64, width)


def norm(net, x, width):
    return net("LayerNormalization", x, net.blank(width), net.blank(width))


def counts(proto, **sizes):
    model = from_proto(proto)
    return count(model.graph, evaluate(model.graph, sizes or input_sizes(model.graph)))


def by_hand(width, heads, hidden, head):
    """Of DeiT, in the order of the paper: embedding, projections, products, MLPs, classifier."""
    embedding = (TOKENS - 1) * width * 3 * 16 * 16
    projections = TOKENS * width * heads * (2 * head + 2 * 64)
    products = heads * TOKENS**2 * (head + 64)
    mlp = TOKENS * width * hidden * 2
    return embedding + DEPTH * (projections + products + mlp) + width * CLASSES


@pytest.mark.parametrize(
    ("name", "dense", "half"), [("tiny", 1.25, 0.77), ("small", 4.60, 2.77), ("base", 17.56, 10.41)]
)
def test_deit_has_its_published_size(name, dense, half):
    width, heads = DEIT[name]
    whole = counts(deit(Blank(0, opset=20), width, heads))
    assert whole.total == by_hand(width, heads, 4 * width, 64)
    assert whole.total / 1e9 == pytest.approx(dense, abs=0.01)
    small = counts(deit(Blank(0, opset=20), width, heads, hidden=2 * width, head=32))
    assert small.total == by_hand(width, heads, 2 * width, 32)
    assert small.total / 1e9 == pytest.approx(half, abs=0.01)
    assert whole.uncounted == small.uncounted == ()
    assert whole.sizes == {"x": (1, 3, 224, 224)}


def test_parameters_of_deit_tiny():
    params = counts(deit(Blank(0, opset=20), *DEIT["tiny"])).params
    assert params == 5_717_416  # as timm counts them


def test_cutting_deit_tiny_to_half_is_counted_as_if_it_had_been_built_so():
    width, heads = DEIT["tiny"]
    model = from_proto(deit(Filled(0, opset=20), width, heads))
    catalog = find_blocks(model)
    assert catalog.macs == by_hand(width, heads, 4 * width, 64)
    outside = (TOKENS - 1) * width * 3 * 16 * 16 + width * CLASSES
    assert catalog.macs_prunable == catalog.macs - outside
    surgery = operate(model, catalog, Solution("half", tuple(map(first_half, catalog.blocks))))
    assert surgery.dense.total == catalog.macs
    assert surgery.pruned.total == by_hand(width, heads, 2 * width, 32)
    built = counts(deit(Blank(0, opset=20), width, heads, hidden=2 * width, head=32))
    assert surgery.pruned.params == built.params


def test_a_layer_between_two_hidden_axes_is_counted_once():
    """It ends one MLP and begins the next; the twin counts it for both, and passes 100 %."""
    net = Net(0)
    y = net("Relu", net.linear(net.x(), WIDTH, 24))
    y = net("Relu", net.linear(y, 24, 40))
    catalog = find_blocks(from_proto(net.build(net.linear(y, 40, WIDTH))))
    assert len(catalog.blocks) == 2
    assert catalog.macs_prunable == catalog.macs
    each = list(catalog.macs_by_block.values())
    tokens = catalog.macs // (WIDTH * 24 + 24 * 40 + 40 * WIDTH)
    assert each == [tokens * (WIDTH * 24 + 12 * 40), tokens * (12 * 40 + 40 * WIDTH)]


def first_half(block):
    if isinstance(block, Mlp):
        kept = np.arange(block.width // 2)
        rows = np.zeros((len(kept), block.down.width_out))
        return MlpFold(block.id, kept, rows, np.zeros(block.down.width_out), EXACT)
    chosen = np.stack([np.eye(block.head_width)[:, : block.head_width // 2]] * block.heads)
    return QueryKeyFold(block.id, chosen, chosen, EXACT)


# Operators by hand


def total(net, y, **sizes):
    return counts(net.build(y), **sizes).total


def test_matmul():
    net = Net(0)
    y = net("MatMul", net.x(), net.weight(WIDTH, 3))
    assert total(net, y, x=(2, 5, WIDTH)) == 2 * 5 * WIDTH * 3
    y = net("MatMul", y, net("Transpose", y, perm=[0, 2, 1]))
    assert total(net, y, x=(2, 5, WIDTH)) == 2 * 5 * WIDTH * 3 + 2 * 5 * 5 * 3


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(transposed):
    net = Net(0)
    x = net.x(WIDTH, "batch") if transposed else net.x("batch", WIDTH)
    y = net("Gemm", x, net.weight(3, WIDTH), net.random(3), transA=transposed, transB=1)
    assert total(net, y, x=(WIDTH, 7) if transposed else (7, WIDTH)) == 7 * WIDTH * 3


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv(groups):
    net = Net(0)
    weight = net.random(8, 4 // groups, 3, 5)
    y = net("Conv", net.x("batch", 4, 20, 20), weight, net.random(8), group=groups, strides=[2, 1])
    assert total(net, y, x=(2, 4, 20, 20)) == 2 * 8 * 9 * 16 * (4 // groups) * 3 * 5


@pytest.mark.parametrize("groups", [1, 2])
def test_conv_transpose(groups):
    net = Net(0)
    y = net("ConvTranspose", net.x("batch", 4, 6, 6), net.random(4, 8 // groups, 2, 2),
            group=groups, strides=[2, 2])  # fmt: skip
    assert total(net, y, x=(2, 4, 6, 6)) == 2 * 4 * 6 * 6 * (8 // groups) * 2 * 2


def test_attention_counts_as_its_two_products_do():
    net = Net(0, opset=23)
    operator = counts(
        net.build(merge_heads(net, net("Attention", *separate(net)))), x=(2, 7, WIDTH)
    )
    products = operator.total - 2 * 7 * WIDTH * 4 * HEADS * HEAD
    assert products == 2 * (2 * HEADS * 7 * 7 * HEAD)


def test_attention_that_splits_heads_itself():
    """Four query heads of six channels, two key heads, values of five channels."""
    net = Net(0, opset=23)
    query, key = net.x("batch", "tokens", 24), net.input("k", "batch", "others", 12)
    value = net.input("v", "batch", "others", 10)
    y = net("Attention", query, key, value, q_num_heads=4, kv_num_heads=2)
    assert total(net, y, x=(3, 5, 24), k=(3, 9, 12), v=(3, 9, 10)) == 3 * 4 * 5 * 9 * (6 + 5)


def test_grouped_heads_of_the_operator():
    net = Net(0, opset=23)
    query = net.x("batch", 4, "tokens", HEAD)
    key, value = (net.input(name, "batch", 2, "others", HEAD) for name in "kv")
    y = net("Attention", query, key, value)
    sizes = {"x": (1, 4, 5, HEAD), "k": (1, 2, 9, HEAD), "v": (1, 2, 9, HEAD)}
    assert total(net, y, **sizes) == 4 * 5 * 9 * 2 * HEAD


def test_elementwise_operators_and_norms_cost_nothing():
    net = Net(0)
    y = net("LayerNormalization", net("Mul", net.x(), net.random(WIDTH)), net.random(WIDTH))
    assert total(net, net("Softmax", y), x=(1, 5, WIDTH)) == 0


def test_parameters_are_what_is_stored_once_and_is_more_than_a_number():
    net = Net(0)
    weight = net.weight(WIDTH, WIDTH)
    y = net("MatMul", net("MatMul", net.x(), weight), weight)
    y = net("Mul", net("Reshape", y, [0, 0, WIDTH]), 0.5)
    assert counts(net.build(net("Add", y, net.random(WIDTH)))).params == WIDTH**2 + WIDTH


def test_what_cannot_be_counted_is_named():
    net = Net(0)
    kept = net("NonZero", net("Greater", net.x(), 0.0))
    y = net(
        "MatMul", net("Cast", kept, to=TensorProto.FLOAT), net("Cast", net("Transpose", kept), to=1)
    )
    net("MatMul", "x", net.weight(WIDTH, 3))
    made = counts(net.build(y), x=(1, 5, WIDTH))
    assert made.uncounted == (net.nodes[-2].name,)


@pytest.mark.parametrize("op", ["Attention", "MatMul"])
def test_an_operator_of_another_domain_is_not_counted_as_the_standard_one(op):
    net = Net(0)
    y = net(op, net.x(), net.weight(WIDTH, 30), net.random(30), domain="somebody", num_heads=2)
    proto = net.build(net("Identity", "x"))
    proto.graph.output.append(onnx.helper.make_tensor_value_info(y, TensorProto.FLOAT, None))
    made = counts(proto, x=(1, 5, WIDTH))
    assert made.uncounted == (f"{op}_0",)
    assert made.total == 0
