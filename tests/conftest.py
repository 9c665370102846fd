"""What many tests start from: a seeded generator, tiny models, their files and their data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from corp_onnx import cli
from corp_onnx.arrays import Arrays
from corp_onnx.data import Dataset
from corp_onnx.graph import Model, from_proto
from corp_onnx.session import open_session
from corp_onnx.sources import layout_of
from tests.builders import TINY, WIDTH

SAMPLES, TOKENS = 64, 7


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Model]:
    """A tiny model by name."""
    return lambda name: from_proto(TINY[name](0).proto)


def dataset(model: Model, **arrays: np.ndarray) -> Dataset:
    """Arrays in memory as a data set that fits a model."""
    layout, samples = layout_of("memory", arrays)
    specs = open_session(model).inputs
    return Dataset(Arrays(arrays, layout, samples), specs, np.arange(samples), "memory")


def activations(samples: int = SAMPLES, tokens: int = TOKENS, seed: int = 0) -> np.ndarray:
    """Inputs whose channels are correlated, so that there is something to repair from."""
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((samples, tokens, 4))
    mixed = causes @ np.random.default_rng(7).standard_normal((4, WIDTH))
    return (mixed + 0.1 * rng.standard_normal(mixed.shape)).astype(np.float32)


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


def sentences(rng: np.random.Generator, *, samples: int, length: int) -> dict[str, np.ndarray]:
    """Inputs of the text encoder: every other text is shorter and padded."""
    seen = np.ones((samples, length), np.float32)
    seen[::2, length - 3 :] = 0
    return {"ids": rng.integers(0, 8, (samples, length)), "seen": seen}


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
