"""TensorRT as a target, against a fake that holds it to the rules of both major versions."""

from __future__ import annotations

import json
import logging
import signal
import sys

import numpy as np
import onnx
import pytest

from corp_onnx.deploy.records import Build, ShapeRange
from corp_onnx.deploy.shape_ranges import exactly
from corp_onnx.deploy.tensorrt import Options, TensorRT, building, write_layer_times
from corp_onnx.deploy.tensorrt.network import construct
from corp_onnx.deploy.tensorrt.options import ENGINE, LAYERS
from corp_onnx.errors import BackendUnavailable, DataError, GraphError, PlanError
from corp_onnx.session import open_session
from tests.builders import Net
from tests.fake_tensorrt import CRASH
from tests.inputs import activations
from tests.machines import ELEVEN, TEN, machine

__all__ = ["machine"]

SHAPES = {"x": ShapeRange((1, 2, 10), (4, 9, 10), (8, 16, 10))}


def saved(net, path, *outputs):
    """A net as a file, whose outputs have types also where ONNX cannot infer them."""
    proto = net.build(*outputs)
    for value in proto.graph.output:
        value.type.tensor_type.elem_type = value.type.tensor_type.elem_type or 1
    onnx.save(proto, path)
    return path


@pytest.fixture
def build_here(tmp_path, files):
    """An engine built in this process, without the time that another takes to start."""

    def build(model=files.model, **options):
        folder = tmp_path / "engine"
        folder.mkdir(exist_ok=True)
        given = Options(**{"shapes": SHAPES} | options)
        versions = construct(model, folder, given, logging.getLogger(__name__).debug)
        path = folder / ENGINE
        size = path.stat().st_size
        return Build("tensorrt", "fp32", path, 1.0, size, versions, given.document())

    return build


def plan(build):
    return json.loads(build.path.read_bytes())


def feeds(batch=4, tokens=9):
    rng = np.random.default_rng(batch)
    return {"x": rng.standard_normal((batch, tokens, 10)).astype(np.float32)}


# building


@pytest.mark.parametrize("version", [TEN, ELEVEN])
def test_an_engine_gives_what_the_model_gives(version, machine, files, out):
    gpu = machine(version)
    target = TensorRT(SHAPES, refit=True)
    build = target.build(files.model, out, "fp32")

    assert build == Build.read(out)
    assert build.target == "tensorrt"
    assert build.size_bytes == build.path.stat().st_size
    assert build.versions == target.versions()
    assert build.versions["tensorrt"] == version
    assert build.versions["gpu"] == "Fake GPU (compute capability 8.6)"
    assert (build.versions["driver"], build.versions["cuda"]) == ("13.0", "12.6")
    assert build.options["refit"] is True
    assert json.loads((out / LAYERS).read_text())["Layers"]
    assert Options.read(build.options) == Options(SHAPES, refit=True)

    engine = target.load(build)
    x = activations()[:5].astype(np.float32)
    (given,), (expected,) = (
        each.values() for each in (engine.run({"x": x}), open_session(files.model).run({"x": x}))
    )
    np.testing.assert_allclose(given, expected, rtol=1e-6)
    engine.close()
    assert gpu.held() == []


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_of_the_builder_is_an_error_with_what_it_said_last(
    how, machine, files, out, monkeypatch
):
    machine()
    monkeypatch.setenv(CRASH, str(int(how)))
    with pytest.raises(GraphError, match=how.name) as caught:
        TensorRT(SHAPES).build(files.model, out, "fp32")
    assert "[INFO] timing tactic 0x1234 of layer MatMul_7" in str(caught.value)
    assert "All of it is in build.log, where the engine was to be" in str(caught.value)


def test_a_builder_that_was_killed_wanted_memory(machine, files, out, monkeypatch):
    machine()
    monkeypatch.setenv(CRASH, str(int(signal.SIGKILL)))
    with pytest.raises(GraphError, match="ran out of memory"):
        TensorRT(SHAPES).build(files.model, out, "fp32")


def test_an_error_of_the_other_process_is_the_same_error_here(machine, tmp_path, out):
    machine()
    net = Net(0)
    model = saved(net, tmp_path / "model.onnx", net("Unsupported", net.x(), domain="com.example"))
    with pytest.raises(GraphError, match=r"cannot read .*\n.*no importer for Unsupported"):
        TensorRT(SHAPES).build(model, out, "fp32")


def test_an_exception_in_the_other_process_is_an_error_with_what_it_said_last(
    machine, files, out, monkeypatch
):
    machine()
    monkeypatch.setattr(building, "CHILD", "corp_onnx.no_such_module")
    with pytest.raises(GraphError, match="builder failed; it said last") as caught:
        TensorRT(SHAPES).build(files.model, out, "fp32")
    assert "No module named corp_onnx.no_such_module" in str(caught.value)
    assert "All of it is in build.log" in str(caught.value)
    assert (out / "build.log").is_file()


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({}, "--opt-shapes x:1x1x10"),
        ({"y": (1, 2, 10)}, "given for y, which the model does not read"),
        ({"x": (1, 10)}, "has 3 dimensions"),
        ({"x": (1, 2, 9)}, "changes a dimension that is fixed there"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_the_other_process_begins(
    shapes, words, machine, files, out, monkeypatch
):
    machine()
    monkeypatch.setattr(building, "_run", lambda *_: pytest.fail("it begins"))
    with pytest.raises(PlanError, match=words):
        TensorRT(exactly(shapes)).build(files.model, out, "fp32")
    assert not list(out.iterdir())


@pytest.mark.parametrize("version", [TEN, ELEVEN])
def test_the_parser_s_errors_all_arrive_with_their_nodes(version, machine, build_here, tmp_path):
    machine(version)
    net = Net(0)
    x = net("Unsupported", net.x(), domain="com.example")
    y = net("Unsupported", net("Relu", x), domain="com.example")
    with pytest.raises(GraphError, match="cannot read") as caught:
        build_here(saved(net, tmp_path / "model.onnx", y))
    assert "node Unsupported_0 (Unsupported): no importer" in str(caught.value)
    assert "node Unsupported_2 (Unsupported): no importer" in str(caught.value)


def test_a_file_that_is_no_model_is_an_error(machine, build_here, tmp_path):
    machine()
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(GraphError, match="no ONNX model"):
        build_here(tmp_path / "model.onnx")


def test_weights_beside_the_file_are_found(machine, build_here, files, tmp_path):
    machine()
    model = tmp_path / "beside" / "model.onnx"
    model.parent.mkdir()
    onnx.save(
        onnx.load(files.model), model, save_as_external_data=True, location="w", size_threshold=0
    )
    assert build_here(model).path.exists()


def test_what_the_builder_cannot_build_is_an_error(machine, build_here, tmp_path):
    machine()
    net = Net(0)
    y = net("Unbuildable", net.x(), domain="com.example")
    with pytest.raises(GraphError, match="Could not find any implementation"):
        build_here(saved(net, tmp_path / "model.onnx", y))


def test_an_input_whose_values_are_sizes_is_refused(machine, build_here, tmp_path):
    machine()
    net = Net(0)
    y = net("Reshape", net.x(), net.input("sizes", 2, dtype=np.int64))
    with pytest.raises(GraphError, match="values of input sizes decide sizes"):
        build_here(saved(net, tmp_path / "model.onnx", y))


def test_a_model_of_fixed_sizes_needs_no_shapes(machine, build_here, tmp_path):
    machine()
    net = Net(0)
    model = saved(net, tmp_path / "model.onnx", net("Relu", net.x(2, 3, 10)))
    assert plan(build_here(model, shapes={}))["shapes"] == {}


@pytest.mark.parametrize("version", [TEN, ELEVEN])
def test_options_reach_the_builder(version, machine, build_here):
    machine(version)
    made = plan(
        build_here(
            workspace_bytes=1 << 20,
            optimization_level=5,
            refit=True,
            version_compatible=True,
            tf32=False,
            verbosity="names",
            threads=2,
        )
    )
    assert made["flags"] == ["REFIT", "VERSION_COMPATIBLE"]
    assert (made["level"], made["workspace"]) == (5, 1 << 20)
    assert made["verbosity"] == "LAYER_NAMES_ONLY"
    assert made["shapes"] == {"x": [[1, 2, 10], [4, 9, 10], [8, 16, 10]]}


def test_flags_of_the_command_line_reach_builder_and_engine(
    machine, command, files, tmp_path, monkeypatch
):
    gpu, folder = machine(), tmp_path / "engine"
    sizes = ("--target", "tensorrt", "--refit", "--version-compatible", "--opt-shapes", "x:4x9x10")
    assert command("build", files.model, "-o", folder, *sizes).status == 0
    made = json.loads((folder / ENGINE).read_bytes())
    assert made["flags"] == ["REFIT", "TF32", "VERSION_COMPATIBLE"]
    launches, launch = [], gpu.module.cudaGraphLaunch
    monkeypatch.setattr(
        gpu.module, "cudaGraphLaunch", lambda *given: (launches.append(given), launch(*given))[1]
    )
    timed = ("--target", "tensorrt", "--shapes", "x:4x9x10", "--warmup", 0, "--runs", 2)
    assert command("bench", folder, *timed).status == 0
    assert launches == []
    assert command("bench", folder, *timed, "--cuda-graph").status == 0
    assert len(launches) == 2


def test_what_is_not_asked_for_stays_as_tensorrt_has_it(machine, build_here):
    machine()
    made = plan(build_here())
    assert (made["flags"], made["level"], made["workspace"]) == (["TF32"], 3, None)


@pytest.mark.parametrize("wrong", [{"optimization_level": 6}, {"workspace_bytes": 0}])
def test_options_without_sense_are_refused(wrong, machine, files, out):
    machine()
    with pytest.raises(PlanError):
        TensorRT(SHAPES, **wrong).build(files.model, out, "fp32")


def test_kernel_times_are_kept_and_used_again(machine, build_here, tmp_path):
    machine()
    cache = tmp_path / "kept" / "times.cache"
    build_here(timing_cache=cache)
    assert json.loads(cache.read_bytes())["times"] == 1
    build_here(timing_cache=cache)
    assert json.loads(cache.read_bytes())["times"] == 2
    assert list(cache.parent.iterdir()) == [cache]


def test_kernel_times_of_another_gpu_are_begun_anew(machine, build_here, tmp_path):
    machine(capability=(7, 5))
    cache = tmp_path / "times.cache"
    build_here(timing_cache=cache)
    machine(capability=(8, 6))
    build_here(timing_cache=cache)
    assert json.loads(cache.read_bytes())["capability"] == [8, 6]
    assert json.loads(cache.read_bytes())["times"] == 1


def test_options_survive_json(tmp_path):
    options = Options(SHAPES, 5, 1, tmp_path / "cache", True, True, False, "names", 3)
    assert Options.read(json.loads(json.dumps(options.document()))) == options


# what is here


def test_types_that_the_gpu_lacks_are_refused(machine):
    machine(capability=(7, 5))
    TensorRT().require("fp16")
    with pytest.raises(PlanError, match=r"compute capability 8\.0; choose fp16"):
        TensorRT().require("bf16")


def test_int8_is_a_model_with_quantised_tensors(machine, files, tmp_path, out):
    machine()
    with pytest.raises(PlanError, match="no QuantizeLinear"):
        TensorRT(SHAPES).build(files.model, out, "int8")
    (tmp_path / "none.onnx").write_bytes(b"none")
    with pytest.raises(GraphError, match="cannot be read"):
        TensorRT(SHAPES).build(tmp_path / "none.onnx", out, "int8")


def test_no_gpu_is_an_error_that_says_so(machine):
    machine(devices=0)
    with pytest.raises(BackendUnavailable, match=r"no GPU here \(cudaErrorNoDevice"):
        TensorRT().require("fp32")


def test_a_gpu_that_tensorrt_cannot_use_is_an_error(machine, build_here, monkeypatch):
    gpu = machine()
    build = build_here()
    monkeypatch.setattr(gpu.module, "cudaGetDeviceCount", lambda: (gpu.module.cudaError_t(0), 1))
    gpu.devices = 0
    with pytest.raises(BackendUnavailable, match=r"cannot start .*CUDA initialization failure"):
        build_here()
    with pytest.raises(BackendUnavailable, match=r"cannot start .*CUDA initialization failure"):
        TensorRT().load(build)


@pytest.mark.parametrize("version", ["8.6.1", "9.3.0", "12.0.0"])
def test_another_major_version_is_an_error(version, machine):
    machine(version)
    with pytest.raises(BackendUnavailable, match="10 or 11 is needed"):
        TensorRT().require("fp32")


def test_a_folder_of_that_name_is_not_tensorrt(machine, tmp_path):
    machine()
    sys.modules.pop("tensorrt", None)
    (tmp_path / "site" / "tensorrt" / "__init__.py").unlink()
    with pytest.raises(BackendUnavailable, match="TensorRT is not in it"):
        TensorRT().require("fp32")


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [("tensorrt", r"corp_onnx\[tensorrt\]"), ("cuda.bindings", "pip install cuda-python")],
)
def test_a_missing_package_is_an_error_that_says_how_to_get_it(missing, remedy, machine):
    machine()
    sys.modules[missing] = None
    with pytest.raises(BackendUnavailable, match=remedy):
        TensorRT().require("fp32")


# running


@pytest.fixture
def engine(machine, build_here):
    """A loaded engine, and the GPU that it is on; all is given back at the end."""
    loaded = []

    def load(*, cuda_graph=False, model=None, shapes=SHAPES, **facts):
        gpu = machine(TEN, **facts)
        given = {} if model is None else {"model": model}
        build = build_here(**given, shapes=shapes)
        loaded.append((TensorRT(cuda_graph=cuda_graph).load(build), gpu))
        return loaded[-1]

    yield load
    for engine, gpu in loaded:
        engine.close()
        assert gpu.held() == []


def test_an_engine_says_what_it_reads_and_gives(engine):
    made, _ = engine()
    (spec,) = made.inputs
    assert (spec.name, spec.dtype, spec.shape) == ("x", np.float32, (None, None, 10))
    assert len(made.outputs) == 1


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_sizes_may_change_from_run_to_run(cuda_graph, engine, files):
    made, _ = engine(cuda_graph=cuda_graph)
    session = open_session(files.model)
    for sizes in [(4, 9), (8, 16), (1, 2), (1, 2), (4, 9)]:
        given, expected = made.run(feeds(*sizes)), session.run(feeds(*sizes))
        for name, array in expected.items():
            np.testing.assert_allclose(given[name], array, rtol=1e-6)


def test_the_time_on_the_device_is_that_of_the_last_run(engine):
    made, _ = engine()
    assert made.device_ms is None
    made.run(feeds())
    first = made.device_ms
    assert first > 0
    made.run(feeds())
    assert made.device_ms != first


def test_memory_is_taken_once_for_the_same_sizes(engine):
    made, gpu = engine()
    made.run(feeds())
    held = set(gpu.memory)
    made.run(feeds())
    made.run(feeds(1, 2))
    assert set(gpu.memory) == held


def test_a_graph_is_captured_once_and_launched_for_the_same_sizes(engine, monkeypatch):
    made, gpu = engine(cuda_graph=True)
    launches = []
    launch = gpu.module.cudaGraphLaunch
    monkeypatch.setattr(
        gpu.module, "cudaGraphLaunch", lambda *given: (launches.append(given[0]), launch(*given))[1]
    )
    for sizes in [(4, 9), (4, 9), (2, 9)]:
        made.run(feeds(*sizes))
    assert len(launches) == 3
    assert len(set(map(id, launches[:2]))) == 1
    assert launches[2] is not launches[0]


def test_an_engine_that_cannot_be_a_graph_is_an_error(engine):
    made, gpu = engine(cuda_graph=True)
    gpu.uncapturable = True
    with pytest.raises(GraphError, match="Not every engine can be a CUDA graph"):
        made.run(feeds())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "also reads x"),
        ({"x": np.zeros((4, 9, 10))}, "x is float64, but the engine reads float32"),
        ({"x": np.zeros((9, 9, 10), np.float32)}, r"from \[1, 2, 10\] to \[8, 16, 10\], not \[9,"),
        ({"x": np.zeros((9, 10), np.float32)}, r"not \[9, 10\]; build it again"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(given, message, engine):
    made, _ = engine()
    with pytest.raises(DataError, match=message):
        made.run(given)
    made.run(feeds())


def test_arrays_may_lie_in_any_order(engine, files):
    made, _ = engine()
    x = feeds()["x"]
    turned = np.asfortranarray(x)
    np.testing.assert_array_equal(*(made.run({"x": a})[made.outputs[0]] for a in (x, turned)))


def test_single_numbers_and_fixed_sizes_are_inputs_too(engine, tmp_path):
    net = Net(0)
    model = saved(net, tmp_path / "model.onnx", net("Mul", net.x(2, 3), net.input("by")))
    made, _ = engine(model=model, shapes={})
    x, by = np.ones((2, 3), np.float32), np.array(3, np.float32)
    (given,) = made.run({"x": x, "by": by}).values()
    np.testing.assert_array_equal(given, 3 * x)
    with pytest.raises(DataError, match=r"takes x as \[2, 3\], not \[2, 4\]"):
        made.run({"x": np.ones((2, 4), np.float32), "by": by})


def test_too_little_memory_is_an_error(engine):
    made, _ = engine(memory_bytes=100)
    with pytest.raises(GraphError, match="cudaErrorMemoryAllocation"):
        made.run(feeds())


def test_an_output_of_unknown_size_is_an_error(engine, tmp_path):
    net = Net(0)
    net("NonZero", net.x())
    net.nodes[-1].output[0] = "unknown"
    made, _ = engine(model=saved(net, tmp_path / "model.onnx", "unknown"))
    with pytest.raises(GraphError, match="size of output unknown depends on values"):
        made.run(feeds())


def test_a_type_without_arrays_is_an_error(machine, build_here, tmp_path):
    machine()
    net = Net(0, dtype=np.float64)
    build = build_here(saved(net, tmp_path / "model.onnx", net("Relu", net.x())))
    with pytest.raises(GraphError, match="x is FP8, which NumPy has no arrays of"):
        TensorRT().load(build)


def test_every_layer_has_its_time(engine, tmp_path):
    made, _ = engine()
    times = made.layer_times(feeds(), runs=3)
    assert len(times) > 3
    assert {time.median_ms for time in times} == {0.25}
    write_layer_times(times, tmp_path / "profile.json")
    first = json.loads((tmp_path / "profile.json").read_text())[0]
    assert first == {"name": times[0].name, "median_ms": 0.25}
    made.run(feeds())


# engines of elsewhere


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({"version": TEN}, {"version": ELEVEN}, "Version tag does not match"),
        ({"capability": (7, 5)}, {"capability": (8, 7)}, "incompatible device"),
    ],
)
def test_an_engine_of_another_machine_is_an_error_that_names_both(
    there, here, message, machine, build_here
):
    machine(**there)
    build = build_here()
    machine(**here)
    with pytest.raises(GraphError, match=message) as caught:
        TensorRT().load(build)
    assert "build it again" in str(caught.value)
    assert build.versions["tensorrt"] in str(caught.value)
    assert build.versions["gpu"] in str(caught.value)


def test_an_engine_made_for_later_versions_is_loaded_there(machine, build_here):
    machine(TEN)
    build = build_here(version_compatible=True)
    machine(ELEVEN)
    engine = TensorRT().load(build)
    assert engine.run(feeds())
    engine.close()


def test_a_file_that_is_no_engine_is_an_error(machine, build_here):
    machine()
    build = build_here()
    build.path.write_bytes(b"no engine")
    with pytest.raises(GraphError, match="Magic tag"):
        TensorRT().load(build)
    build.path.unlink()
    with pytest.raises(GraphError, match="cannot be read"):
        TensorRT().load(build)


def test_one_size_is_a_range_too(machine, build_here):
    machine()
    build = build_here(shapes=exactly({"x": (2, 3, 10)}))
    engine = TensorRT().load(build)
    engine.run(feeds(2, 3))
    with pytest.raises(DataError, match=r"from \[2, 3, 10\] to \[2, 3, 10\]"):
        engine.run(feeds(2, 4))
    engine.close()
