"""Models whose types say fp16, bf16, int8: right where a blind conversion is wrong, and checked."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, numpy_helper

from corp_onnx import example
from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import calibrate
from corp_onnx.data.dataset import open_data
from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.errors import DataError, PlanError, QuantisedModel, VerificationError
from corp_onnx.graph.model import from_proto, load, save
from corp_onnx.graph.nbits import weight_of
from corp_onnx.pipeline import Settings, prune
from corp_onnx.precision import Request, in_precision
from corp_onnx.precision.halves import with_casts
from corp_onnx.precision.integers import _off_centre, step
from corp_onnx.precision.norms import fused_norms
from corp_onnx.precision.ranges import BINS, best_range, peaks
from corp_onnx.precision.records import FORMATS
from corp_onnx.precision.rounded import rounding
from corp_onnx.precision.slots import types_of
from corp_onnx.precision.stored import packed
from corp_onnx.session import open_session
from corp_onnx.solve import Recipe
from corp_onnx.verify.comparison import compare
from tests.assets import asset
from tests.builders import TINY, WIDTH, Net, feeds
from tests.inputs import activations
from tests.norm_builders import NOT_A_NORM, WRITTEN, normed, written_out

HALF, BRAIN = FORMATS["fp16"], FORMATS["bf16"]

ROUNDED = float(np.finfo(np.float16).eps) ** 2
"""Relative squared error of one rounding to float16, with room for its worst case."""


def batches(count=2, *, seed=0):
    return [{"x": activations(8, seed=seed + number)} for number in range(count)]


def typed(model, precision="fp16", *, seen=None, **request):
    seen = batches() if seen is None else seen
    return in_precision(model, Request(precision, **request), seen, batches(seed=9))


def error(made):
    return made.against["before"].relative_error


def blind(model, form=HALF):
    """What a conversion of everything computes; NaN and infinity count as that."""
    (batch,) = batches(1, seed=9)
    types = types_of(model, form, [batch])
    made = rounding(with_casts(model, types, {}, keep_io_types=True), form)
    (y,), (z,) = (open_session(m).run(batch).values() for m in (model, made))
    return float(np.square(y - z).sum() / np.square(y).sum())


def ops(model):
    return Counter(node.op for node in model.graph.nodes)


def kept(made):
    return {entry.node: entry.reason for entry in made.draft.kept}


def node_of(model, op, place=0):
    return [node for node in model.graph.nodes if node.op == op][place]


def weight_types(model):
    return Counter(tensor.data_type for tensor in model.proto().graph.initializer)


def last(net):
    return net.nodes[-1].output[0]


# Written-out norms


@pytest.mark.parametrize("how", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("opset", [17, 18])
def test_a_written_out_norm_becomes_one_operator_that_computes_the_same(how, opset):
    net = normed(opset, 1.0, **how)
    model = from_proto(net.build(last(net)))
    fused, count = fused_norms(model)
    assert (count, ops(fused)["LayerNormalization"], ops(fused)["ReduceMean"]) == (1, 1, 0)
    onnx.checker.check_model(fused.proto(), full_check=True)
    comparison = compare(open_session(model), open_session(fused), batches())
    assert comparison.relative_error < 1e-12


@pytest.mark.parametrize("how", NOT_A_NORM.values(), ids=NOT_A_NORM)
def test_what_only_looks_like_a_norm_stays(how):
    net = normed(18, 1.0, **how)
    model = from_proto(net.build(last(net)))
    fused, count = fused_norms(model)
    assert (count, ops(fused)) == (0, ops(model))


@pytest.mark.parametrize("how", ["pow", "mul", "reciprocal"])
@pytest.mark.parametrize("opset", [13, 18])
def test_a_norm_whose_squares_overflow_is_right(opset, how):
    """The squares are near 1e6; before opset 17 the steps of the norm stay in float32."""
    net = normed(opset, 400.0, **WRITTEN[how])
    model = from_proto(net.build(last(net)))
    made = typed(model)
    assert not blind(model) < 0.1
    assert error(made) < 10 * ROUNDED
    assert made.draft.fused == (1 if opset >= 17 else 0)
    assert ops(made.model)["Pow"] == (1 if (opset, how) == (13, "pow") else 0) or how != "pow"
    assert weight_types(made.model)[TensorProto.FLOAT16] >= 2


def test_an_epsilon_that_float16_rounds_to_nothing_does_not_divide_by_it():
    net = normed(18, 1e-7, epsilon=1e-12, axis=1)
    model = from_proto(net.build(last(net)))
    made = typed(model)
    assert not blind(model) < 0.1
    assert error(made) < 1e-4
    assert "sum" in kept(made)[node_of(model, "Sqrt").name]


# Values out of range


def stream(peak):
    """A residual stream of which one channel grows to ``peak``, and its norm."""
    net = Net(0, opset=18)
    push = np.zeros(WIDTH)
    push[3] = peak / 4
    x = net.x()
    for _ in range(4):
        x = net("Add", net("Add", x, net.linear(x, WIDTH, WIDTH, bias=False)), push)
    ones, zeros = np.ones(WIDTH), np.zeros(WIDTH)
    return from_proto(net.build(net.linear(net("LayerNormalization", x, ones, zeros), WIDTH, 3)))


def test_a_stream_beyond_the_range_of_float16_stays_in_float32():
    model = stream(1e5)
    made = typed(model, limit=1e-4)
    assert not blind(model) < 0.1
    reasons = kept(made)
    wide = [node.name for node in model.graph.nodes if node.op == "Add"][-2]
    assert "on calibration data, beyond 1/4 of the range of float16" in reasons[wide]
    assert len(reasons) < len(model.graph.nodes)


def test_a_stream_within_the_range_becomes_float16():
    made = typed(stream(100.0))
    assert {entry.op for entry in made.draft.kept} == {"LayerNormalization"}


def test_without_calibration_the_same_stream_is_refused_by_the_check():
    with pytest.raises(VerificationError, match=r"holds NaN or infinity.*bf16 has the range"):
        typed(stream(1e5), seen=[])
    made = typed(stream(1e5), "bf16", seen=[])
    assert made.draft.samples == 0
    assert any("no calibration inputs" in note for note in made.draft.notes)


def test_peaks_are_the_largest_finite_values():
    net = Net(0)
    shown = net("Where", net("Greater", net.x(), 0.0), "x", -np.inf)
    model = from_proto(net.build(net("Relu", shown)))
    (found,) = peaks(model, [shown], batches()).values()
    assert found == max(float(batch["x"].max()) for batch in batches())


def test_a_model_that_computes_no_numbers_is_refused():
    net = Net(0)
    model = from_proto(net.build(net("Sqrt", net.x())))
    with pytest.raises(DataError, match="NaN"):
        peaks(model, [model.graph.outputs[0].name], batches())


def test_a_mask_of_the_lowest_float32_hides_as_before():
    """Rounded to float16 it is minus infinity, and a row of it has no softmax."""
    net = Net(0)
    hidden = net("Mul", net("Cast", net("Greater", net.x(), -9.0), to=1), -3.4028234663852886e38)
    scores = net("Add", net("MatMul", "x", net.weight(WIDTH, WIDTH)), hidden)
    model = from_proto(net.build(net("Softmax", scores)))
    assert np.isnan(blind(model))
    for precision in ("fp16", "bf16"):
        assert error(typed(model, precision)) < 1e-6


# Places that must be exact


def test_positions_and_angles_are_computed_in_float32():
    """Positions beyond 2048 are not whole in float16, and their angles are noise."""
    net = Net(0)
    places = net("Unsqueeze", net("Range", 5000, net.const(5007), net.const(1)), [0, 2])
    angles = net("Mul", net("Cast", places, to=TensorProto.FLOAT), net.random(WIDTH, gain=1.0))
    y = net.linear(net("Add", net.x(), net("Sin", angles)), WIDTH, WIDTH)
    model = from_proto(net.build(y))
    made = typed(model)
    assert blind(model) > 1e-2
    assert error(made) < 10 * ROUNDED
    assert "whole numbers" in kept(made)[node_of(model, "Mul").name]


def test_pictures_of_whole_numbers_do_not_keep_a_model_in_float32():
    net = Net(0)
    pixels = net.input("x", "batch", 7, WIDTH, dtype=np.uint8)
    scaled = net("Div", net("Cast", pixels, to=TensorProto.FLOAT), 255.0)
    model = from_proto(net.build(net.linear(scaled, WIDTH, WIDTH)))
    rng = np.random.default_rng(0)
    seen = [{"x": rng.integers(0, 256, (8, 7, WIDTH)).astype(np.uint8)}]
    made = in_precision(model, Request("fp16"), seen, seen)
    assert {entry.op for entry in made.draft.kept} == {"Cast", "Div"}
    assert weight_types(made.model)[TensorProto.FLOAT16] == 2


def test_a_pooled_vector_is_multiplied_in_float16():
    net = Net(0)
    model = from_proto(
        net.build(net.linear(net("ReduceMean", net.x(), [1], keepdims=0), WIDTH, WIDTH))
    )
    assert {entry.op for entry in typed(model).draft.kept} == {"ReduceMean"}


def test_what_is_moved_is_as_large_as_it_was():
    """A large tensor that is reshaped and turned is nowhere rounded on its way."""
    net = Net(0)
    large = net("Mul", net.linear(net.x("b", 7, WIDTH), WIDTH, WIDTH), 1e6)
    turned = net("Transpose", net("Reshape", large, [0, 7, 2, -1]), perm=[0, 2, 1, 3])
    model = from_proto(net.build(net.linear(net("Mul", turned, 1e-6), WIDTH // 2, WIDTH)))
    made = typed(model)
    assert not blind(model) < 0.1
    assert error(made) < 10 * ROUNDED
    assert {entry.op for entry in made.draft.kept} == {"Mul", "Reshape", "Transpose"}


# Types


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", [n for n in TINY if "half" not in n and n != "baked_batch"])
def test_every_way_of_writing_a_block_survives(name, precision):
    proto = TINY[name](0).proto
    seen, judged = ([feeds(proto, 2, 5, seed)] for seed in (0, 1))
    made = in_precision(from_proto(proto), Request(precision), seen, judged)
    assert error(made) < (1e-4 if precision == "fp16" else 3e-3)
    assert not any("not known" in reason for reason in kept(made).values())


def test_inputs_and_outputs_keep_types_and_names_unless_asked(tiny):
    model = tiny("transformer")
    for keep, dtype in ((True, np.float32), (False, np.float16)):
        made = typed(model, keep_io_types=keep)
        ends = [*made.model.graph.inputs, *made.model.graph.outputs]
        before = [*model.graph.inputs, *model.graph.outputs]
        assert [tensor.dtype for tensor in ends] == [dtype] * len(ends)
        assert [tensor.name for tensor in ends] == [tensor.name for tensor in before]
        assert [tensor.shape for tensor in ends] == [tensor.shape for tensor in before]
        assert error(made) < 1e-4
        x = activations(2).astype(dtype)
        assert all(y.dtype == dtype for y in open_session(made.model).run({"x": x}).values())


def test_an_output_that_is_also_read_inside_keeps_its_type():
    net = Net(0)
    first = net.linear(net.x(), WIDTH, WIDTH)
    second = net("Softmax", net.linear(net("Relu", first), WIDTH, WIDTH))
    model = from_proto(net.build(first, second))
    for keep, dtype in ((True, np.float32), (False, np.float16)):
        made = typed(model, keep_io_types=keep)
        assert [tensor.dtype for tensor in made.model.graph.outputs] == [dtype, dtype]
        assert max(made.against["before"].relative_errors.values()) < 1e-5


def test_the_model_before_is_not_changed(tiny):
    model = tiny("transformer")
    before = model.proto().SerializeToString(deterministic=True)
    for request in (Request("fp16"), Request("int8"), Request(weight_only="int4", limit=1.0)):
        in_precision(model, request, batches(), batches(seed=9))
        assert model.proto().SerializeToString(deterministic=True) == before


def test_bfloat16_is_stored_as_such_and_computed_with_its_rounding(tiny):
    made = typed(tiny("transformer"), "bf16")
    assert weight_types(made.model)[TensorProto.BFLOAT16] > 0
    assert weight_types(made.model)[TensorProto.FLOAT16] == 0
    assert "rounded to bfloat16" in made.computed
    assert 1e-7 < error(made) < 1e-3


def test_operators_that_the_opset_lacks_in_bfloat16_stay():
    net = Net(0, opset=17)
    kernel = net.random(4, WIDTH, 1)
    y = net("Conv", net("Transpose", net.x("b", 7, WIDTH), perm=[0, 2, 1]), kernel)
    model = from_proto(net.build(net("Relu", y)))
    assert (
        kept(typed(model, "bf16"))[node_of(model, "Conv").name] == "opset 17 has no bfloat16 Conv"
    )
    assert kept(typed(model)) == {}


def test_bodies_go_on_reading_what_they_read():
    text = """<ir_version: 9, opset_import: ["" : 18]>
    g (float[b, t, 10] x) => (float[b, t, 10] y)
    <float[10, 10] w, float zero = {0.0}, int64[3] axes = {0, 1, 2}> {
        a = MatMul(x, w)
        c = ReduceMax<keepdims = 0>(a, axes)
        d = Greater(c, zero)
        z = If(d) <
            then_branch = t () => (float[b, t, 10] p) { p = Add(a, a) },
            else_branch = e () => (float[b, t, 10] q) { q = Sub(a, w) }
        >
        y = MatMul(z, w)
    }"""
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.float32(0), "zero"),
            numpy_helper.from_array(np.arange(3), "axes"),
        ]
    )
    made = typed(from_proto(proto))
    assert error(made) < 10 * ROUNDED
    assert set(kept(made).values()) == {"the types around it are not known"}
    types = weight_types(made.model)
    assert types[TensorProto.FLOAT16] >= 1


def test_constants_of_both_kinds_of_readers_exist_in_both_types():
    net = Net(0)
    shared = net.const(1 + 0.1 * net.random(WIDTH))
    y = net("LayerNormalization", net("Mul", net.x(), shared), shared)
    model = from_proto(net.build(net.linear(y, WIDTH, WIDTH)))
    made = typed(model)
    types = {t.name: t.data_type for t in made.model.proto().graph.initializer}
    assert types[shared] == TensorProto.FLOAT
    assert types[f"{shared}_float16"] == TensorProto.FLOAT16


# The check itself


def test_rounding_shows_what_the_runtime_hides():
    """On a CPU, ONNX Runtime computes float16 in float32, where squares do not overflow."""
    net = Net(0, dtype=np.float16)
    model = from_proto(net.build(net("Sqrt", net("Mul", net.x(), "x"))))
    x = np.full((1, 1, WIDTH), 300, np.float16)
    (hidden,) = open_session(model).run({"x": x}).values()
    (shown,) = open_session(rounding(model, HALF)).run({"x": x.astype(np.float32)}).values()
    assert np.isfinite(hidden).all()
    assert np.isinf(shown).all()


@pytest.mark.parametrize("form", [HALF, BRAIN], ids=["fp16", "bf16"])
def test_rounding_is_that_of_numpy(form):
    net = Net(0)
    weight = net.random(WIDTH)
    y = net("Mul", net("Add", net.x(), weight), weight)
    model = from_proto(net.build(y))
    (batch,) = batches(1)
    types = types_of(model, form, [batch])
    made = rounding(with_casts(model, types, {}, keep_io_types=True), form)
    (found,) = open_session(made).run(batch).values()
    w, x = (a.astype(np.float32).astype(form.dtype) for a in (weight, batch["x"]))
    expected = ((x + w) * w).astype(np.float32)
    assert np.array_equal(found, expected)


def test_a_result_beyond_the_limit_is_refused_with_what_was_measured(tiny):
    with pytest.raises(VerificationError, match=r"'.*' in fp16 has a relative error of .*e-0.*16"):
        typed(tiny("transformer"), limit=1e-9)


def test_what_is_quantised_or_halved_already_is_refused(tiny):
    model = tiny("transformer")
    for request in (Request("int8"), Request(weight_only="int8")):
        made = in_precision(model, request, batches(), batches())
        with pytest.raises(QuantisedModel, match="quantised already"):
            typed(made.model)
    half = typed(model).model
    with pytest.raises(PlanError, match=r"float16, which is what is asked for"):
        typed(half)
    with pytest.raises(PlanError, match=r"take the float32 model for int8"):
        typed(half, "int8")


def test_requests_that_contradict_themselves_are_refused():
    with pytest.raises(PlanError, match="goes with --precision fp16 or bf16"):
        Request("int8", keep_io_types=False)
    with pytest.raises(PlanError, match="one of the two"):
        Request("int8", "int8")
    with pytest.raises(PlanError, match="fp8"):
        Request("fp8")


def test_int8_needs_data_and_a_check_needs_more(tiny):
    with pytest.raises(PlanError, match=r"--data.*--weight-only int8"):
        typed(tiny("transformer"), "int8", seen=[])
    with pytest.raises(DataError, match="held-out"):
        in_precision(tiny("transformer"), Request("fp16"), batches(), [])


# Whole numbers


def quantised_inputs(model):
    """For every product, whether its operands come out of DequantizeLinear."""
    return {
        node.name: tuple(
            bool(tensor.inputs) and tensor.inputs[0].op == "DequantizeLinear"
            for tensor in node.inputs[:2]
        )
        for node in model.graph.nodes
        if node.op in {"MatMul", "Gemm"}
    }


def test_int8_is_for_linear_layers_only(tiny):
    model = tiny("transformer")
    constant = {
        node.name: isinstance(node.inputs[1], gs.Constant)
        for node in model.graph.nodes
        if node.op in {"MatMul", "Gemm"}
    }
    assert len(set(constant.values())) == 2
    made = typed(model, "int8")
    expected = {name: (linear, linear) for name, linear in constant.items()}
    assert quantised_inputs(made.model) == expected
    assert made.draft.quantised == sum(constant.values())
    assert set(kept(made)) == {name for name, linear in constant.items() if not linear}
    assert error(made) < 1e-2


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "turned Gemm"])
def test_int8_scales_every_output_channel_by_itself(op):
    """One channel is a thousand times smaller than another, and as exact."""
    net = Net(0)
    gains = np.logspace(-3, 0, 6)
    weight = net.random(WIDTH, 6) * gains
    if op == "MatMul":
        y = net("MatMul", net.x(), weight)
    else:
        rows = net("Reshape", net.x(), [-1, WIDTH])
        turned = "turned" in op
        y = net("Gemm", rows, weight.T if turned else weight, np.zeros(6), transB=int(turned))
    model = from_proto(net.build(y))
    made = typed(model, "int8")
    (batch,) = batches(1, seed=9)
    before, after = (
        next(iter(open_session(m).run(batch).values())).reshape(-1, 6) for m in (model, made.model)
    )
    each = np.square(before - after).sum(axis=0) / np.square(before).sum(axis=0)
    assert each.max() < 1e-3

    whole = weight / np.abs(weight).max() * 127  # one scale for all of them
    lost = np.square(np.rint(whole) - whole).sum(axis=0) / np.square(whole).sum(axis=0)
    assert lost.max() > 0.05

    scales = {
        np.size(node.inputs[1].values): node.attrs.get("axis")
        for node in made.model.graph.nodes
        if node.op == "DequantizeLinear"
    }
    assert scales == {1: None, 6: 0 if "turned" in op else 1}


def test_layers_with_one_input_share_one_rounding_of_it():
    net = Net(0)
    pair = [net.linear(net.x() if number == 0 else "x", WIDTH, 4) for number in range(2)]
    model = from_proto(net.build(net("Add", *pair)))
    assert ops(typed(model, "int8").model)["QuantizeLinear"] == 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_in_the_middle_if_the_target_wants_it(symmetric):
    request = Request("int8", symmetric=symmetric)
    zeros = {}
    for op in ("Abs", "LeakyRelu"):
        net = Net(0)
        model = from_proto(net.build(net.linear(net(op, net.x()), WIDTH, 6)))
        made = in_precision(model, request, batches(), batches(1, seed=9)).model
        (node,) = (node for node in made.graph.nodes if node.op == "QuantizeLinear")
        zeros[op] = node.inputs[2].values
        assert zeros[op].dtype == (np.int8 if symmetric else np.uint8)
    assert zeros["Abs"] == 0  # nothing is below it
    assert (zeros["LeakyRelu"] == 0) == symmetric


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_leaves_rare_outliers_out(symmetric):
    rng = np.random.default_rng(0)
    values = rng.gamma(2.0, 1.0, 2_000_000) - 0.2
    values[0] = 80.0

    def lost(low, high):
        step = (high - low) / (254 if symmetric else 255)
        zero = np.rint(-low / step)
        rounded = np.clip(np.rint(values / step) + zero, 0, 255) - zero
        return np.square(rounded * step - values).sum()

    counts, _ = np.histogram(values, BINS, (-80.0, 80.0))
    low, high = best_range(counts, 80.0, symmetric=symmetric)
    assert high < 80.0
    assert (low == -high) == symmetric
    assert symmetric or -0.3 < low < 0
    assert lost(low, high) < 0.5 * lost(-80.0 if symmetric else -0.2, 80.0)
    highs = np.linspace(2, 80, 100)
    assert lost(low, high) < 1.2 * min(lost(-h if symmetric else -0.2, h) for h in highs)


def test_a_range_without_its_middle_is_more_exact():
    values = np.random.default_rng(0).gamma(2.0, 1.0, 10_000)
    counts, _ = np.histogram(values, BINS, (-values.max(), values.max()))
    errors = {}
    for symmetric in (True, False):
        low, high = best_range(counts, values.max(), symmetric=symmetric)
        step = (high - low) / (254 if symmetric else 255)
        errors[symmetric] = np.square(np.rint(values.clip(low, high) / step) * step - values).sum()
    assert errors[False] < 0.6 * errors[True]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width_in", [32, 45, 100])
def test_stored_weights_are_within_half_a_step(bits, width_in):
    weight = np.random.default_rng(0).standard_normal((width_in, 7)).astype(np.float32)
    stored, scale, zero = packed(weight, bits)
    attrs = {"K": width_in, "N": 7, "bits": bits, "block_size": 32}
    constants = [gs.Constant(str(i), a) for i, a in enumerate((stored, scale.reshape(-1), zero))]
    inputs = [gs.Variable("x"), *constants[:2], gs.Constant("z", zero.reshape(-1))]
    node = gs.Node("MatMulNBits", "n", attrs, inputs, [gs.Variable("y")])
    steps = scale[:, np.arange(width_in) // 32].T
    away = np.abs(weight_of(node) - weight) / steps
    assert away.max() <= 1.0 + 1e-5  # half a step of the weight, and of the zero point
    assert away.mean() < 0.3


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_stored_weights_are_multiplied_as_they_are_read(kind):
    net = Net(0)
    rows = net("Reshape", net.x(), [-1, WIDTH])
    weight, bias = net.random(6, WIDTH), net.random(6)
    y = net("Gemm", rows, weight, bias, transB=1, alpha=0.5, beta=2.0)
    model = from_proto(net.build(net("MatMul", y, net.weight(6, 40))))
    made = typed(model, "fp32", weight_only=kind, limit=1.0)
    first, second = [node for node in made.model.graph.nodes if node.op == "MatMulNBits"]
    (batch,) = batches(1)
    (found,) = open_session(made.model).run(batch).values()
    x = batch["x"].reshape(-1, WIDTH)
    expected = (x @ weight_of(first) + 2.0 * bias) @ weight_of(second)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert error(made) < (1e-4 if kind == "int8" else 3e-2)
    assert "ONNX Runtime" in made.draft.notes[0]


def test_a_model_without_layers_has_nothing_to_quantise():
    net = Net(0)
    model = from_proto(net.build(net("Relu", net.x())))
    for request in (Request("int8"), Request(weight_only="int4")):
        with pytest.raises(PlanError, match="no linear layer"):
            in_precision(model, request, batches(), batches())


# The bundled model


@pytest.fixture(scope="module")
def fashion():
    """The model, pictures to calibrate on and to judge by, and their classes."""
    model = load(example.MODEL)
    recipe = Preprocessing.beside(example.MODEL)
    inputs = open_session(model).inputs
    seen, judged = (
        open_data(str(path), inputs, preprocessing=recipe)
        for path in (example.CALIBRATION, example.TEST)
    )
    with np.load(example.TEST) as stored:
        labels = stored["label"][:512]
    return (
        model,
        tuple(seen.take(range(32)).batches(8)),
        tuple(judged.take(range(512)).batches(64)),
        labels.tolist(),
    )


LEAST_LOST = {
    "fp16": (Request("fp16"), 0.002),
    "bf16": (Request("bf16"), 0.004),
    "int8": (Request("int8"), 0.006),
    "weight-only int8": (Request(weight_only="int8"), 0.004),
    "weight-only int4": (Request(weight_only="int4"), 0.02),
}


@pytest.mark.parametrize("name", LEAST_LOST)
def test_the_bundled_model_loses_next_to_nothing(fashion, name):
    model, seen, judged, labels = fashion
    request, lost = LEAST_LOST[name]
    made = in_precision(model, request, seen, judged[:1])
    top1 = compare(open_session(model), open_session(made.model), judged, labels=labels).top1
    assert top1["dense"] - top1["pruned"] <= lost
    assert made.size_bytes[1] < 0.6 * made.size_bytes[0]


def test_pruned_and_quantised_sizes_multiply_and_errors_add(fashion, tmp_path):
    model, seen, judged, _ = fashion

    def pruned(request):
        settings = Settings(recipe=Recipe("corp"), request=request)
        source = open_data(
            str(example.CALIBRATION),
            open_session(model).inputs,
            preprocessing=Preprocessing.beside(example.MODEL),
            samples=120,
        )
        return prune(example.MODEL, tmp_path / "small.onnx", lambda _: source, settings=settings)

    both = pruned(Request("int8"))
    assert both.passed
    alone = in_precision(model, Request("int8"), seen, judged[:1])
    cut_share = both.typed.size_bytes[0] / alone.size_bytes[0]
    int8_share = alone.size_bytes[1] / alone.size_bytes[0]
    share = both.typed.size_bytes[1] / alone.size_bytes[0]
    assert share == pytest.approx(cut_share * int8_share, rel=0.25)
    cut_error = both.verification.comparison.relative_error
    int8_error = error(both.typed)
    together = both.typed.against["dense"].relative_error
    assert together < (np.sqrt(cut_error) + np.sqrt(int8_error)) ** 2
    assert together > 0.5 * cut_error


def test_the_statistics_of_an_earlier_calibration_hold_enough(files, tmp_path, command):
    model = load(files.model)
    data = open_data(str(files.data), open_session(model).inputs)
    calibrate(model, find_blocks(model), data).save(tmp_path / "statistics.npz")
    ended = command(
        *("prune", files.model, "-o", tmp_path / "small.onnx", "--align", 1, "--json"),
        *("--stats", tmp_path / "statistics.npz", "--precision", "int8"),
    )
    section = json.loads(ended.stdout)["precision"]
    assert (ended.status, section["calibrated_on"] > 0) == (0, True)
    with pytest.raises(QuantisedModel):
        load(tmp_path / "small.onnx")


# The command


PRUNED = ("--align", 1, "--method", "corp")


def test_the_command_writes_and_tells_the_precision(files, tmp_path, command):
    output = tmp_path / "small.onnx"
    arguments = ("prune", files.model, "-o", output, "--data", files.data, *PRUNED)
    ended = command(*arguments, "--precision", "fp16", "--json")
    assert ended.status == 0, ended.stderr
    document = json.loads(ended.stdout)
    section = document["precision"]
    assert (section["asked"], section["weight_only"]) == ("fp16", None)
    assert section["error"] <= section["limit"]
    assert section["error_against_dense"] == pytest.approx(
        document["held_out"]["relative_error"], rel=0.1
    )
    assert section["bytes"]["after"] < section["bytes"]["before"]
    assert {"node", "op", "reason"} == set(section["kept"][0])
    assert "precision" in document["seconds"]
    stored = onnx.load(output)
    types = Counter(tensor.data_type for tensor in stored.graph.initializer)
    assert types[TensorProto.FLOAT16] > types[TensorProto.FLOAT] > 0
    onnx.checker.check_model(stored, full_check=True)

    told = command(*arguments, "--precision", "fp16")
    assert "fp16: " in told.stdout
    assert "LayerNormalization: a normalisation" in told.stdout


def test_the_users_limits_hold_for_what_is_written(files, tmp_path, command):
    output = tmp_path / "small.onnx"
    arguments = ("prune", files.model, "-o", output, "--data", files.data, *PRUNED, "--json")
    plain = json.loads(command(*arguments).stdout)
    assert plain["precision"] is None
    dense = plain["held_out"]["relative_error"]
    ended = command(*arguments, "--weight-only", "int4", "--max-error", dense * 1.0001)
    document = json.loads(ended.stdout)
    assert (ended.status, document["passed"]) == (1, False)
    (check,) = document["precision"]["checks"]
    assert (check["name"], check["passed"]) == ("max-error", False)
    assert all(check["passed"] for check in document["checks"])


def test_the_command_refuses_before_it_works(files, tmp_path, command):
    arguments = ("-o", tmp_path / "out.onnx", "--data", files.data)
    ended = command(
        *("prune", files.model, *arguments, "--precision", "int8", "--weight-only", "int8")
    )
    assert (ended.status, "one of the two" in ended.message) == (2, True)
    half = tmp_path / "half.onnx"
    save(typed(load(files.model)).model, half)
    ended = command("prune", half, *arguments, "--precision", "fp16")
    assert (ended.status, "leave --precision out" in ended.message) == (2, True)
    assert not (tmp_path / "out.onnx").exists()


# Real models


@pytest.mark.slow
@pytest.mark.parametrize("request_", [Request("fp16"), Request("int8")], ids=["fp16", "int8"])
def test_a_real_text_model_keeps_its_vectors(request_):
    model = load(asset("minilm_l3.onnx"))
    rng = np.random.default_rng(0)

    def batch():
        mask = np.ones((8, 24), np.int64)
        mask[::2, 18:] = 0
        return {"input_ids": rng.integers(1000, 20000, (8, 24)), "attention_mask": mask}

    made = in_precision(model, request_, [batch(), batch()], [batch()])
    assert error(made) < (1e-5 if request_.precision == "fp16" else 2e-2)


# Ends of the range, and what is not for the type


def test_a_step_is_never_too_small_for_float32():
    """The twin: a scale that float32 rounds to 0 gives NaN for every zero."""
    assert step(np.array([0.0, 1e-44, 1.0])).astype(np.float32).min() > 0
    assert np.float32(_off_centre((0.0, 1e-44))[0]) > 0
    _, scales, _ = packed(np.full((32, 1), 1e-44, np.float32), 8)
    assert scales.min() >= np.finfo(np.float32).tiny


def test_a_norm_over_an_axis_of_any_size_stays():
    """The twin: one operator with a scale of the length that was seen fails at any other."""
    net = Net(0)
    turned = net("Transpose", net.x(), perm=[0, 2, 1])
    y = written_out(net, turned, gamma=False, beta=False)
    model = from_proto(net.build(net.linear(net("Transpose", y, perm=[0, 2, 1]), WIDTH, WIDTH)))
    made = typed(model)
    assert made.draft.fused == 0
    wider = [{"x": np.random.default_rng(0).standard_normal((2, 33, WIDTH), dtype=np.float32)}]
    wanted, found = (open_session(each) for each in (model, rounding(made.model, HALF)))
    assert compare(wanted, found, wider).relative_error < 1e-4


def test_a_scale_that_adds_an_axis_is_no_part_of_a_norm():
    net = Net(0)
    y = written_out(net, net.linear(net.x(), WIDTH, WIDTH), gamma=False, beta=False)
    net.linear(net("Mul", y, np.ones((1, 1, 1, WIDTH))), WIDTH, WIDTH)
    model = from_proto(net.build(last(net)))
    assert fused_norms(model)[1] == 0


def test_a_sum_is_a_sum_still_behind_a_reshape():
    """Rows of zeros over their norm: 1e-12 is what keeps that from NaN, and float16 has it not."""
    net = Net(0, opset=18)
    x = net.linear(net.x(), WIDTH, WIDTH, bias=False)
    length = net("ReduceL2", x, [-1], keepdims=1)
    spread = net("Expand", net("Max", length, 1e-12), net("Shape", x))
    y = net("Div", x, spread)
    model = from_proto(net.build(net.linear(y, WIDTH, WIDTH)))
    seen = [{"x": np.concatenate([activations(8)[:4], np.zeros_like(activations(8)[:4])])}]
    made = in_precision(model, Request("fp16"), seen, seen)
    assert error(made) < 1e-4
    assert "sum" in kept(made)[node_of(model, "Div").name]


def test_positions_cast_to_the_type_of_another_tensor_stay_exact():
    net = Net(0, opset=18)
    x = net.linear(net.x(), WIDTH, WIDTH)
    count = net("Squeeze", net("Slice", net("Shape", x), [1], [2]), [0])
    places = net("CastLike", net("Range", np.int64(0), count, np.int64(1)), x)
    turned = net("Mul", net("Unsqueeze", places, [0, 2]), 1.0)
    model = from_proto(net.build(net.linear(net("Add", x, turned), WIDTH, WIDTH)))
    made = typed(model)
    assert "whole numbers" in kept(made)[node_of(model, "CastLike").name]


def test_before_opset_13_there_is_no_bfloat16():
    net = Net(0, opset=12)
    model = from_proto(net.build(net.linear(net.x(), WIDTH, WIDTH)))
    with pytest.raises(PlanError, match="13 is the first that has it"):
        typed(model, "bf16")
    assert typed(model, "fp16")


def test_nothing_asked_for_is_nothing_done(tiny):
    with pytest.raises(PlanError, match="in fp32 as it is"):
        typed(tiny("mlp"), "fp32")
