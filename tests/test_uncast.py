"""Casts go where a kernel computes in float32 by itself, and nowhere else."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from corp_onnx import example
from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.commands import Source
from corp_onnx.deploy.ort import WIDE_INSIDE, rewritten
from corp_onnx.deploy.uncast import without_casts
from corp_onnx.graph.model import load, write
from corp_onnx.plan import uniform
from corp_onnx.precision import Request, in_precision
from corp_onnx.session import open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate

OPS = WIDE_INSIDE["ort-cuda"]
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
DOUBLE, BRAIN = onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16
NORMS, ATTENTIONS = 13, 6
"""Of the bundled model."""


@pytest.fixture(scope="module")
def pictures():
    data = Source(str(example.TEST), 16).open(example.MODEL, open_session(example.MODEL))
    return list(data.batches(16))


@pytest.fixture(scope="module")
def pruned(pictures):
    """Its attention is written plainly."""
    model = load(example.MODEL)
    catalog = find_blocks(model)
    plan = uniform(catalog, {"mlp": 0.5, "qk": 0.5})
    bare = solve(model, catalog, plan, gather(model, catalog, pictures), Recipe("none"))
    return operate(model, catalog, bare).model


def typed(model, precision, pictures):
    return in_precision(model, Request(precision), pictures, pictures).model.proto()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_typed_model_has_its_attention_whole(precision, pruned, pictures):
    before = typed(pruned, precision, pictures)
    found = {
        target: Counter(node.op_type for node in rewritten(before, target).graph.node)
        for target in ("ort-cuda", "ort-cpu")
    }
    assert found["ort-cuda"]["MultiHeadAttention"] == ATTENTIONS
    assert found["ort-cuda"]["Softmax"] == 0
    assert found["ort-cuda"]["LayerNormalization"] == NORMS
    at_the_ends = 4
    assert found["ort-cuda"]["Cast"] <= at_the_ends
    assert found["ort-cpu"]["MultiHeadAttention"] == 0
    assert found["ort-cpu"]["Cast"] >= 2 * ATTENTIONS


def test_what_a_model_computes_stays(pruned, pictures, tmp_path):
    before = typed(pruned, "fp16", pictures)
    graph = gs.import_onnx(before)
    assert without_casts(graph, OPS) == NORMS + ATTENTIONS
    made = []
    for proto in (before, gs.export_onnx(graph, do_type_check=False)):
        write(proto, tmp_path / "model.onnx")
        made.append(open_session(tmp_path / "model.onnx").run(pictures[0])["logits"])
    assert np.abs(made[1] - made[0]).max() < 4e-3 * np.abs(made[0]).max()


def norm(
    *, source="float16", wide=FLOAT, back=HALF, scale=(1.0, 1.0), made="normal", also="", shown=""
):
    """From ``x`` in a narrow type through a norm in float32, and back."""
    type_ = {HALF: "float16", BRAIN: "bfloat16", FLOAT: "float"}[back]
    weights = {FLOAT: "float", DOUBLE: "double"}[wide]
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g ({source}[N,2] x) => ({type_}[N,2] y {shown})
    <{weights}[2] scale = {{{scale[0]}, {scale[1]}}}, {weights}[2] bias = {{0.0, 0.5}}>
    {{
        wide = Cast<to = {wide}>(x)
        {made} = LayerNormalization(wide, scale, bias)
        narrow = Cast<to = {back}>(normal)
        y = Neg(narrow)
        {also}
    }}"""
    return gs.import_onnx(onnx.parser.parse_model(text))


def test_a_norm_between_casts_becomes_narrow():
    graph = norm()
    assert without_casts(graph, OPS) == 1
    assert [node.op for node in graph.nodes] == ["LayerNormalization", "Neg"]
    assert [tensor.dtype for tensor in graph.nodes[0].inputs[1:]] == [np.float16, np.float16]
    onnx.checker.check_model(gs.export_onnx(graph), full_check=True)


def test_a_small_number_among_others_may_vanish():
    """As it does in every weight; real norms hold such."""
    assert without_casts(norm(scale=(1.0, 1e-9)), OPS) == 1


def test_bfloat16_likewise():
    graph = norm(source="bfloat16", back=BRAIN)
    assert without_casts(graph, OPS) == 1
    scale, bias = graph.nodes[0].inputs[1:]
    assert scale.dtype == bias.dtype == onnx.helper.tensor_dtype_to_np_dtype(BRAIN)
    assert bias.values.astype(float).tolist() == [0.0, 0.5]


def test_norms_that_share_a_scale_still_do():
    again = f"""wide2 = Cast<to = {FLOAT}>(y)
        normal2 = LayerNormalization(wide2, scale)
        z = Cast<to = {HALF}>(normal2)"""
    graph = norm(also=again, shown=", float16[N,2] z")
    assert without_casts(graph, OPS) == 2
    first, second = (node for node in graph.nodes if node.op == "LayerNormalization")
    assert first.inputs[1] is second.inputs[1]
    assert len(second.inputs) == 2
    onnx.checker.check_model(gs.export_onnx(graph), full_check=True)


def test_an_end_of_the_graph_keeps_its_name():
    graph = norm(shown=", float16[N,2] narrow")
    assert without_casts(graph, OPS) == 1
    assert [tensor.name for tensor in graph.outputs] == ["y", "narrow"]
    onnx.checker.check_model(gs.export_onnx(graph), full_check=True)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"source": "double"}, id="never-narrow"),
        pytest.param({"source": "bfloat16"}, id="another-type-before"),
        pytest.param({"back": FLOAT}, id="stays-wide"),
        pytest.param({"wide": DOUBLE}, id="wider-still"),
        pytest.param({"scale": (1.0, 1e6)}, id="beyond-the-type"),
        pytest.param({"scale": (1e-9, 1e-9)}, id="below-the-type"),
        pytest.param({"shown": ", float[N,2] normal"}, id="seen-wide"),
        pytest.param({"also": "z = Abs(normal)", "shown": ", float[N,2] z"}, id="read-wide"),
        pytest.param(
            {"also": f"z = Cast<to = {BRAIN}>(normal)", "shown": ", bfloat16[N,2] z"},
            id="read-in-two-types",
        ),
        pytest.param(
            {"made": "normal, mean", "also": "z = Abs(mean)", "shown": ", float[N,1] z"},
            id="mean-is-read",
        ),
        pytest.param({"made": "normal, mean", "shown": ", float[N,1] mean"}, id="mean-is-seen"),
    ],
)
def test_anything_else_stays(options):
    graph = norm(**options)
    before = [node.op for node in graph.nodes]
    assert without_casts(graph, OPS) == 0
    assert [node.op for node in graph.nodes] == before


def test_other_kernels_keep_their_casts():
    assert without_casts(norm(), ["Softmax"]) == 0
