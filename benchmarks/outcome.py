"""What a benchmark is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corp_onnx.errors import DataError
from corp_onnx.verify.checks import Check

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where real models and data lie, where exports are kept, and how much is measured.

    Attributes:
        assets: Models and data.
        exports: Models that torch wrote.
        quick: Whether a glance is enough.
        only: The model to measure, of those that a benchmark offers; None for all of them.
        seeds: How many draws of calibration samples; None for what a benchmark takes by default.
        first: The seed of the first of these draws.
    """

    assets: Path
    exports: Path
    quick: bool = False
    only: str | None = None
    seeds: int | None = None
    first: int = 0

    @property
    def model(self) -> str:
        """The model to measure, where a benchmark measures each by itself."""
        assert self.only is not None, "one is named"
        return self.only

    def asset(self, name: str) -> Path:
        """A file or folder among the assets.

        Raises:
            DataError: If it is not there.
        """
        path = self.assets / name
        if not path.exists():
            raise DataError(
                f"{path} is missing; fetch the real models and data with "
                f"`python -m tools.fetch_assets {self.assets}`, or name their folder with --assets"
            )
        return path


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows by table, what they were held against, and how they were measured."""

    tables: Mapping[str, list[Row]]
    checks: tuple[Check, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether all checks hold."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A measurement, in words, with the optional packages that it uses."""

    measure: Callable[[Place], Outcome]
    about: str
    packages: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    """What ``--only`` may name."""
    apart: bool = False
    """Whether every model is measured by itself, and has a file of its own."""
    on_gpu: bool = False
    """Whether it needs an NVIDIA GPU, or what only one makes in time."""
