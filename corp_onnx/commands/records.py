"""What every command needs and gives: inputs, progress, an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import RenderableType

from corp_onnx.data.dataset import Dataset, open_data
from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.graph.model import Model
from corp_onnx.graph.sizes import Sizes
from corp_onnx.pipeline import Settings
from corp_onnx.session import Runtime, Session, open_session


class Progress(Protocol):
    """Told how much more is done, in samples or in blocks."""

    def __call__(self, done: int, unit: str = "samples", /) -> None:
        """So many more of a unit."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command gives back: a JSON document, the same for people, and an exit status."""

    document: dict[str, Any]
    table: RenderableType
    status: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """Where inputs come from and how many are taken."""

    data: str
    samples: int | None = None
    seed: int = 0
    allow_random: bool = False
    sizes: Sizes = field(default_factory=dict)
    """Of random inputs, where the model leaves them open."""

    def files(self) -> tuple[Path, ...]:
        """What is read, if it is a file."""
        return (Path(self.data),)

    def open(self, model_path: Path, session: Session) -> Dataset:
        """The samples, fitted to a model's inputs, preprocessed as the file beside it says."""
        return open_data(
            self.data,
            session.inputs,
            preprocessing=Preprocessing.beside(model_path),
            samples=self.samples,
            seed=self.seed,
            allow_random=self.allow_random,
            sizes=self.sizes,
        )


def opener(source: Source, path: Path, runtime: Runtime | None) -> Callable[[Model], Dataset]:
    """Opens a source for the model of a file, once its blocks are known."""
    return lambda model: source.open(path, open_session(model, runtime))


def telling(settings: Settings, progress: Progress) -> Settings:
    """The settings, with progress told."""
    return replace(
        settings,
        on_batch=progress,
        on_block=lambda _: progress(1, "blocks"),
        on_variant=lambda variants: progress(variants, "variants timed"),
    )
