"""Plain attention becomes one operator of ONNX Runtime; all else stays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from onnxruntime import InferenceSession

from corp_onnx import example
from corp_onnx.blocks import find_blocks
from corp_onnx.calibrate import gather
from corp_onnx.deploy.targets import open_target
from corp_onnx.deploy.whole import DOMAIN, write_whole
from corp_onnx.graph import load, write
from corp_onnx.plan import uniform
from corp_onnx.session import open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery import operate

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


def attention(body=PLAIN, outputs="float[B,N,12] y", inputs=INPUTS, opset=17, half=0.5):
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
    g ({inputs}) => ({outputs})
    <int64[4] heads = {{0, 0, 2, 4}}, int64[4] wide = {{0, 0, 2, 6}}, int64[3] together =
     {{0, 0, 12}}, int64[4] single = {{0, 0, 1, 4}}, float half = {{{half}}},
     float[1] two = {{2.0}}>
    {{ {body} }}"""
    return gs.import_onnx(onnx.parser.parse_model(text))


def operators(graph):
    return Counter(node.op for node in graph.nodes)


def computed(graph):
    proto = gs.export_onnx(graph, do_type_check=False)
    if all(opset.domain != DOMAIN for opset in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    rng = np.random.default_rng(0)
    shapes = {"q": (3, 5, 8), "k": (3, 7, 8), "v": (3, 7, 12)}
    feeds = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return InferenceSession(proto.SerializeToString()).run(None, feeds)


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
        ("c1 = Transpose<perm = [0, 2, 1, 3]>(c)", "c1 = Transpose<perm = [0, 3, 1, 2]>(c)"),
    ],
    ids=[
        "a function of the logits",
        "another axis",
        "another turn",
        "a scaled value",
        "no joining",
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
        "float[B,N,2,4] q, float[B,M,8] k, float[B,M,12] v",
        "float16[B,N,8] q, float16[B,M,8] k, float16[B,M,12] v",
    ],
    ids=["queries for all samples", "of four axes", "of a type without a kernel"],
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
