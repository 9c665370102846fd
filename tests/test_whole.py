"""Plain attention becomes one operator of ONNX Runtime; all else stays."""

from __future__ import annotations

import re
from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from onnxruntime import InferenceSession

from corp_onnx import example
from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.deploy.ort import rewritten
from corp_onnx.deploy.targets import open_target
from corp_onnx.deploy.whole import DOMAIN, write_whole
from corp_onnx.graph.model import from_proto, load, write
from corp_onnx.plan import uniform
from corp_onnx.session import open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from tests import zoo_models
from tests.properties import unchanged_by_ratio_0

SAME = 1e-5
"""Of sums of a few dozen products of size 1, in float32."""

PLAIN = """
    q1 = Reshape(q, heads)
    q2 = Transpose<perm = [0, 2, 1, 3]>(q1)
    q3 = Mul(q2, half)
    k1 = Reshape(k, heads)
    k2 = Transpose<perm = [0, 2, 3, 1]>(k1)
    v1 = Reshape(v, wide)
    v2 = Transpose<perm = [0, 2, 1, 3]>(v1)
    l = MatMul(q3, k2)
    p = Softmax<axis = -1>(l)
    c = MatMul(p, v2)
    c1 = Transpose<perm = [0, 2, 1, 3]>(c)
    y = Reshape(c1, together)
"""


INPUTS = "float[B,N,8] q, float[B,M,8] k, float[B,M,12] v"

MASKED = PLAIN.replace("q3 = Mul(q2, half)", "").replace(
    "l = MatMul(q3, k2)", "l1 = MatMul(q2, k2) l2 = Mul(l1, half) l = Add(l2, m)"
)

NO_NUMBERS = MASKED.replace(
    "c = MatMul(p, v2)",
    "none = IsNaN(p) kept = Where(none, zero, p) c = MatMul(kept, v2)",
)

ROWS = "float[B,1,1,M]"
"""A mask by key, as of BERT."""


def attention(body=PLAIN, outputs="float[B,N,12] y", inputs=INPUTS, opset=17, half=0.5):
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
    g ({inputs}) => ({outputs})
    <int64[4] heads = {{0, 0, 2, 4}}, int64[4] wide = {{0, 0, 2, 6}}, int64[3] together =
     {{0, 0, 12}}, int64[4] single = {{0, 0, 1, 4}}, float half = {{{half}}},
     float[1] two = {{2.0}}, float zero = {{0.0}}, float[2,1,1] each = {{0.5, 0.25}},
     int64[1] first = {{0}}, int64[1] third = {{2}}, int64[1] fourth = {{3}},
     int64[1] four = {{4}}, int64[1] twelve = {{12}}, int64 many = {{800}},
     float large = {{100000}},
     int64[4] as_is = {{0, 0, 0, 0}}, int64[4] four_heads = {{0, 4, -1, 3}},
     int64[3] back = {{0, 0, 8}}, int64[2] rows = {{-1, 12}},
     float[8] tilt = {{1.0, -0.5, 2.0, 1.5, -1.0, 0.5, 1.0, -2.0}}>
    {{ {body} }}"""
    return gs.import_onnx(onnx.parser.parse_model(text))


def operators(graph):
    return Counter(node.op for node in graph.nodes)


def masked(body=MASKED, mask=ROWS, **options):
    return attention(body, inputs=f"{INPUTS}, {mask} m", **options)


def computed(graph, sizes=(3, 5, 7), mask=None):
    """What it gives for random operands of a batch, queries and keys; and for a mask."""
    proto = gs.export_onnx(graph, do_type_check=False)
    if all(opset.domain != DOMAIN for opset in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    rng = np.random.default_rng(0)
    b, n, m = sizes
    shapes = {"q": (b, n, 8), "k": (b, m, 8), "v": (b, m, 12)}
    feeds = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    feeds |= {} if mask is None else {"m": mask}
    names = {tensor.name for tensor in graph.inputs}
    feeds = {name: value for name, value in feeds.items() if name in names}
    return InferenceSession(proto.SerializeToString()).run(None, feeds)


def padding(shape, hidden, *, seed=0):
    """A mask that hides about a third of all keys, of some queries all; random if there is no
    value for what is hidden.
    """
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape, dtype=np.float32) * 3
    if hidden is None:
        return values
    hides = rng.random(shape) < 1 / 3
    hides[..., -1, :] |= rng.random(shape[:-2] + shape[-1:]) < 1 / 2
    hides[(0,) * (len(shape) - 1)] = True
    return np.where(hides, np.float32(hidden), np.float32(0))


def same(found, wanted):
    """Whether numbers are close, and what is no number is none in both."""
    return np.allclose(found, wanted, rtol=0, atol=SAME, equal_nan=True)


def test_plain_attention_is_one_operator_and_computes_the_same():
    graph = attention()
    before = computed(graph)
    assert write_whole(graph) == 1
    assert operators(graph) == {"MultiHeadAttention": 1}
    (node,) = graph.nodes
    assert node.attrs == {"num_heads": 2, "scale": 0.5}
    assert np.abs(computed(graph)[0] - before[0]).max() < 1e-5


def test_the_scale_counts():
    """The twin: with the operator's own scale, 1 over the root of 4, the result is the same only
    because 0.5 is that; with another it is not.
    """
    graph = attention(PLAIN.replace("half", "two"))
    before = computed(graph)
    assert write_whole(graph) == 1
    assert np.abs(computed(graph)[0] - before[0]).max() < 1e-5
    del graph.nodes[0].attrs["scale"]
    assert np.abs(computed(graph)[0] - before[0]).max() > 0.1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("l = MatMul(q3, k2)", "l0 = MatMul(q3, k2) l = Relu(l0)"),
        ("p = Softmax<axis = -1>(l)", "p = Softmax<axis = 1>(l)"),
        ("k2 = Transpose<perm = [0, 2, 3, 1]>(k1)", "k2 = Transpose<perm = [2, 0, 3, 1]>(k1)"),
        ("c = MatMul(p, v2)", "v3 = Mul(v2, half) c = MatMul(p, v3)"),
        ("y = Reshape(c1, together)", "y = Identity(c1)"),
        ("y = Reshape(c1, together)", "y = Reshape(c1, rows)"),
        ("c1 = Transpose<perm = [0, 2, 1, 3]>(c)", "c1 = Transpose<perm = [0, 3, 1, 2]>(c)"),
    ],
    ids=[
        "a function of the logits",
        "another axis",
        "another turn",
        "a scaled value",
        "no joining",
        "samples joined too",
        "joined in another order",
    ],
)
def test_attention_of_another_form_stays(old, new):
    assert old in PLAIN
    graph = attention(PLAIN.replace(old, new))
    before = operators(graph)
    assert write_whole(graph) == 0
    assert operators(graph) == before


@pytest.mark.parametrize(
    "inputs",
    [
        "float[1,N,8] q, float[B,M,8] k, float[B,M,12] v",
        "float[B,N,8] q, float[1,M,8] k, float[1,M,12] v",
        "float[B,N,8] q, float[B,M,8] k, float[1,M,12] v",
        "float[B,N,2,4] q, float[B,M,8] k, float[B,M,12] v",
        "float16[B,N,8] q, float16[B,M,8] k, float16[B,M,12] v",
    ],
    ids=[
        "queries for all samples",
        "keys and values for all samples",
        "values for all samples",
        "of four axes",
        "of a type without a kernel",
    ],
)
def test_operands_that_the_operator_does_not_take_stay(inputs):
    assert write_whole(attention(inputs=INPUTS)) == 1
    assert write_whole(attention(inputs=inputs)) == 0


def test_a_type_with_a_kernel_is_taken():
    body = PLAIN.replace("q3 = Mul(q2, half)", "").replace("q3", "q2")
    graph = attention(body, "float16[B,N,12] y", INPUTS.replace("float[", "float16["))
    assert write_whole(graph, [np.dtype(np.float16)]) == 1


def test_without_an_axis_a_softmax_of_an_old_opset_is_along_another():
    """Before opset 13 the default is the second axis, and all behind it."""
    body = PLAIN.replace("Softmax<axis = -1>", "Softmax")
    assert write_whole(attention(body, opset=13)) == 1
    assert write_whole(attention(body, opset=12)) == 0


def test_logits_that_are_all_zero_stay():
    """To the operator a scale of 0 says that it shall take its own."""
    assert write_whole(attention(half=0.25)) == 1
    assert write_whole(attention(half=0.0)) == 0
    twice = PLAIN.replace("q3 = Mul(q2, half)", "q4 = Mul(half, q2) q3 = Mul(half, q4)")
    assert write_whole(attention(twice, half=0.25)) == 1
    assert write_whole(attention(twice, half=1e-30)) == 0


def test_a_scaled_key_counts():
    body = PLAIN.replace("l = MatMul(q3, k2)", "k3 = Mul(k2, two) l = MatMul(q3, k3)")
    graph = attention(body)
    before = computed(graph)
    assert write_whole(graph) == 1
    assert graph.nodes[0].attrs["scale"] == 1.0
    assert np.abs(computed(graph)[0] - before[0]).max() < 1e-5


def test_attention_that_a_branch_finishes_stays():
    """What lies in a body cannot be taken out of it."""
    head, tail = PLAIN.split("    c = ")
    body = f"""{head}
    n = ReduceMax<keepdims = 0>(q)
    yes = Cast<to = 9>(n)
    y = If (yes) <then_branch = g1 () => (float[P,Q,R] u) {{ c = {tail.replace("y =", "u =")} }},
                  else_branch = g2 () => (float[P,Q,R] w) {{ w = Identity(v) }}>
    """
    assert write_whole(attention(body)) == 0


def test_one_head_of_keys_for_two_of_queries_stays():
    body = PLAIN.replace("k1 = Reshape(k, heads)", "k1 = Reshape(k, single)")
    graph = attention(body, inputs=INPUTS.replace("float[B,M,8] k", "float[B,M,4] k"))
    assert write_whole(graph) == 0


def test_attention_whose_weights_are_shown_stays():
    graph = attention(outputs="float[B,N,12] y, float[B,2,N,M] p")
    assert write_whole(graph) == 0


# Masks


@pytest.mark.parametrize("hidden", [None, -1e4, np.finfo(np.float32).min, -np.inf])
@pytest.mark.parametrize(
    "shape", ["B,1,1,M", "B,1,N,M", "1,1,N,M", "1,2,N,M", "B,2,N,M", "B,2,1,M", "N,M", "2,N,M"]
)
def test_a_mask_of_any_shape_that_broadcasts_is_a_bias(shape, hidden):
    """By key as of BERT, by pair as of GPT, and of every head as of Swin and T5."""
    graph, plain = (masked(mask=f"float[{shape}]") for _ in range(2))
    assert write_whole(graph) == 1
    found = operators(graph)
    assert found["MultiHeadAttention"] == 1
    assert not found.keys() & {"Softmax", "MatMul", "Add", "Mul"}
    for sizes in [(3, 5, 7), (1, 6, 6), (4, 1, 9), (2, 8, 3)]:
        named = dict(zip("BNM", sizes, strict=True))
        dims = tuple(named.get(dim) or int(dim) for dim in shape.split(","))
        mask = padding(dims, hidden)
        (wanted,) = computed(plain, sizes, mask)
        assert np.isnan(wanted).any() == (hidden == -np.inf)
        assert same(computed(graph, sizes, mask)[0], wanted)


def test_the_mask_counts():
    """The twin: with the mask of another seed the result is another."""
    graph = masked()
    before = computed(graph, mask=padding((3, 1, 1, 7), None))[0]
    assert write_whole(graph) == 1
    assert same(computed(graph, mask=padding((3, 1, 1, 7), None))[0], before)
    assert not same(computed(graph, mask=padding((3, 1, 1, 7), None, seed=1))[0], before)


@pytest.mark.parametrize("opset", [11, 12, 17])
def test_a_mask_that_is_whole_is_read_as_it_is_and_another_expanded(opset):
    """The operator wants the axes of queries and keys; over samples and heads it broadcasts."""
    whole, rows = masked(mask="float[B,1,N,M]", opset=opset), masked(opset=opset)
    assert write_whole(whole) == write_whole(rows) == 1
    assert operators(whole) == {"MultiHeadAttention": 1}
    assert operators(rows)["Expand"] == 1
    mask = padding((3, 1, 1, 7), -1e4)
    assert same(computed(rows, mask=mask)[0], computed(masked(), mask=mask)[0])


@pytest.mark.parametrize(
    ("scaled", "scale"),
    [
        ("l2 = Mul(l1, two)", 2.0),
        ("l2 = Mul(two, l1)", 2.0),
        ("l2 = Div(l1, two)", 0.5),
        ("l3 = Div(l1, half) l2 = Mul(l3, two)", 4.0),
        ("s = Constant<value = float {0.25}>() l2 = Mul(l1, s)", 0.25),
        ("l2 = Identity(l1)", None),
        ("l2 = Div(two, l1)", None),
        ("l2 = Div(l1, zero)", None),
        ("l2 = Mul(l1, each)", None),
        ("l2 = Add(l1, two)", None),
        ("l3 = Mul(l1, half) l4 = Relu(l3) l2 = Mul(l4, two)", None),
    ],
)
def test_a_number_before_the_mask_is_part_of_the_scale(scaled, scale):
    body = MASKED.replace("l2 = Mul(l1, half)", scaled)
    graph, plain = masked(body), masked(body)
    assert write_whole(graph) == (scale is not None)
    if scale is not None:
        (node,) = (node for node in graph.nodes if node.op == "MultiHeadAttention")
        assert node.attrs["scale"] == scale
        mask = padding((3, 1, 1, 7), None)
        assert same(computed(graph, mask=mask)[0], computed(plain, mask=mask)[0])


def test_a_number_without_a_mask_is_part_of_the_scale():
    body = MASKED.replace("l = Add(l2, m)", "l = Identity(l2)")
    assert write_whole(attention(body)) == 0
    body = body.replace("l2 = Mul(l1, half) l = Identity(l2)", "l = Div(l1, half)")
    graph, plain = attention(body), attention(body)
    assert write_whole(graph) == 1
    assert same(computed(graph)[0], computed(plain)[0])


def test_a_mask_of_a_size_that_depends_on_the_data_is_expanded():
    """What can be added without making more of the logits is one number, or one for every key."""
    body = MASKED.replace("l = Add(l2, m)", "some = Compress<axis = 3>(m, yes) l = Add(l2, some)")
    body = body.replace(
        "l1 =", "n = Shape(m) n1 = Slice(n, fourth, four) yes = Cast<to = 9>(n1) l1 ="
    )
    graph, plain = masked(body), masked(body)
    mask = padding((3, 1, 1, 7), None)
    assert write_whole(graph) == 1
    assert same(computed(graph, mask=mask)[0], computed(plain, mask=mask)[0])


def test_the_mask_may_stand_before_the_logits():
    graph, plain = (masked(MASKED.replace("Add(l2, m)", "Add(m, l2)")) for _ in range(2))
    mask = padding((3, 1, 1, 7), None)
    assert write_whole(graph) == 1
    assert same(computed(graph, mask=mask)[0], computed(plain, mask=mask)[0])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("l2 = Mul(l1, half) l = Add(l2, m)", "l2 = Add(l1, m) l = Mul(l2, half)"),
        ("l = Add(l2, m)", "l = Sub(l2, m)"),
        ("l = Add(l2, m)", "l3 = Add(l2, m) l = Add(l3, m)"),
        ("l = Add(l2, m)", "l3 = Add(l2, m) l = Relu(l3)"),
        ("l = Add(l2, m)", "l = Where(yes, l2, m)"),
        ("l2 = Mul(l1, half)", "n = ReduceMax(l1) l2 = Mul(l1, n)"),
        ("l2 = Mul(l1, half)", "n = Size(q) n1 = Cast<to = 1>(n) l2 = Div(l1, n1)"),
        ("p = Softmax<axis = -1>(l)", "p = Softmax<axis = 2>(l)"),
    ],
    ids=[
        "a scaled mask",
        "a mask that is taken away",
        "two masks",
        "a function of masked logits",
        "a mask in place of logits",
        "a scale that depends on the data",
        "a scale that depends on the size",
        "over queries",
    ],
)
def test_masked_attention_of_another_form_stays(old, new):
    assert old in MASKED
    graph = attention(MASKED.replace(old, new), inputs=f"{INPUTS}, {ROWS} m, bool[M] yes")
    before = operators(graph)
    assert write_whole(graph) == 0
    assert operators(graph) == before


@pytest.mark.parametrize("shown", ["float[B,2,N,M] l1", "float[B,2,N,M] l2", "float[B,2,N,M] l"])
def test_logits_that_somebody_else_sees_stay(shown):
    assert write_whole(masked(outputs=f"float[B,N,12] y, {shown}")) == 0
    body = f"{MASKED} z = Relu({shown.split()[-1]})"
    assert write_whole(masked(body, outputs="float[B,N,12] y, float[B,2,N,M] z")) == 0


@pytest.mark.parametrize("mask", ["float[1,B,1,1,M]", "float[B,1,N,M]", "float[2,1,1,1]"])
def test_a_mask_that_makes_more_of_the_logits_stays(mask):
    """One query for all becomes many; a sample for all becomes two; and four axes become five."""
    inputs = "float[1,1,8] q, float[1,M,8] k, float[1,M,12] v"
    assert write_whole(attention(MASKED, inputs=f"{inputs}, float[1,1,1,M] m")) == 1
    assert write_whole(attention(MASKED, inputs=f"{inputs}, {mask} m")) == 0


def test_the_mask_is_of_the_type_of_the_operands():
    body = MASKED.replace("l2 = Mul(l1, half)", "").replace("l2", "l1")
    inputs = f"{INPUTS}, {ROWS} m".replace("float[", "float16[")
    graph = attention(body, "float16[B,N,12] y", inputs)
    assert write_whole(graph, [np.dtype(np.float32)]) == 0
    assert write_whole(graph, [np.dtype(np.float32), np.dtype(np.float16)]) == 1
    (node,) = (node for node in graph.nodes if node.op == "MultiHeadAttention")
    assert [tensor.dtype for tensor in node.inputs if tensor.name] == [np.float16] * 4


def test_a_mask_in_bfloat16_stays_as_it_is():
    """There is no telling whether a kernel reads it."""
    kinds = [np.dtype(ml_dtypes.bfloat16)]
    body = MASKED.replace("l2 = Mul(l1, half)", "").replace("l2", "l1")
    wide = f"{INPUTS}, {ROWS} m".replace("float[", "bfloat16[")
    assert write_whole(attention(body, "bfloat16[B,N,12] y", wide), kinds) == 0
    plain = body.replace("l1 = MatMul(q2, k2)  l = Add(l1, m)", "l = MatMul(q2, k2)")
    assert write_whole(attention(plain, "bfloat16[B,N,12] y", wide), kinds) == 1


def test_kernels_that_read_a_mask_wrongly_are_not_used(monkeypatch):
    monkeypatch.setattr("corp_onnx.deploy.whole.version", lambda: "1.21.1")
    assert write_whole(masked()) == 0
    assert write_whole(attention()) == 1
    monkeypatch.setattr("corp_onnx.deploy.whole.version", lambda: "1.22.0")
    assert write_whole(masked()) == 1


def layer(place, query, key):
    """Masked attention of one sequence to another, by tensors with names of their own."""
    body = MASKED.replace("wide", "heads").replace("together", "back")
    names = {name: f"{name}_{place}" for name in re.findall(r"(\w+) = [A-Z]", body)}
    names |= {operand: f"{operand}_{place}" for operand in "qkv"}
    own = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), body)
    made = {"q": query, "k": key, "v": key}
    return "".join(f"{name}_{place} = Mul({made[name]}, tilt) " for name in made) + own


def test_one_mask_of_many_layers_is_expanded_once():
    """And once for every layer whose queries are of another sequence than its keys."""
    sources = [("k", "k"), ("y_0", "y_0"), ("q", "y_1"), ("y_2", "y_1")]
    body = "".join(layer(place, *source) for place, source in enumerate(sources))
    graph, plain = (masked(body, outputs="float[B,N,8] y_3") for _ in range(2))
    assert write_whole(graph) == 4
    assert (operators(graph)["MultiHeadAttention"], operators(graph)["Expand"]) == (4, 3)
    for sizes in [(3, 5, 7), (2, 6, 3)]:
        mask = padding((sizes[0], 1, 1, sizes[2]), -1e4)
        assert same(computed(graph, sizes, mask)[0], computed(plain, sizes, mask)[0])


def test_zeros_in_place_of_what_is_no_number_are_zeros_of_the_result():
    """So exporters write PyTorch's attention with a mask of truth values."""
    graph, plain = masked(NO_NUMBERS), masked(NO_NUMBERS)
    assert write_whole(graph) == 1
    assert not operators(graph).keys() & {"Softmax", "MatMul"}
    mask = padding((3, 1, 1, 7), -np.inf)
    (found,), (wanted,) = computed(graph, mask=mask), computed(plain, mask=mask)
    assert same(found, wanted)
    assert not found[0].any()
    assert found[1:].all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Where(none, zero, p)", "Where(none, half, p)"),
        ("Where(none, zero, p)", "Where(none, p, zero)"),
        ("Where(none, zero, p)", "Where(none, zero, l)"),
        ("IsNaN(p)", "IsNaN(l)"),
        ("IsNaN(p)", "IsInf(p)"),
        ("none = IsNaN(p) kept = Where(none,", "z = IsNaN(p) o = IsNaN(m) kept = Where(o,"),
        ("kept = Where", "z = Not(none) kept = Where"),
    ],
)
def test_another_choice_among_the_weights_stays(old, new):
    assert old in NO_NUMBERS
    shown = ", bool[B,2,N,M] z" if "z =" in new else ""
    body = NO_NUMBERS.replace(old, new)
    assert write_whole(masked(body, outputs=f"float[B,N,12] y{shown}")) == 0
    assert write_whole(masked(NO_NUMBERS, outputs="float[B,N,12] y, float[B,2,N,M] p")) == 0


OWN_TARGET = MASKED.replace(
    "y = Reshape(c1, together)",
    "s = Shape(c1) t = Slice(s, first, third) u = Concat<axis = 0>(t, twelve) y = Reshape(c1, u)",
)


def test_a_target_that_is_computed_at_run_time_is_read_at_all_sizes():
    """From the very tensor that is reshaped, as exporters write it, if only that reads it."""
    graph, plain = masked(OWN_TARGET), masked(OWN_TARGET)
    mask = padding((3, 1, 1, 7), -1e4)
    assert write_whole(graph) == 1
    assert not operators(graph).keys() & {"Softmax", "MatMul"}
    assert same(computed(graph, mask=mask)[0], computed(plain, mask=mask)[0])
    shown = masked(f"{OWN_TARGET} z = Identity(t)", outputs="float[B,N,12] y, int64[2] z")
    assert write_whole(shown) == 0
    data = masked(f"{OWN_TARGET} z = Expand(zero, t)", outputs="float[B,N,12] y, float[B,N] z")
    assert write_whole(data) == 0


def test_a_reshape_that_changes_nothing_is_passed_over():
    graph, plain = (
        masked(MASKED.replace("c = MatMul(p, v2)", "c0 = MatMul(p, v2) c = Reshape(c0, as_is)"))
        for _ in range(2)
    )
    mask = padding((3, 1, 1, 7), -1e4)
    assert write_whole(graph) == 1
    assert same(computed(graph, mask=mask)[0], computed(plain, mask=mask)[0])
    cut_again = MASKED.replace(
        "c = MatMul(p, v2)", "c0 = MatMul(p, v2) c = Reshape(c0, four_heads)"
    )
    assert write_whole(masked(cut_again)) == 0


def test_a_scale_that_is_chosen_by_size_stays():
    """It is 2 at all sizes that are probed, and 12 at others."""
    chosen = """s = Shape(q) size = ReduceProd<keepdims = 0>(s) few = Less(size, many)
        t = If (few) <then_branch = g1 () => (int64[1] a) { a = Identity(third) },
                      else_branch = g2 () => (int64[1] b) { b = Identity(twelve) }>
        t1 = Cast<to = 1>(t) l2 = Mul(l1, t1)"""
    assert write_whole(masked(MASKED.replace("l2 = Mul(l1, half)", chosen))) == 0
    fixed = "t1 = Cast<to = 1>(third) l2 = Mul(l1, t1)"
    assert write_whole(masked(MASKED.replace("l2 = Mul(l1, half)", fixed))) == 1


def test_a_scale_that_is_one_number_up_to_some_size_stays():
    grown = """s = Shape(q) size = ReduceProd<keepdims = 0>(s) f = Cast<to = 1>(size)
        t = Max(f, large) l2 = Mul(l1, t)"""
    graph = masked(MASKED.replace("l2 = Mul(l1, half)", grown))
    assert write_whole(graph) == 0


@pytest.mark.parametrize("name", ["hf_bert_eager.ts11", "hf_bert_eager.dynamo18"])
def test_an_export_of_bert_is_whole_on_onnx_runtime(name, tmp_path):
    path = tmp_path / "bert.onnx"
    write(zoo_models.load(name), path)
    require_whole(path, tmp_path, [zoo_models.feeds(name, 3), zoo_models.feeds(name, 2, 7)])


def test_what_surgery_makes_of_an_export_of_bert_is_whole_on_onnx_runtime(tmp_path):
    """Its mask is minus infinity, and where all is masked the weights are 0."""
    name = "hf_bert_sdpa.ts17"
    model = from_proto(zoo_models.load(name))
    catalog = find_blocks(model)
    statistics = gather(model, catalog, [zoo_models.feeds(name, 16)])
    path = tmp_path / "bert.onnx"
    write(unchanged_by_ratio_0(model, catalog, statistics).proto(), path)
    all_masked = zoo_models.feeds(name, 2)
    all_masked["attention_mask"][1] = 0
    require_whole(path, tmp_path, [zoo_models.feeds(name, 3, 7), all_masked])


def require_whole(path, folder, inputs):
    """Of two layers with one mask, which is expanded once, if at all."""
    target = open_target("ort-cpu")
    build = target.build(path, folder, "fp32")
    found = Counter(node.op_type for node in onnx.load(build.path).graph.node)
    assert (found["MultiHeadAttention"], found["Softmax"]) == (2, 0)
    before = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert found["Expand"] <= before["Expand"] + 1
    engine, session = target.load(build), open_session(path)
    for feeds in inputs:
        results, wanted = engine.run(feeds), session.run(feeds)
        for end, value in wanted.items():
            assert np.isfinite(value).all()
            assert np.abs(results[end] - value).max() < 1e-4


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_surgery_emits_is_whole_on_onnx_runtime(tmp_path, share):
    """All of it, by the operators of the optimised graph."""
    model = load(example.MODEL)
    catalog = find_blocks(model)
    with np.load(example.CALIBRATION) as file:
        images = {"image": file["image"][:64].astype(np.float32)}
    statistics = gather(model, catalog, [images])
    plan = uniform(catalog, dict.fromkeys(("mlp", "qk", "vo"), share))
    cut = operate(model, catalog, solve(model, catalog, plan, statistics, Recipe("corp"))).model
    path = tmp_path / "cut.onnx"
    write(cut.proto(), path)
    target = open_target("ort-cpu")
    build = target.build(path, tmp_path, "fp32")
    found = Counter(node.op_type for node in onnx.load(build.path).graph.node)
    attentions = sum(block.id.startswith("attention") for block in catalog.blocks)
    assert found["MultiHeadAttention"] == attentions == 6
    assert found["Softmax"] == 0
    assert found["BiasGelu"] == 6
    wanted = open_session(path).run(images)["logits"]
    assert np.abs(target.load(build).run(images)["logits"] - wanted).max() < 1e-4


def test_weights_of_four_bits_beside_an_attention_stay_packed():
    """One byte holds two of them, in the file and in what is made of it."""
    body = "k0 = MatMul(k, w)" + PLAIN.replace("Reshape(k, heads)", "Reshape(k0, heads)")
    proto = gs.export_onnx(attention(body, inputs=f"{INPUTS}, float[8,8] w", opset=21))
    del proto.graph.input[-1]
    node = onnx.helper.make_node("DequantizeLinear", ["stored", "steps", "zeros"], ["w"], axis=1)
    proto.graph.node.insert(0, node)
    rng = np.random.default_rng(0)
    steps = rng.uniform(0.1, 0.2, 8).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(steps, "steps"))
    for name, shape in {"stored": (8, 8), "zeros": (8,)}.items():
        values = rng.integers(0, 16, shape).astype(ml_dtypes.uint4)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    made = rewritten(proto, "ort-cpu")
    assert "MultiHeadAttention" in {node.op_type for node in made.graph.node}
    held = {tensor.name: len(tensor.raw_data) for tensor in made.graph.initializer}
    assert (held["stored"], held["zeros"]) == (32, 4)
    feeds = {
        name: rng.standard_normal((2, 5, width), dtype=np.float32)
        for name, width in {"q": 8, "k": 8, "v": 12}.items()
    }
    before, after = (
        InferenceSession(each.SerializeToString()).run(None, feeds)[0] for each in (proto, made)
    )
    assert np.abs(before - after).max() < SAME
