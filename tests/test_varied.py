"""What is probed at: sizes that the file leaves open vary, and somewhere there are many tokens."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from corp_onnx.blocks import axes_of, find_blocks
from corp_onnx.graph.model import from_proto
from corp_onnx.graph.sizes import stretched
from corp_onnx.graph.varied import probed
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from tests.builders import (
    HEAD,
    HEADS,
    HIDDEN,
    WIDTH,
    Net,
    merge_heads,
    mix,
    projections,
    split_heads,
)
from tests.full_width import run, squared_error, unchanged

PATCH = 16


def exact(net, y, *shapes, given=None):
    """The axes found in a model, which at full width computes what the file does at every shape."""
    proto = net.build(y)
    model = from_proto(proto)
    catalog = find_blocks(model, given)
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal(shape, dtype=np.float32)} for shape in shapes]
    for solution in (unchanged(model, catalog), turned(model, catalog)):
        cut = operate(model, catalog, solution).model
        for before, after in zip(run(proto, *feeds), run(cut, *feeds), strict=True):
            assert squared_error(after, before) < 1e-9
    return [axes_of(block) for block in catalog.blocks]


# One token


def strided(net, kernel, stride, padding):
    """A convolution with strides before an attention, whose layout follows from sizes."""
    return convolved(net, net.x("batch", "samples", WIDTH), kernel, stride, padding)


def convolved(net, x, kernel, stride, padding):
    x = net("Transpose", x, perm=[0, 2, 1])
    filters = net.random(WIDTH, WIDTH, kernel)
    sizes = {"kernel_shape": [kernel], "strides": [stride], "pads": [padding] * 2}
    return net("Transpose", net("Conv", x, filters, **sizes), perm=[0, 2, 1])


def split_by_size(net, y):
    """As ``view(b, t, h, -1).transpose(1, 2)`` is exported."""
    sizes = net("Shape", y)
    axes = (net("Gather", sizes, [axis], axis=0) for axis in (0, 1))
    target = net("Concat", *axes, np.array([HEADS, HEAD]), axis=0)
    return net("Transpose", net("Reshape", y, target), perm=[0, 2, 1, 3])


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(8, 8, 4), (20, 20, 10), (200, 160, 100), (5, 2, 0)],
    ids=["one token of 5 and of 7", "the same far longer", "as of sound", "one of 5, two of 7"],
)
def test_strides_that_leave_one_token_do_not_hide_where_tokens_lie(kernel, stride, padding):
    net = Net(0)
    y = strided(net, kernel, stride, padding)
    heads = [split_by_size(net, each) for each in projections(net, y)]
    found = exact(net, merge_heads(net, mix(net, *heads)), (3, 40, WIDTH), (1, 790, WIDTH))
    assert found == [("qk", "vo")]


@pytest.mark.parametrize(
    "strides", [[(8, 8, 4)], [(3, 2, 1), (3, 2, 1)]], ids=["one token of both", "two of both"]
)
def test_places_are_not_cut_where_strides_leave_as_many_tokens_of_both_lengths(strides):
    net = Net(0)
    y = net.x("batch", "samples", WIDTH)
    for kernel, stride, padding in strides:
        y = convolved(net, y, kernel, stride, padding)
    count = net("Gather", net("Shape", y), [1], axis=0)
    y = net("Add", y, net("Slice", net.const(net.random(50, WIDTH)), [0], count, [0]))
    y = net("Add", y, by_tokens(net, y))
    y = net.linear(net("Relu", net.linear(y, WIDTH, HIDDEN)), HIDDEN, WIDTH)
    found = exact(net, y, (3, 40, WIDTH), (1, 79, WIDTH))
    assert found == [("vo",), ("mlp",)]


def test_nor_is_a_row_whose_place_is_the_same_up_to_some_length():
    net = Net(0)
    net.x()
    start = net("Max", net("Sub", net("Shape", "x", start=1, end=2), [20]), [0])
    row = net("Slice", net.const(net.random(90, WIDTH)), start, net("Add", start, [1]), [0])
    y = by_tokens(net, net("Add", "x", row))
    assert exact(net, y, (2, 9, WIDTH), (1, 70, WIDTH)) == [("vo",)]


def test_nor_does_something_whose_size_the_data_decide():
    """It is known at no size, so no pair of sizes is good enough to stop at."""
    net = Net(0)
    y = strided(net, 8, 8, 4)
    chosen = net("NonZero", net("ReduceMax", "x", [1, 2], keepdims=0))
    heads = [split_by_size(net, each) for each in projections(net, y)]
    mixed = merge_heads(net, mix(net, *heads))
    model = from_proto(net.build(mixed, net("Cast", chosen, to=onnx.TensorProto.FLOAT)))
    assert [facts.sizes["x"][1] for facts in probed(model.graph)] == [5, 7, 80]


def test_a_longer_probe_is_added_only_where_it_has_more_tokens():
    net = Net(0)
    heads = [split_by_size(net, each) for each in projections(net, net.x())]
    plain = from_proto(net.build(merge_heads(net, mix(net, *heads))))
    net = Net(0)
    short = from_proto(net.build(net.linear(strided(net, 8, 8, 4), WIDTH, WIDTH)))
    net = Net(0)
    single = from_proto(net.build(net.linear(net.x("batch", 1, WIDTH), WIDTH, WIDTH)))
    assert [facts.sizes["x"][1] for facts in probed(plain.graph)] == [5, 7]
    assert [facts.sizes["x"][1] for facts in probed(single.graph)] == [1, 1]
    assert [facts.sizes["x"][1] for facts in probed(short.graph)] == [5, 7, 80]


# Factors that follow from open sizes


def logarithm_of_tokens(net, y):
    tokens = net("Gather", net("Shape", y), np.int64(1), axis=0)
    return net("Log", net("Cast", tokens, to=onnx.TensorProto.FLOAT))


def by_tokens(net, y):
    """Queries that grow with the logarithm of the number of tokens."""
    query, *others = (split_heads(net, each) for each in projections(net, y))
    query = net("Mul", query, logarithm_of_tokens(net, y))
    return merge_heads(net, mix(net, query, *others))


def grown(net, tokens):
    """1 up to 1,000 tokens, and more beyond."""
    return net("Add", net("Relu", net("Log", net("Div", tokens, 1000.0))), 1.0)


def counted(net, tokens):
    return net("Add", net("Floor", net("Div", tokens, 1000.0)), 1.0)


def chosen(net, tokens):
    return net("Where", net("Greater", tokens, 1000.0), 2.0, 1.0)


def looked_up(net, tokens):
    """From a table whose last entry is that of all lengths beyond."""
    place = net("Cast", net("Max", net("Sub", tokens, 1000.0), 0.0), to=onnx.TensorProto.INT64)
    return net("Gather", net.const(np.arange(1.0, 301.0)), place)


@pytest.mark.parametrize("factor", [grown, counted, chosen, looked_up])
def test_a_factor_that_is_one_number_up_to_some_length_is_no_constant(factor):
    net = Net(0)
    query, *others = (split_heads(net, each) for each in projections(net, net.x()))
    tokens = net("Gather", net("Shape", "x"), np.int64(1), axis=0)
    tokens = net("Cast", tokens, to=onnx.TensorProto.FLOAT)
    query = net("Mul", query, factor(net, tokens))
    found = exact(net, merge_heads(net, mix(net, query, *others)), (2, 9, WIDTH), (1, 1200, WIDTH))
    assert found == [("vo",)]


def test_a_factor_that_is_made_of_fixed_sizes_is_a_constant():
    """One over the root of the head width, from the shape of the queries."""
    net = Net(0)
    query, *others = (split_heads(net, each) for each in projections(net, net.x()))
    width = net("Gather", net("Shape", query), np.int64(-1), axis=0)
    scale = net("Reciprocal", net("Sqrt", net("Cast", width, to=onnx.TensorProto.FLOAT)))
    query = net("Mul", query, scale)
    found = exact(net, merge_heads(net, mix(net, query, *others)), (2, 9, WIDTH), (1, 200, WIDTH))
    assert found == [("qk", "vo")]


def patches(net, *sizes):
    x = net.x("batch", 3, *sizes)
    filters = net.random(WIDTH, 3, PATCH, PATCH, gain=0.1)
    y = net("Conv", x, filters, kernel_shape=[PATCH] * 2, strides=[PATCH] * 2)
    return net("Transpose", net("Reshape", y, [0, WIDTH, -1]), perm=[0, 2, 1])


def test_a_factor_that_follows_from_open_pixels_is_no_constant():
    net = Net(0)
    y = by_tokens(net, patches(net, "height", "width"))
    shapes = (2, 3, 224, 224), (1, 3, 64, 96)
    assert exact(net, y, *shapes) == [("vo",)]


def test_nor_one_that_follows_from_what_is_open_in_given_shapes():
    net = Net(0)
    y = by_tokens(net, net.x())
    found = exact(net, y, (2, 24, WIDTH), (1, 9, WIDTH), given={"x": (1, 24, WIDTH)})
    assert found == [("vo",)]


def test_places_are_not_cut_for_the_picture_that_is_probed():
    """A table of places of which a model takes as many as it has patches."""
    net = Net(0)
    y = patches(net, "height", "width")
    places = net.const(net.random(900, WIDTH))
    count = net("Gather", net("Shape", y), [1], axis=0)
    y = net("Add", y, net("Slice", places, [0], count, [0]))
    y = merge_heads(net, mix(net, *(split_heads(net, each) for each in projections(net, y))))
    assert exact(net, y, (2, 3, 224, 224), (1, 3, 64, 96)) == [("qk", "vo")]


def test_nor_where_the_table_has_no_place_for_a_larger_one():
    """Smaller pictures take the first of the places."""
    net = Net(0)
    y = patches(net, "height", "width")
    places = net.const(net.random((224 // PATCH) ** 2, WIDTH))
    count = net("Gather", net("Shape", y), [1], axis=0)
    y = by_tokens(net, net("Add", y, net("Slice", places, [0], count, [0])))
    assert exact(net, y, (2, 3, 224, 224), (1, 3, 64, 96)) == [("vo",)]


def test_pixels_that_weights_fix_are_left_as_they_are():
    """Declared open, but with a place for each of the patches of 224 pixels a side."""
    net = Net(0)
    y = net("Add", patches(net, "height", "width"), net.random(1, (224 // PATCH) ** 2, WIDTH))
    y = merge_heads(net, mix(net, *(split_heads(net, each) for each in projections(net, y))))
    assert exact(net, y, (2, 3, 224, 224)) == [("qk", "vo")]


def test_only_what_is_open_is_stretched():
    net = Net(0)
    graph = from_proto(net.build(net("Relu", net.x("batch", 3, "height", 32)))).graph
    assert stretched(graph, {"x": (4, 3, 64, 32)}, 2) == {"x": (4, 3, 128, 32)}
