"""The door to ONNX Runtime: which distribution is behind it, and that it does what was asked."""

from __future__ import annotations

import logging
import sys
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from corp_onnx import providers, session
from corp_onnx.errors import BackendUnavailable
from corp_onnx.graph.inputs import InputSpec
from corp_onnx.graph.model import from_proto
from corp_onnx.providers import CPU, CUDA
from corp_onnx.session import Runtime, open_session
from corp_onnx.terminal import options
from tests.builders import Net

BOTH = ("onnxruntime", "onnxruntime-gpu")


def mended(*names):
    """What is advised."""
    return f"`pip uninstall -y {' '.join(names)}`, then `pip install 'corp_onnx[gpu]'`"


@pytest.fixture
def installed(monkeypatch):
    """Pretend that just these distributions are installed."""
    cached = (providers.conflict, providers.warn_of_conflict)
    looked_up = []

    def pretend(*names):
        def version(name):
            looked_up.append(name)
            if name not in names:
                raise metadata.PackageNotFoundError(name)
            return "1.31"

        monkeypatch.setattr(providers.metadata, "version", version)
        for function in cached:
            function.cache_clear()
        return looked_up

    yield pretend
    for function in cached:
        function.cache_clear()


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    "names", [BOTH, ("onnxruntime", "onnxruntime-openvino"), (*BOTH, "onnxruntime-directml")]
)
def test_several_distributions_are_a_conflict_that_is_told_once(installed, caplog, files, names):
    looked_up = installed(*names)
    for _ in range(3):
        open_session(files.model)
    (told,) = warnings(caplog)
    assert f"{' and '.join(names)} are installed together" in told
    assert mended(*names) in told
    assert sorted(looked_up) == sorted(providers.DISTRIBUTIONS)


@pytest.mark.parametrize("only", ["onnxruntime", "onnxruntime-gpu"])
def test_one_distribution_is_none(installed, caplog, files, only):
    installed(only)
    open_session(files.model)
    assert not warnings(caplog)


def test_the_conflict_is_on_standard_error_and_the_document_whole(installed, command, files):
    installed(*BOTH)
    ended = command("bench", files.model, "--runs", 1, "--warmup", 0, "--json")
    assert ended.status == 0
    assert "installed together" in ended.message
    assert "installed together" not in ended.stdout


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("onnxruntime",), mended("onnxruntime")),
        (BOTH, f"files; run {mended(*BOTH)}"),
        ((), mended("onnxruntime")),
    ],
    ids=["the CPU's alone", "both", "one of another name"],
)
def test_cuda_without_its_distribution_says_which_commands_to_run(installed, files, names, words):
    installed(*names)
    with pytest.raises(BackendUnavailable) as error:
        open_session(files.model, Runtime(CUDA))
    assert "CUDAExecutionProvider is not in the installed ONNX Runtime" in str(error.value)
    assert words in str(error.value)


def test_another_provider_is_none_of_that(installed, files):
    installed("onnxruntime")
    with pytest.raises(BackendUnavailable) as error:
        open_session(files.model, Runtime(("MyProvider",)))
    assert "pip" not in str(error.value)


@pytest.mark.parametrize("both", [True, False])
def test_a_package_that_cannot_be_imported_is_missing_or_in_conflict(
    installed, monkeypatch, files, both
):
    installed(*(BOTH if both else ()))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    words = "are installed together" if both else "is not installed"
    with pytest.raises(BackendUnavailable, match=words):
        open_session(files.model)


def pretend_cuda(monkeypatch, *, starts):
    """ONNX Runtime with CUDA, which leaves the provider out where it does not start."""
    opened = []

    def session_of(model, options, *, providers):
        opened.append(providers)
        started = [name for name, _ in providers if starts or name != CUDA[0]]
        return SimpleNamespace(
            get_providers=lambda: started, get_inputs=lambda: [], get_outputs=lambda: []
        )

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(CUDA))
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda: sys.stdout.write("Failed to load libcudnn\n")
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", session_of)
    return opened


def test_cuda_computes_float32_as_float32(monkeypatch, files, capsys):
    opened = pretend_cuda(monkeypatch, starts=True)
    open_session(files.model, options.runtime_of(None, 0, None, "cuda"))
    assert opened == [[(CUDA[0], {"use_tf32": "0"}), (CPU[0], {})]]
    assert capsys.readouterr().out == ""  # ONNX Runtime prints there, where a document belongs


def test_a_provider_that_does_not_start_is_an_error(monkeypatch, files, caplog):
    pretend_cuda(monkeypatch, starts=False)
    caplog.set_level(logging.INFO)
    with pytest.raises(BackendUnavailable, match="could not start CUDAExecutionProvider"):
        open_session(files.model, Runtime(CUDA))
    assert "libcudnn" in caplog.text


def test_a_device_has_its_providers_unless_others_are_named():
    assert options.runtime_of(None, 0, None).providers == CPU
    assert options.runtime_of(None, 0, None, "cuda").providers == CUDA
    assert options.runtime_of("CPUExecutionProvider", 0, None, "cuda").providers == CPU
    named = options.runtime_of("MyProvider, CPUExecutionProvider", 0, None).providers
    assert named == ("MyProvider", *CPU)


class Bound:
    """What ONNX Runtime binds arrays to, with the order of what is asked of it."""

    def __init__(self, said):
        self.said = said

    def bind_ortvalue_input(self, name, value):
        self.said.append("bind")

    def bind_output(self, name, device):
        self.said.append(f"output on {device}")

    def synchronize_inputs(self):
        self.said.append("inputs are there")

    def synchronize_outputs(self):
        self.said.append("outputs are there")

    def copy_outputs_to_cpu(self):
        self.said.append("copy back")
        return [np.ones(2)]


def test_the_time_on_a_device_is_without_the_copies(monkeypatch):
    said = []

    def clock():
        said.append("clock")
        return float(len(said))

    def placed(array, device, number):
        said.append(f"copy to {device}")

    bound = SimpleNamespace(
        io_binding=lambda: Bound(said), run_with_iobinding=lambda binding: said.append("run")
    )
    fake = SimpleNamespace(OrtValue=SimpleNamespace(ortvalue_from_numpy=placed))
    fake.capi = onnxruntime.capi
    monkeypatch.setattr(session, "_onnxruntime", lambda: fake)
    monkeypatch.setattr(session, "perf_counter", clock)
    inputs = (InputSpec("x", np.dtype(np.float32), (2,)),)
    found, ms = session.Session(inputs, ("y",), bound).run_on("cuda", {"x": np.zeros(2)})
    assert said == [
        *("copy to cuda", "bind", "output on cuda", "inputs are there"),
        *("clock", "run", "outputs are there", "clock", "copy back"),
    ]
    assert ms == 3000.0
    assert found["y"].tolist() == [1.0, 1.0]


def test_a_number_is_bound_as_a_number():
    net = Net(0)
    x = net.input("x")
    model = from_proto(net.build(net("Neg", x)))
    found, _ = open_session(model).run_on("cpu", {"x": np.float32(2.0)})
    (value,) = found.values()
    assert value.shape == ()
    assert value == -2.0
