"""What a target is, what it builds, and how that is run: one protocol for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from corp_onnx.errors import DataError, GraphError
from corp_onnx.graph.inputs import InputSpec
from corp_onnx.graph.sizes import Sizes

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")

PROFILED_RUNS = 10

RECORD, LOG = "build.json", "build.log"
"""The record of a build, beside what was built, and what the builder said, if it says anything."""


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """Smallest, likeliest and largest dimensions of an input, as an optimisation profile has them.

    Raises:
        ValueError: If they are of different rank, or out of order.
    """

    smallest: tuple[int, ...]
    likeliest: tuple[int, ...]
    largest: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.smallest) == len(self.likeliest) == len(self.largest):
            raise ValueError(f"shapes of different rank: {self}")
        for low, middle, high in zip(self.smallest, self.likeliest, self.largest, strict=True):
            if not low <= middle <= high:
                raise ValueError(f"dimensions out of order: {self}")


@dataclass(frozen=True, slots=True)
class Build:
    """What a target made of a model.

    Attributes:
        target: Its name, as on the command line.
        precision: Of the model that it was made from, whose types say so.
        path: The engine: a file, or for some targets the first of several in its folder.
        seconds: The build took.
        size_bytes: Of all files of the engine.
        versions: Of everything that took part, by name.
        options: What the target was asked for.
    """

    target: str
    precision: Precision
    path: Path
    seconds: float
    size_bytes: int
    versions: Mapping[str, str]
    options: Mapping[str, Any]

    def write(self) -> Path:
        """Keep the record beside the engine; a second build into the folder replaces it."""
        record = self.path.parent / RECORD
        document = asdict(self) | {"path": self.path.name}
        record.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        return record

    @staticmethod
    def read(folder: Path) -> Build:
        """The record in a folder.

        Raises:
            DataError: If there is none, or it is no such record.
        """
        record = folder / RECORD
        try:
            document = json.loads(record.read_text())
            return Build(**document | {"path": folder / document["path"]})
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} is not a file, and as a folder it holds no engine (no {RECORD}); make "
                "one with `corp-onnx build`"
            ) from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{record} is no record of a build: {error}; build the engine again"
            ) from error


def options_of(target: DataclassInstance) -> dict[str, Any]:
    """The options of a target as JSON has them; its name stands elsewhere."""
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(target).items()
        if key != "name"
    }


def without_weights(model: Path) -> onnx.ModelProto:
    """A model file without the weights beside it: what can be known of it before it is built.

    Raises:
        GraphError: If it cannot be read.
    """
    try:
        return onnx.load(model, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise GraphError(f"{model} cannot be read as an ONNX model: {error}") from error


def declared_inputs(model: onnx.ModelProto) -> Mapping[str, tuple[int | None, ...]]:
    """Dimensions of inputs as the file declares them; None for one that may vary."""
    weights = {tensor.name for tensor in model.graph.initializer}  # inputs too before IR version 4
    return {
        value.name: tuple(dim.dim_value or None for dim in value.type.tensor_type.shape.dim)
        for value in model.graph.input
        if value.name not in weights
    }


class Engine(Protocol):
    """A model that is loaded on a target and can be run until it is closed."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """Names, types and shapes of what it reads; None where a dimension may vary."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what it gives."""

    @property
    def device_ms(self) -> float | None:
        """Time of the last run on the device alone; None where the target does not tell."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference, from arrays of the host to arrays of the host.

        Raises:
            DataError: If an input is missing or does not fit.
        """

    def operator_times(
        self, feeds: Mapping[str, np.ndarray], *, runs: int = PROFILED_RUNS
    ) -> Mapping[str, float]:
        """Milliseconds of one inference by kind of operator, or by layer; empty if not told.

        Timed one by one, so that all together they take longer than an inference does.
        """

    def close(self) -> None:
        """Give back what it holds; it cannot run after that."""


class Target(Protocol):
    """Where a model is to run. Its options are fields of its own."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def inference_threads(self) -> int | None:
        """Of the processor, as asked for; 0 leaves them to the runtime, None if it has none."""

    def versions(self) -> Mapping[str, str]:
        """Of everything that has a part in how fast an engine is, by name."""

    def rounds_by_itself(self, precision: Precision) -> bool:
        """Whether it takes a float32 model for this precision, and rounds it when it loads it."""

    def require(self, precision: Precision) -> None:
        """See whether the target is here, and can run a model of these types.

        Raises:
            BackendUnavailable: If a package, library or device is missing; says how to get it.
            PlanError: If it cannot compute in this precision; says what it can.
        """

    def sized(self, sizes: Sizes) -> Target:
        """The same, ready to build for inputs of these sizes where none were asked for."""

    def build(self, model: Path, folder: Path, precision: Precision) -> Build:
        """Make an engine, in a folder that exists, of an ONNX file in the types of a precision.

        Raises:
            GraphError: If the target cannot take the model, with all that its parser says.
            PlanError: If its options do not fit the model.
        """

    def load(self, build: Build) -> Engine:
        """Get an engine ready to run.

        Raises:
            GraphError: If it cannot be loaded here, as when another version built it.
        """
