"""TensorRT for RTX, against a fake of the part of ONNX Runtime that it plugs into."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from corp_onnx import session
from corp_onnx.deploy import rtx
from corp_onnx.deploy.records import Build, ShapeRange
from corp_onnx.deploy.rtx import TensorRTRTX
from corp_onnx.deploy.shape_ranges import exactly
from corp_onnx.errors import BackendUnavailable, GraphError, PlanError
from corp_onnx.session import open_session
from tests.builders import Net
from tests.inputs import activations

PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
PROVIDER = "NvTensorRTRTXExecutionProvider"
STATE = onnxruntime.capi.onnxruntime_pybind11_state

KNOWN = {
    *("nv_max_workspace_size", "nv_runtime_cache_path", "enable_cuda_graph"),
    *("nv_profile_min_shapes", "nv_profile_opt_shapes", "nv_profile_max_shapes"),
}
"""Options of the provider that we use, from the header in its wheel."""


class SessionOptions:
    def __init__(self):
        self.providers = []
        self.log_severity_level = 2

    def add_provider_for_devices(self, devices, options):
        if not devices:
            raise STATE.InvalidArgument("Must provide one or more OrtEpDevice instances.")
        assert options.keys() <= KNOWN
        assert all(isinstance(value, str) for value in options.values())
        self.providers.append(options)


class FakeRuntime(ModuleType):
    """ONNX Runtime with the provider, as far as a machine goes with it."""

    def __init__(self, *, devices=1, refusal=None, beside=MappingProxyType({}), lag_ns=0):
        super().__init__("onnxruntime")
        self.__version__ = "1.32.0"
        self.capi = onnxruntime.capi
        self.SessionOptions = SessionOptions
        self.registered, self.devices, self.refusal = [], devices, refusal
        self.opened = []
        self.beside, self.lag_ns = beside, lag_ns
        if refusal == "old":
            self.register_execution_provider_library = None
            del self.register_execution_provider_library
        else:
            self.register_execution_provider_library = self.register

    def register(self, name, path):
        if self.refusal:
            raise STATE.Fail(self.refusal)
        if name in self.registered:
            raise STATE.Fail(f"library has already been registered under {name}")
        self.registered.append(name)

    def get_ep_devices(self):
        names = ["CPUExecutionProvider", *self.registered * self.devices]
        return [SimpleNamespace(ep_name=name) for name in names]

    def ModelCompiler(self, options, model):  # noqa: N802
        assert options.providers

        def compile_to_file(path):
            if "broken" in model:
                raise STATE.InvalidGraph("not supported")
            shutil.copy(model, path)
            for file, content in self.beside.items():
                Path(path).with_name(file).write_bytes(content)
            if self.lag_ns:
                for file in (path, *(Path(path).with_name(file) for file in self.beside)):
                    now = time.time_ns() - self.lag_ns
                    os.utime(file, ns=(now, now))

        return SimpleNamespace(compile_to_file=compile_to_file)

    def InferenceSession(self, path, options):  # noqa: N802
        self.opened.append(options)
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture
def runtime(monkeypatch):
    def arrange(**facts):
        plugin = ModuleType(PLUGIN)
        plugin.__version__ = "0.5.0"
        plugin.get_ep_name = lambda: PROVIDER
        plugin.get_library_path = lambda: "libonnxruntime_providers_nv_tensorrt_rtx.so"
        monkeypatch.setitem(sys.modules, PLUGIN, plugin)
        fake = FakeRuntime(**facts)
        monkeypatch.setattr(session, "_onnxruntime", lambda: fake)
        return fake

    rtx._registered.cache_clear()
    yield arrange
    rtx._registered.cache_clear()


def test_what_is_compiled_gives_what_the_model_gives(runtime, files, out):
    fake = runtime()
    target = TensorRTRTX()
    build = target.build(files.model, out, "fp32")
    assert build == Build.read(out)
    assert build.target == "tensorrt-rtx"
    assert build.size_bytes == build.path.stat().st_size
    assert build.versions["onnxruntime"] == "1.32.0"
    assert build.versions["tensorrt-rtx"] == "0.5.0"
    engine = target.load(build)
    x = {"x": activations()[:5].astype(np.float32)}
    assert engine.device_ms is None
    assert engine.inputs[0].name == "x"
    expected = open_session_of_cpu(files.model, x)
    np.testing.assert_array_equal(engine.run(x)[engine.outputs[0]], expected)
    engine.close()
    assert fake.registered == [PROVIDER]


@pytest.mark.parametrize("lag_ns", [0, 10_000_000])
def test_its_size_is_that_of_all_files_that_it_wrote(lag_ns, runtime, files, out):
    """Whatever lay in the folder before, and though the clock of files lags that of programs."""
    runtime(beside={"engine.bin": b"x" * 1000}, lag_ns=lag_ns)
    (out / "older.txt").write_text("not of this build")
    build = TensorRTRTX().build(files.model, out, "fp32")
    assert build.size_bytes == files.model.stat().st_size + 1000


def open_session_of_cpu(model, feeds):
    ours = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return ours.run(None, feeds)[0]


def test_options_reach_the_provider(runtime, tmp_path, out):
    fake = runtime()
    shapes = {
        "x": ShapeRange((1, 2, 10), (4, 9, 10), (8, 16, 10)),
        "y": ShapeRange((1,), (1,), (1,)),
    }
    net = Net(0)
    onnx.save(net.build(net("Mul", net.x(), net.input("y", 1))), tmp_path / "model.onnx")
    target = TensorRTRTX(shapes, 1 << 20, True, tmp_path / "cache")
    target.load(target.build(tmp_path / "model.onnx", out, "fp16"))
    assert fake.opened[0].providers == [
        {
            "enable_cuda_graph": "1",
            "nv_max_workspace_size": "1048576",
            "nv_runtime_cache_path": str(tmp_path / "cache"),
            "nv_profile_min_shapes": "x:1x2x10,y:1",
            "nv_profile_opt_shapes": "x:4x9x10,y:1",
            "nv_profile_max_shapes": "x:8x16x10,y:1",
        }
    ]
    assert Build.read(out).options["cache"] == str(tmp_path / "cache")


def test_a_missing_wheel_is_an_error_that_says_how_to_get_it(runtime, monkeypatch):
    runtime()
    monkeypatch.setitem(sys.modules, PLUGIN, None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'corp_onnx\[rtx\]'"):
        TensorRTRTX().require("fp16")


def test_without_a_driver_it_says_what_is_missing(runtime):
    runtime(refusal="libcuda.so.1: cannot open shared object file")
    with pytest.raises(BackendUnavailable, match=r"libcuda\.so\.1.*a driver that knows CUDA 13"):
        TensorRTRTX().require("fp16")


def test_without_a_gpu_that_it_supports_it_says_which_these_are(runtime):
    fake = runtime(devices=0)
    for _ in range(2):  # it is registered once
        with pytest.raises(BackendUnavailable, match=r"compute capability 8\.6, 8\.9, or 12\.0"):
            TensorRTRTX().require("fp16")
    assert fake.registered == [PROVIDER]


def test_int8_is_refused_with_what_it_has(runtime):
    """Its GPUs multiply in the other types; of int8 it has weights alone."""
    runtime()
    for precision in ("fp32", "fp16", "bf16"):
        TensorRTRTX().require(precision)
    with pytest.raises(PlanError, match="int8 for weights alone, and no products of it"):
        TensorRTRTX().require("int8")


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"y": (1, 2, 10)}, "given for y, which the model does not read"),
        ({"x": (1, 10)}, "has 3 dimensions"),
        ({"x": (1, 2, 9)}, "changes a dimension that is fixed there"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_it_compiles(
    shapes, words, runtime, files, out, monkeypatch
):
    fake = runtime()
    monkeypatch.setattr(fake, "ModelCompiler", lambda *_: pytest.fail("it compiles"))
    with pytest.raises(PlanError, match=words):
        TensorRTRTX(exactly(shapes)).build(files.model, out, "fp16")


def test_an_old_onnx_runtime_is_an_error(runtime):
    runtime(refusal="old")
    with pytest.raises(BackendUnavailable, match=r"needs ONNX Runtime 1\.24 or later, not 1\.32"):
        TensorRTRTX().require("fp16")


def test_what_it_cannot_compile_or_load_is_an_error(runtime, files, tmp_path, out):
    runtime()
    broken = tmp_path / "broken.onnx"
    shutil.copy(files.model, broken)
    with pytest.raises(GraphError, match=r"cannot compile .*not supported"):
        TensorRTRTX().build(broken, out, "fp32")
    build = TensorRTRTX().build(files.model, out, "fp32")
    build.path.write_bytes(b"nothing")
    with pytest.raises(GraphError, match=r"cannot load .*build it again"):
        TensorRTRTX().load(build)


def test_onnx_runtime_has_what_is_plugged_into():
    for name in ("register_execution_provider_library", "get_ep_devices", "ModelCompiler"):
        assert hasattr(onnxruntime, name)
    assert hasattr(onnxruntime.SessionOptions, "add_provider_for_devices")
    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == "CPUExecutionProvider"]
    onnxruntime.SessionOptions().add_provider_for_devices(devices, {})
    with pytest.raises(STATE.InvalidArgument, match="one or more"):
        onnxruntime.SessionOptions().add_provider_for_devices([], {})


def test_a_session_is_the_same_when_it_is_wrapped(files):
    opened = open_session(files.model)
    assert session.wrapped(opened._session).inputs == opened.inputs
