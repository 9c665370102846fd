"""Every target that can run here keeps the protocol; each says what it cannot do."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import onnx
import pytest

from corp_onnx import example
from corp_onnx.commands import Bench, Source
from corp_onnx.commands.typist import Typist
from corp_onnx.deploy import ort
from corp_onnx.deploy.records import (
    PRECISIONS,
    Build,
    ShapeRange,
    declared_inputs,
    without_weights,
)
from corp_onnx.deploy.rtx import TensorRTRTX
from corp_onnx.deploy.sessions import SessionEngine
from corp_onnx.deploy.shape_ranges import exactly
from corp_onnx.deploy.targets import (
    BUILDING,
    FLAGS,
    TAKEN,
    TARGETS,
    TargetOptions,
    open_target,
    require_taken,
)
from corp_onnx.errors import (
    BackendUnavailable,
    CorpError,
    DataError,
    GraphError,
    OutputError,
    PlanError,
)
from corp_onnx.graph.model import write
from corp_onnx.latency.stopwatch import Stopwatch
from corp_onnx.precision import in_precision
from corp_onnx.session import Runtime, open_session
from tests.builders import WIDTH, Net

HERE = ("ort-cpu", "openvino")
"""Targets that need no device."""


@pytest.fixture(scope="module")
def images():
    with np.load(example.TEST) as file:
        return {"image": file["image"][:5].astype(np.float32)}


@pytest.fixture(scope="module", params=HERE)
def built(request, tmp_path_factory):
    target = open_target(request.param)
    return target, target.build(example.MODEL, tmp_path_factory.mktemp("engine"), "fp32")


def test_an_engine_computes_what_the_model_computes(built, images):
    target, build = built
    engine = target.load(build)
    wanted = open_session(example.MODEL).run(images)
    found = engine.run(images)
    engine.close()
    assert found.keys() == wanted.keys() == set(engine.outputs)
    for name, array in wanted.items():
        assert np.abs(found[name] - array).max() < 1e-4 * np.abs(array).max()


def test_a_session_tells_the_time_between_its_copies(images):
    session = open_session(example.MODEL)
    engine = SessionEngine(session, device="cpu")
    assert engine.device_ms is None
    found, wanted = engine.run(images), session.run(images)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.array_equal(found[name], array)
    assert engine.device_ms > 0.0
    with pytest.raises(DataError, match="also reads image"):
        engine.run({})
    with pytest.raises(DataError, match=r"inputs of shape image \[5, 28\]"):
        engine.run({"image": images["image"][:, 0, 0]})
    assert SessionEngine(session).device_ms is None


@pytest.mark.gpu
def test_on_cuda_the_copies_are_no_part_of_the_time(images, tmp_path):
    target = open_target("ort-cuda")
    try:
        build = target.build(example.MODEL, tmp_path, "fp32")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    engine = target.load(build)
    wanted = open_session(example.MODEL).run(images)["logits"]
    assert np.abs(engine.run(images)["logits"] - wanted).max() < 1e-2 * np.abs(wanted).max()
    assert engine.device_ms is not None


def test_an_engine_knows_its_inputs(built):
    target, build = built
    (spec,) = target.load(build).inputs
    assert (spec.name, spec.dtype, spec.shape) == ("image", np.float32, (None, 1, 28, 28))


def test_an_engine_says_which_input_is_missing(built):
    target, build = built
    with pytest.raises(DataError, match="also reads image"):
        target.load(build).run({"picture": np.zeros((1, 1, 28, 28), np.float32)})


def test_an_engine_says_which_shape_does_not_fit(built):
    target, build = built
    with pytest.raises(DataError, match=r"image \[1, 1, 27, 28\]"):
        target.load(build).run({"image": np.zeros((1, 1, 27, 28), np.float32)})


def test_an_engine_tells_where_its_time_goes(built, images):
    target, build = built
    times = target.load(build).operator_times(images, runs=3)
    assert {"Gelu", "BiasGelu"} & times.keys()
    assert all(spent >= 0 for spent in times.values())
    assert sum(times.values()) > 0


def test_the_record_of_a_build_can_be_read_again(built):
    _, build = built
    again = Build.read(build.path.parent)
    assert again == build
    assert again.seconds > 0
    assert again.size_bytes > 800_000
    assert set(again.versions) & {"onnxruntime", "openvino"}


def test_an_engine_that_is_damaged_is_an_error(built, tmp_path):
    target, build = built
    path = tmp_path / build.path.name
    path.write_bytes(b"no engine")
    with pytest.raises(GraphError, match="cannot load"):
        target.load(replace(build, path=path))


def test_a_model_that_the_target_cannot_read_is_an_error(built, tmp_path):
    target, _ = built
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(GraphError, match="cannot"):
        target.build(path, tmp_path, "fp32")


def test_fp32_is_computed_in_fp32_where_bf16_would_be_faster(images, tmp_path):
    """Left alone, OpenVINO takes bf16 on processors that have it: 8 bits of mantissa."""
    target = open_target("openvino")
    build = target.build(example.MODEL, tmp_path, "fp32")
    wanted = open_session(example.MODEL).run(images)["logits"]
    error = {}
    for precision in ("fp32", "bf16"):
        found = target.load(replace(build, precision=precision)).run(images)["logits"]
        error[precision] = float(np.square(found - wanted).sum() / np.square(wanted).sum())
    assert error["fp32"] < 1e-10
    if _has_bf16(target):
        assert 1e-7 < error["bf16"] < 1e-2


def _has_bf16(target):
    try:
        target.require("bf16")
    except PlanError:
        return False
    return True


@pytest.mark.parametrize(
    ("precision", "enabled"),
    [
        ("fp32", set()),
        ("fp16", {"trt_fp16_enable"}),
        ("bf16", {"trt_bf16_enable"}),
        ("int8", {"trt_int8_enable"}),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_what_the_tensorrt_provider_is_told(monkeypatch, tmp_path, precision, enabled, given):
    """Types, and a cache that is the folder of the build where no other is given."""
    cache = tmp_path / "cache" if given else tmp_path
    told = []
    monkeypatch.setattr(ort, "require_providers", lambda _: None)
    monkeypatch.setattr(ort, "open_session", lambda _, runtime: told.append(runtime))
    target = open_target("ort-tensorrt", TargetOptions(cache=cache if given else None))
    (tmp_path / "TensorrtExecutionProvider_graph_sm90.engine").write_bytes(bytes(1000))
    build = target.build(example.MODEL, tmp_path, precision)
    target.load(build)
    assert len(told) == 2
    for runtime in told:
        options = runtime.provider_options["TensorrtExecutionProvider"]
        assert {name for name in options if name.endswith(("16_enable", "8_enable"))} == enabled
        assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(cache)
    assert build.size_bytes == example.MODEL.stat().st_size + 1000


def test_the_threads_and_the_graph_level_reach_onnx_runtime(tmp_path):
    sizes = {}
    for level in ("none", "all"):
        target = open_target("ort-cpu", TargetOptions(threads=1, graph_level=level))
        folder = tmp_path / level
        folder.mkdir()
        build = target.build(example.MODEL, folder, "fp32")
        assert build.options["graph_level"] == level
        assert build.options["threads"] == 1
        sizes[level] = build.path.read_bytes().count(b"BiasGelu")
    assert sizes["none"] == 0 < sizes["all"]


def test_only_the_engine_and_its_record_are_left(built):
    _, build = built
    names = {path.name for path in build.path.parent.iterdir()}
    assert names == {"build.json", build.path.name} | (
        {"model.bin"} if build.target == "openvino" else set()
    )


def test_a_large_model_is_built_with_its_weights_beside_it(tmp_path, images, monkeypatch):
    monkeypatch.setattr(ort, "is_large", lambda proto: True)
    target = open_target("ort-cpu")
    build = target.build(example.MODEL, tmp_path, "fp32")
    assert (tmp_path / "model.onnx.data").stat().st_size > 500_000
    assert build.size_bytes > 800_000
    wanted = open_session(example.MODEL).run(images)["logits"]
    assert np.abs(target.load(build).run(images)["logits"] - wanted).max() < 1e-4


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_here_or_says_why_not(name):
    target = open_target(name)
    assert target.name == name
    if name in HERE:
        target.require("fp32")
    else:
        with pytest.raises(BackendUnavailable) as caught:
            target.require("fp32")
        assert "install" in str(caught.value) or "choose" in str(caught.value)


def test_a_precision_is_built_from_data_and_only_timed_without(tmp_path):
    target = open_target("ort-cpu")
    with pytest.raises(PlanError, match="give --data"):
        Typist(None).typed(example.MODEL, target, "int8")
    drawn = Typist(None, only_timed=True).typed(example.MODEL, target, "int8")
    made = Typist(Source(str(example.CALIBRATION))).typed(example.MODEL, target, "int8")
    for model in (drawn, made):
        ops = [node.op for node in model.graph.nodes]
        assert ops.count("QuantizeLinear") > 20


@pytest.mark.parametrize(
    ("name", "dtype"), [("ort-cpu", np.uint8), ("openvino", np.uint8), ("tensorrt", np.int8)]
)
def test_tensorrt_gets_zero_in_the_middle(name, dtype):
    made = Typist(None, only_timed=True).typed(example.MODEL, open_target(name), "int8")
    zeros = {n.inputs[2].values.dtype for n in made.graph.nodes if n.op == "QuantizeLinear"}
    assert zeros == {np.dtype(dtype)}


@pytest.mark.parametrize(("name", "whole"), [("ort-cpu", True), ("tensorrt", False)])
def test_unsigned_products_are_of_whole_numbers_on_onnx_runtime(tmp_path, name, whole):
    """Query, key and value read one tensor; signed, the twin, their products stay in float32."""
    net = Net(0)
    heads = [net.linear(net.x() if place == 0 else "x", WIDTH, 8) for place in range(3)]
    onnx.save(net.build(*heads), tmp_path / "model.onnx")
    typist = Typist(None, only_timed=True)
    made = typist.typed(tmp_path / "model.onnx", open_target(name), "int8")
    write(made.proto(), tmp_path / "int8.onnx")
    build = open_target("ort-cpu").build(tmp_path / "int8.onnx", tmp_path, "int8")
    ops = [node.op_type for node in onnx.load(build.path).graph.node]
    assert (ops.count("MatMulIntegerToFloat") == 3) == whole


def test_models_that_need_no_other_types_stay(built):
    target, build = built
    typist = Typist(None, only_timed=True)
    assert typist.typed(example.MODEL, target, "fp32") == example.MODEL
    assert typist.typed(build.path.parent, target, "int8") == build.path.parent
    assert typist.typed(example.MODEL, open_target("openvino"), "bf16") == example.MODEL


def test_models_of_other_types_are_not_called_what_they_are_not(tmp_path):
    """The twin: an int8 model timed "in fp16" would be reported as such."""
    typist, target = Typist(None, only_timed=True), open_target("ort-cuda")
    for precision, other in (("fp16", "int8"), ("int8", "fp16")):
        path = tmp_path / f"{precision}.onnx"
        write(typist.typed(example.MODEL, target, precision).proto(), path)
        assert typist.typed(path, target, precision) == path
        with pytest.raises(CorpError, match=r"float16|quantised"):
            typist.typed(path, target, other)


def test_sizes_of_another_model_do_not_matter_to_a_precision():
    typist = Typist(None, only_timed=True, sizes={"ids": (1, 16)})
    assert typist.typed(example.MODEL, open_target("ort-cpu"), "int8")


def test_weights_that_are_missing_are_an_error(tmp_path):
    onnx.save(
        onnx.load(example.MODEL),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    (tmp_path / "m.data").unlink()
    with pytest.raises(GraphError, match=r"m\.data|external"):
        open_target("ort-cpu").build(tmp_path / "m.onnx", tmp_path, "fp32")


@pytest.mark.parametrize("name", HERE)
def test_a_folder_that_takes_no_files_is_an_error(tmp_path, name):
    with pytest.raises(OutputError, match="does not exist"):
        open_target(name).build(example.MODEL, tmp_path / "none", "fp32")


def test_openvino_calls_outputs_what_the_model_calls_them(tmp_path):
    """A tensor that is only moved about has several names there, of which any may come first."""
    net = Net(0)
    z = net("Identity", net("Relu", net.x()))
    onnx.save(net.build(z), tmp_path / "model.onnx")
    target = open_target("openvino")
    engine = target.load(target.build(tmp_path / "model.onnx", tmp_path, "fp32"))
    assert engine.outputs == tuple(open_session(tmp_path / "model.onnx").outputs)


@pytest.mark.parametrize("name", HERE)
def test_runtimes_take_out_what_does_nothing(tmp_path, name):
    """So such nodes may stay in the file, under the names that their readers know."""
    net = Net(0)
    y = net("Cast", net("Identity", net.linear(net.x(), WIDTH, WIDTH)), to=1)
    y = net("Relu", net("Transpose", net("Transpose", y, perm=[0, 2, 1]), perm=[0, 2, 1]))
    onnx.save(net.build(net.linear(y, WIDTH, WIDTH)), tmp_path / "model.onnx")
    target = open_target(name)
    engine = target.load(target.build(tmp_path / "model.onnx", tmp_path, "fp32"))
    kinds = engine.operator_times({"x": np.ones((2, 3, WIDTH), np.float32)}, runs=1)
    assert kinds
    assert not {"Identity", "Cast", "Convert", "Transpose"} & kinds.keys()


def test_every_flag_of_a_target_is_somebody_s():
    for field in fields(TargetOptions):
        assert [name for name, taken in TAKEN.items() if field.name in taken]
    assert TAKEN.keys() == TARGETS.keys()
    assert FLAGS.keys() == {field.name for field in fields(TargetOptions)}
    assert FLAGS.keys() > BUILDING


@pytest.mark.parametrize("name", ["refit", "version_compatible", "cuda_graph"])
def test_what_is_asked_of_tensorrt_reaches_it_and_no_other(name):
    asked = TargetOptions(**{name: True})
    assert getattr(open_target("tensorrt", asked), name) is True
    assert getattr(open_target("tensorrt"), name) is False
    require_taken(asked, ["ort-cpu", "tensorrt"])
    for other in TARGETS.keys() - {"tensorrt"}:
        with pytest.raises(PlanError, match=f"{FLAGS[name]} means nothing to {other}, it is for"):
            require_taken(asked, [other])


@pytest.mark.parametrize("name", sorted(BUILDING))
def test_what_says_how_to_build_is_refused_where_nothing_is_built(name):
    """The twin: what says how to run is not."""
    asked = TargetOptions(**{name: 1})
    require_taken(asked, ["tensorrt"])
    with pytest.raises(PlanError, match=f"{FLAGS[name]} says how an engine is built"):
        require_taken(asked, ["tensorrt"], builds=False)
    require_taken(TargetOptions(cuda_graph=True), ["tensorrt"], builds=False)


def test_targets_say_which_models_they_round_themselves():
    found = {
        name: tuple(each for each in PRECISIONS if open_target(name).rounds_by_itself(each))
        for name in TARGETS
    }
    assert {name: each for name, each in found.items() if each} == {"openvino": ("bf16",)}


def test_threads_are_told_of_targets_that_compute_on_the_processor():
    asked = TargetOptions(threads=3)
    told = {name: open_target(name, asked).inference_threads for name in TARGETS}
    assert told == dict.fromkeys(TARGETS, 3) | {"tensorrt": None, "tensorrt-rtx": None}


def test_models_are_run_for_a_precision_as_they_are_to_be_run(monkeypatch):
    """With a library of custom operators, say, without which they cannot be."""
    opened, checked = [], []

    def open_one(model, runtime=None):
        opened.append(runtime)
        return open_session(model, runtime)

    def convert(*given, runtime=None):
        checked.append(runtime)
        return in_precision(*given, runtime=runtime)

    monkeypatch.setattr("corp_onnx.commands.typist.open_session", open_one)
    monkeypatch.setattr("corp_onnx.commands.typist.in_precision", convert)
    runtime = Runtime(threads=1)
    typist = Typist(None, only_timed=True, runtime=runtime)
    assert typist.typed(example.MODEL, open_target("ort-cpu"), "int8")
    assert opened == checked == [runtime]


def test_inputs_are_as_the_file_declares_them(tmp_path):
    net = Net(0)
    y = net("Add", net.x("batch", 3), net.const(np.float32(1)))
    proto = net.build(net("Mul", y, net.input("scale")))
    weight = proto.graph.initializer[0]
    proto.graph.input.append(onnx.helper.make_tensor_value_info(weight.name, 1, ()))  # IR 3
    onnx.save(proto, tmp_path / "model.onnx")
    found = declared_inputs(without_weights(tmp_path / "model.onnx"))
    assert found == {"x": (None, 3), "scale": ()}
    with pytest.raises(GraphError, match="cannot be read as an ONNX model"):
        without_weights(tmp_path / "none.onnx")


def test_onnx_runtime_has_no_bf16_on_the_processor():
    with pytest.raises(PlanError, match="no kernels for bf16"):
        open_target("ort-cpu").require("bf16")


def test_onnx_runtime_says_what_it_does_with_fp16_on_the_processor(caplog):
    ort.warn_of_width.cache_clear()
    open_target("ort-cpu").require("fp32")
    assert not caplog.records
    for _ in range(2):
        open_target("ort-cpu").require("fp16")
    (record,) = caplog.records
    assert "ort-cpu computes most of fp16 in float32" in record.getMessage()


def test_targets_with_ranges_of_sizes_may_stand_beside_one_that_lacks_a_precision(monkeypatch):
    """Their records hold mappings, so they are no members of sets."""
    ranged = TensorRTRTX(exactly({"x": (1, 2)}))
    monkeypatch.setattr(TensorRTRTX, "require", lambda *_: None)
    plain = open_target("ort-cpu")
    bench = Bench((example.MODEL,), (ranged, plain), ("fp32", "bf16"), (), Stopwatch())
    assert bench._able() == [(ranged, "fp32"), (ranged, "bf16"), (plain, "fp32")]


def test_an_unknown_target_is_an_error():
    with pytest.raises(PlanError, match="'abacus' is none of ort-cpu, "):
        open_target("abacus")


@pytest.mark.parametrize("text", [None, "{", "[]", json.dumps({"path": "x"})])
def test_a_folder_without_a_whole_record_is_an_error(tmp_path, text):
    if text is not None:
        (tmp_path / "build.json").write_text(text)
    with pytest.raises(DataError, match=r"corp-onnx build|build the engine again"):
        Build.read(tmp_path)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [(((1,), (2, 2), (3,)), "different rank"), (((4,), (2,), (8,)), "out of order")],
)
def test_shapes_of_a_profile_are_in_order(shapes, words):
    ShapeRange((1, 3), (2, 3), (8, 3))
    with pytest.raises(ValueError, match=words):
        ShapeRange(*shapes)
