"""`build`: an engine for one target."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.text import Text

from corp_onnx.commands.records import Answer, Progress
from corp_onnx.deploy.records import Precision, Target
from corp_onnx.errors import OutputError
from corp_onnx.timing import readable


@dataclass(frozen=True, slots=True)
class Build:
    """A model made ready for one target."""

    model: Path
    folder: Path
    target: Target
    precision: Precision

    def __call__(self, progress: Progress) -> Answer:
        """Build the engine, and keep its record beside it."""
        self.target.require(self.precision)
        readable(self.model)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make the folder {self.folder}: {error.strerror or error}"
            ) from error
        built = self.target.build(self.model, self.folder, self.precision)
        progress(1, "engines")
        text = (
            f"{built.path} for {built.target} in {built.precision}: "
            f"{built.size_bytes / 1e6:.1f} MB in {built.seconds:.1f} s\n"
            f"time it with `corp-onnx bench {self.folder} --target {built.target}`"
        )
        return Answer(asdict(built) | {"path": str(built.path)}, Text(text))
