"""Values that follow from fixed sizes become constants; none that merely look so do."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx.parser
import pytest

from corp_onnx.graph.model import from_proto
from corp_onnx.session import open_session
from corp_onnx.surgery import settle
from tests.test_tidy import HEAD, tidied

POSITIONS = """
    sizes = Shape(x)
    s = Cast<to = 6>(sizes)
    h = Gather<axis = 0>(s, two)
    w = Gather<axis = 0>(s, three)
    rows = Div(h, patch)
    columns = Div(w, patch)
    rows1 = Unsqueeze(rows, first)
    columns1 = Unsqueeze(columns, first)
    narrow = Concat<axis = 0>(ones, rows1, columns1)
    like = Cast<to = 7>(narrow)
    whole = Concat<axis = 0>(like, none)
    grid = Resize<mode = "linear">(table, , , whole)
    y = Add(x, grid)
"""
"""A table of positions, resized to as many patches as a picture has."""


def positions(picture, table="1,3,2,2"):
    text = f"""{HEAD} g (float[{picture}] x) => (float[B,3,R,C] y)
        <int64 two = {{2}}, int64 three = {{3}}, int32 patch = {{1}}, int64[1] first = {{0}},
         int32[2] ones = {{1, 3}}, int64[0] none = {{}}, float[{table}] table = {{
         {", ".join(map(str, range(12)))}}}> {{ {POSITIONS} }}"""
    return from_proto(onnx.parser.parse_model(text))


def operators(model):
    return Counter(node.op for node in model.graph.nodes)


def result(model, *shape):
    feeds = {"x": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    (value,) = open_session(model).run(feeds).values()
    return value


def test_positions_for_pictures_of_one_size_wait_for_nothing():
    before = positions("B,3,6,4")
    after = tidied(before)
    assert operators(after) == {"Resize": 1, "Add": 1}
    assert all(not name or name == "table" or "settled" in name for name in reads(after, "Resize"))
    for batch in (1, 5):
        assert np.array_equal(result(before, batch, 3, 6, 4), result(after, batch, 3, 6, 4))


def reads(model, op):
    return [read.name for node in model.graph.nodes if node.op == op for read in node.inputs]


def test_positions_for_pictures_of_any_size_are_computed():
    before = positions("B,3,H,W")
    assert operators(tidied(before)) == operators(before)


def test_the_batch_in_the_same_shape_is_not_written_down():
    text = f"""{HEAD} g (float[B,4] x) => (float[B,4] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, float nought = {{0}}> {{
        s = Shape(x)
        b = Slice(s, zero, one)
        zeros = Expand(nought, s)
        last = Concat<axis = 0>(b, one)
        more = Expand(nought, last)
        both = Add(zeros, more)
        y = Add(x, both) }}"""
    before = from_proto(onnx.parser.parse_model(text))
    after = tidied(before)
    assert operators(after) == operators(before)
    assert np.array_equal(result(before, 7, 4), result(after, 7, 4))


BOUND = f"""{HEAD} g (float[B,N] x) => (float[B,N] y)
    <int64 one = {{1}}, int64 bound = {{2500}}, float low = {{1}}, float high = {{2}}> {{
    s = Shape(x)
    n = Gather<axis = 0>(s, one)
    long = Greater(n, bound)
    factor = Where(long, high, low)
    y = Mul(x, factor) }}"""


def test_a_bound_that_no_probe_passes_is_still_compared_with():
    before = from_proto(onnx.parser.parse_model(BOUND))
    after = tidied(before)
    for length in (5, 2600):
        assert np.array_equal(result(before, 2, length), result(after, 2, length))


def test_what_is_alike_at_all_probes_would_be_written_down_wrongly(monkeypatch):
    """The twin: without a look at what it is computed of, the comparison seems fixed."""
    monkeypatch.setattr(settle, "_is_fixed", lambda tensor, fixed: True)
    before = from_proto(onnx.parser.parse_model(BOUND))
    after = tidied(before)
    assert np.array_equal(result(before, 2, 5), result(after, 2, 5))
    assert not np.array_equal(result(before, 2, 2600), result(after, 2, 2600))


TRACED = {
    "chosen": """
        long = Greater(n, bound)
        place = Cast<to = 7>(long)
        factor = Gather<axis = 0>(table, place)
        y = Mul(x, factor)
    """,
    "empty": """
        numbers = Range(zero, n, one)
        tail = Slice(numbers, far, end, first)
        total = ReduceSum<keepdims = 0>(tail)
        f = Cast<to = 1>(total)
        y = Add(x, f)
    """,
    "empty among others": """
        numbers = Range(zero, n, one)
        tail = Slice(numbers, far, end, first)
        more = Concat<axis = 0>(tail, seven)
        total = ReduceSum<keepdims = 0>(more)
        f = Cast<to = 1>(total)
        y = Add(x, f)
    """,
    "a size again": """
        up = Add(n, bound)
        blocks = Div(up, wide)
        as_many = Unsqueeze(blocks, first)
        zeros = ConstantOfShape(as_many)
        again = Shape(zeros)
        f = Cast<to = 1>(again)
        y = Add(x, f)
    """,
}
"""What no probe shows to change: none is as long as 2600 tokens."""


@pytest.mark.parametrize("body", TRACED.values(), ids=TRACED)
def test_what_follows_from_a_size_is_not_fixed_by_a_detour(body):
    text = f"""{HEAD} g (float[B,N] x) => (float[B,N] y)
        <int64 zero = {{0}}, int64 one = {{1}}, int64 bound = {{2500}}, int64 wide = {{2501}},
         int64[1] first = {{0}}, int64[1] far = {{2550}}, int64[1] end = {{9999}},
         int64[1] seven = {{7}}, float[2] table = {{1, 2}}> {{
        s = Shape(x)
        n = Gather<axis = 0>(s, one) {body} }}"""
    before = from_proto(onnx.parser.parse_model(text))
    after = tidied(before)
    for length in (5, 2600):
        assert np.array_equal(result(before, 2, length), result(after, 2, length))
    assert not np.array_equal(result(before, 2, 5)[:, :1], result(before, 2, 2600)[:, :1])


def test_one_tensor_may_be_data_and_index():
    text = f"""{HEAD} g (float[B,4] x) => (float[B,4] y) <int64[1] c = {{0}}> {{
        s = Shape(x)
        zero = Gather<axis = 0>(c, c)
        f = Cast<to = 1>(zero)
        y = Add(x, f) }}"""
    before = from_proto(onnx.parser.parse_model(text))
    after = tidied(before)
    assert operators(after) == {"Add": 1}
    assert np.array_equal(result(before, 3, 4), result(after, 3, 4))


def test_an_input_of_unknown_rank_is_left_alone():
    text = f"""{HEAD} g (float[B,4] x, float m) => (float[B,4] y) {{
        s = Shape(m)
        n = Size(s)
        f = Cast<to = 1>(n)
        y = Add(x, f) }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.input[1].type.tensor_type.ClearField("shape")
    before = from_proto(proto)
    assert operators(tidied(before)) == operators(before)


@pytest.mark.parametrize(("limit", "left"), [(1, {"Tile": 1, "Add": 1}), (4, {"Add": 1})])
def test_what_is_larger_than_a_size_is_left_to_engines(monkeypatch, limit, left):
    monkeypatch.setattr(settle, "LARGEST", limit)
    text = f"""{HEAD} g (float[B,4] x) => (float[B,4] y)
        <int64 one = {{1}}, int64[1] first = {{0}}, float[1] half = {{0.5}}> {{
        s = Shape(x)
        n = Gather<axis = 0>(s, one)
        times = Unsqueeze(n, first)
        row = Tile(half, times)
        y = Add(x, row) }}"""
    before = from_proto(onnx.parser.parse_model(text))
    after = tidied(before)
    assert operators(after) == left
    assert np.array_equal(result(before, 3, 4), result(after, 3, 4))


def test_a_size_that_the_caller_asks_for_is_still_told():
    text = f"""{HEAD} g (float[B,4] x) => (int64 n)
        <int64 one = {{1}}> {{ s = Shape(x) n = Gather<axis = 0>(s, one) }}"""
    before = from_proto(onnx.parser.parse_model(text))
    after = tidied(before)
    assert result(after, 3, 4) == result(before, 3, 4) == 4
    assert result(after, 3, 4).shape == ()
