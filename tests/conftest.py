"""What many tests start from: a seeded generator, tiny models, their files and their data."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import array_api_strict
import numpy as np
import onnx
import pytest

from corp_onnx import cli
from corp_onnx.device import HOST, Device, device_of
from corp_onnx.errors import BackendUnavailable
from corp_onnx.graph.model import Model, from_proto
from corp_onnx.surgery import operate
from tests.builders import TINY
from tests.inputs import activations, sentences


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


STRICT = Device("strict", array_api_strict)
"""Arrays that can do what the standard says, and nothing else."""


def device_named(name: str) -> Device:
    """A device for tests; without CUDA those that need it are skipped, with the reason."""
    try:
        return {"strict": STRICT, "cpu": HOST}.get(name) or device_of("cuda")
    except BackendUnavailable as error:
        pytest.skip(str(error))


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", "strict", CUDA])
def any_device(request: pytest.FixtureRequest) -> Device:
    """The host, arrays of the standard alone, and CUDA where there is any."""
    return device_named(request.param)


@pytest.fixture(params=["strict", CUDA])
def device(request: pytest.FixtureRequest) -> Device:
    """The same, but for the host."""
    return device_named(request.param)


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Model]:
    """A tiny model by name."""
    return lambda name: from_proto(TINY[name](0).proto)


@pytest.fixture(scope="module")
def rarely_collected() -> Iterator[None]:
    """Graphs are many small objects: looking for garbage among them takes a sixth of the time."""
    usual = gc.get_threshold()
    gc.set_threshold(50_000, 20, 50)
    yield
    gc.set_threshold(*usual)


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting MACs takes longer than cutting; it is tested elsewhere."""
    monkeypatch.setattr(operate, "evaluate", lambda *_: None)
    monkeypatch.setattr(operate, "count", lambda *_: None)


@dataclass(frozen=True, slots=True)
class Files:
    """A small transformer, a text encoder, and data for both, on disk."""

    folder: Path
    model: Path
    data: Path
    text_model: Path
    text_data: Path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    made = Files(
        folder,
        folder / "model.onnx",
        folder / "data.npz",
        folder / "text.onnx",
        folder / "text.npz",
    )
    onnx.save(TINY["transformer"](0).proto, made.model)
    onnx.save(TINY["text_encoder"](0).proto, made.text_model)
    np.savez(made.data, x=activations())
    np.savez(made.text_data, **sentences(np.random.default_rng(0), samples=40, length=9))
    return made


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended, and what it printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def message(self) -> str:
        """What it said on standard error, however its lines were broken."""
        return " ".join(self.stderr.split())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for an engine."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ended]]:
    """Run the command line in this process."""
    root = logging.getLogger()
    before = root.level, list(root.handlers)

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        return Ended(status, *capsys.readouterr())

    yield run
    root.level, root.handlers = before
