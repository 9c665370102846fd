"""What TensorRT is asked for, as it goes from one process to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from corp_onnx.deploy.records import ShapeRange
from corp_onnx.errors import PlanError
from corp_onnx.files import made, require_writable

Verbosity = Literal["none", "names", "detailed"]
"""How much an engine can tell of its layers."""

HIGHEST_LEVEL = 5

ENGINE, LAYERS = "model.engine", "layers.json"
"""The engine in its folder, and what TensorRT says of its layers."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the builder is asked for.

    Attributes:
        shapes: Of inputs with dimensions that vary; of others they may be left out.
        workspace_bytes: Memory that a kernel may take beside weights and activations; None leaves
            it to TensorRT, which takes all there is.
        optimization_level: How long the builder searches, 0 to 5.
        timing_cache: File of kernel times, read if it is there and written anew.
        refit: Whether the weights of the engine can be changed later.
        version_compatible: Whether later versions of TensorRT can run the engine.
        tf32: Whether float32 products may be rounded to TF32, as TensorRT does by default.
        verbosity: How much the engine can tell of its layers.
        threads: Of the builder; 0 leaves it to TensorRT.
    """

    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    workspace_bytes: int | None = None
    optimization_level: int = 3
    timing_cache: Path | None = None
    refit: bool = False
    version_compatible: bool = False
    tf32: bool = True
    verbosity: Verbosity = "detailed"
    threads: int = 0

    def check(self) -> None:
        """See whether they make sense.

        Raises:
            PlanError: If not.
            OutputError: If the timing cache cannot be written.
        """
        if self.timing_cache is not None:
            require_writable(made(self.timing_cache.parent) / self.timing_cache.name)
        if not 0 <= self.optimization_level <= HIGHEST_LEVEL:
            raise PlanError(
                f"{self.optimization_level} is no optimisation level of TensorRT; they go from 0, "
                f"fast to build, to {HIGHEST_LEVEL}, fast to run"
            )
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise PlanError(f"a workspace of {self.workspace_bytes} bytes holds nothing")

    def document(self) -> dict[str, Any]:
        """The options as JSON has them, those of a target too, but for its name."""
        known = {key: value for key, value in asdict(self).items() if key != "name"}
        known["shapes"] = {
            name: {extent: list(dims) for extent, dims in given.items()}
            for name, given in known["shapes"].items()
        }
        if self.timing_cache is not None:
            known["timing_cache"] = str(self.timing_cache)
        return known

    @staticmethod
    def read(document: Mapping[str, Any]) -> Options:
        """The options again, from `document`; what else it holds is left out."""
        known = {each.name: document[each.name] for each in fields(Options)}
        known["shapes"] = {
            name: ShapeRange(**{extent: tuple(dims) for extent, dims in given.items()})
            for name, given in known["shapes"].items()
        }
        if known["timing_cache"] is not None:
            known["timing_cache"] = Path(known["timing_cache"])
        return Options(**known)
