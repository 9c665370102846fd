"""Targets of Reshape that always come to the same become constants; no other does."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from corp_onnx.graph.model import from_proto
from corp_onnx.graph.varied import probed
from corp_onnx.session import open_session
from corp_onnx.surgery import tidy

HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'
CONSTANTS = (
    "<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[2] rest = {4, -1}, "
    "int64[1] last = {12}, int64[1] three = {3}>"
)


def model(inputs, outputs, body):
    text = f"{HEAD} g ({inputs}) => ({outputs}) {CONSTANTS} {{ {body} }}"
    return from_proto(onnx.parser.parse_model(text))


def tidied(before):
    graph = before.graph.copy()
    tidy.tidy(graph)
    graph.cleanup(remove_unused_graph_inputs=False)
    return before.with_graph(graph)


def targets(one):
    return [
        node.inputs[1].values.tolist() if isinstance(node.inputs[1], gs.Constant) else None
        for node in one.graph.nodes
        if node.op == "Reshape"
    ]


def same(one, other, **shapes):
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    (x,), (y,) = (tuple(open_session(each).run(feeds).values()) for each in (one, other))
    return x.shape == y.shape and np.array_equal(x, y)


SPLIT_HEADS = """
    s = Shape(x)
    b = Slice(s, zero, one)
    n = Slice(s, one, two)
    t = Concat<axis = 0>(b, n, rest)
    y = Reshape(x, t)
"""


def test_a_target_that_follows_batch_and_sequence_is_copied_from_the_input():
    before = model("float[B,N,12] x", "float[B,N,4,3] y", SPLIT_HEADS)
    after = tidied(before)
    assert targets(before) == [None]
    assert targets(after) == [[0, 0, 4, 3]]
    assert [node.op for node in after.graph.nodes] == ["Reshape"]
    for batch, sequence in ((1, 1), (4, 9), (7, 300)):
        assert same(before, after, x=(batch, sequence, 12))


def test_one_dimension_may_follow_from_the_rest():
    body = """
        s = Shape(x)
        b = Slice(s, zero, one)
        n = Slice(s, one, two)
        m = Mul(b, n)
        t = Concat<axis = 0>(m, last)
        y = Reshape(x, t)
    """
    before = model("float[B,N,12] x", "float[M,12] y", body)
    after = tidied(before)
    assert targets(after) == [[-1, 12]]
    assert same(before, after, x=(3, 5, 12))


def test_two_dimensions_that_change_with_the_sizes_stay_computed():
    body = """
        s = Shape(x)
        b = Slice(s, zero, one)
        n = Slice(s, one, two)
        twice = Mul(b, two)
        more = Mul(n, two)
        t = Concat<axis = 0>(twice, more, three)
        y = Reshape(x, t)
    """
    before = model("float[B,N,12] x", "float[P,Q,3] y", body)
    after = tidied(before)
    assert targets(after) == [None]
    assert same(before, after, x=(3, 4, 12))


def test_one_probe_would_write_down_what_changes(monkeypatch):
    """The twin: from one set of sizes, batch and sequence look fixed."""
    body = SPLIT_HEADS.replace("Concat<axis = 0>(b, n, rest)", "Concat<axis = 0>(n, b, rest)")
    before = model("float[B,N,12] x", "float[N,B,4,3] y", body)
    assert targets(tidied(before)) == [None]
    monkeypatch.setattr(tidy, "_tell_apart", lambda graph, probes: True)
    monkeypatch.setattr(tidy, "_probes", lambda graph: probed(graph)[:1])
    assert targets(tidied(before)) == [[5, 2, 4, 3]]


@pytest.mark.parametrize("sizes", ["B,3,H,W", "-1,3,-1,-1"], ids=["named", "below zero"])
def test_pictures_of_any_size_are_left_alone(sizes):
    body = "s = Shape(x) b = Slice(s, zero, two) t = Concat<axis = 0>(b, minus) y = Reshape(x, t)"
    text = (
        f"{HEAD} g (float[{sizes}] x) => (float[B,3,P] y) <int64[1] zero = {{0}}, "
        f"int64[1] two = {{2}}, int64[1] minus = {{-1}}> {{ {body} }}"
    )
    before = from_proto(onnx.parser.parse_model(text))
    assert targets(tidied(before)) == [None]


def test_sizes_that_are_fixed_are_written_down_where_they_are_not_the_inputs():
    body = SPLIT_HEADS.replace("Concat<axis = 0>(b, n, rest)", "Concat<axis = 0>(n, b, rest)")
    before = model("float[2,5,12] x", "float[A,C,4,3] y", body)
    after = tidied(before)
    assert targets(after) == [[5, 2, 4, 3]]
    assert same(before, after, x=(2, 5, 12))


def test_a_fixed_size_that_is_equal_by_chance_is_not_copied():
    """16 tokens become 4 by 4: the second 4 is not that of the channels, which a cut may change."""
    body = "s = Shape(x) b = Slice(s, zero, one) t = Concat<axis = 0>(b, fours) y = Reshape(x, t)"
    text = (
        f"{HEAD} g (float[B,16,4] x) => (float[B,4,4,4] y) <int64[1] zero = {{0}}, "
        f"int64[1] one = {{1}}, int64[3] fours = {{4, 4, 4}}> {{ {body} }}"
    )
    before = from_proto(onnx.parser.parse_model(text))
    after = tidied(before)
    assert targets(after) == [[0, 4, 4, 4]]
    assert same(before, after, x=(3, 16, 4))


PADDED = """
    s = Shape(x)
    b = Slice(s, zero, one)
    n = Slice(s, one, two)
    up = Add(n, above)
    blocks = Div(up, wide)
    long = Mul(blocks, wide)
    flat = Mul(long, last)
    ends = Concat<axis = 0>(b, flat)
    e = Expand(nought, ends)
    t = Concat<axis = 0>(b, long, rest)
    y = Reshape(e, t)
"""


def test_sequences_padded_to_a_multiple_are_not_of_one_length(monkeypatch):
    """The twin: up to 512, which the usual sizes never go beyond, all are padded to the same."""
    text = f"""{HEAD} g (float[B,N,12] x) => (float[B,M,4,3] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] last = {{12}},
         int64[1] above = {{511}}, int64[1] wide = {{512}}, int64[2] rest = {{4, -1}},
         float[1,1] nought = {{0.0}}> {{ {PADDED} }}"""
    before = from_proto(onnx.parser.parse_model(text))
    after = tidied(before)
    for length in (5, 600):
        assert same(before, after, x=(2, length, 12))
    monkeypatch.setattr(tidy, "LONG", ())
    assert targets(tidied(before)) == [[0, 512, 4, 3]]


@pytest.mark.parametrize(("second", "tidied_target"), [("N", [0, 0, 0]), ("M", None)])
def test_dimensions_that_only_happen_to_be_equal_are_told_apart_by_name(second, tidied_target):
    """The twin: were they one, the target would be that of the input."""
    body = "s = Shape(k) y = Reshape(x, s)"
    before = model(f"float[B,N,{second}] x, float[B,{second},N] k", "float[P,Q,R] y", body)
    assert targets(tidied(before)) == [tidied_target]


def test_a_graph_with_choices_is_left_alone():
    body = (
        SPLIT_HEADS.replace("y = ", "z = ")
        + """
        c = Equal(b, n)
        y = If (c) <then_branch = g1 () => (float[P,Q,4,3] u) { u = Identity(z) },
                    else_branch = g2 () => (float[P,Q,4,3] v) { v = Neg(z) }>
    """
    )
    before = model("float[B,N,12] x", "float[P,Q,4,3] y", body)
    assert targets(tidied(before)) == [None]


def test_a_target_written_down_means_the_input_by_zero_whatever_it_was_before():
    body = SPLIT_HEADS.replace("Reshape(x, t)", "Reshape<allowzero = 1>(x, t)")
    before = model("float[B,N,12] x", "float[B,N,4,3] y", body)
    after = tidied(before)
    (node,) = (node for node in after.graph.nodes if node.op == "Reshape")
    assert not node.attrs.get("allowzero")
    assert same(before, after, x=(2, 3, 12))
