"""`build`: an engine for one target."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.text import Text

from corp_onnx.commands.records import Answer, Progress, Source
from corp_onnx.commands.typist import Typist
from corp_onnx.deploy.records import LOG, RECORD, Precision, Target
from corp_onnx.errors import OutputError
from corp_onnx.files import require_makeable, whole_folder
from corp_onnx.graph.model import Model, described, write
from corp_onnx.session import Runtime


@dataclass(frozen=True, slots=True)
class Build:
    """A model made ready for one target."""

    model: Path
    folder: Path
    target: Target
    precision: Precision
    source: Source | None = None
    """Inputs to bring the model into the precision with."""
    runtime: Runtime | None = None
    """How it is run for that."""

    def __call__(self, progress: Progress) -> Answer:
        """Build the engine, and keep its record beside it."""
        self.target.require(self.precision)
        described(self.model)
        self._require_nothing_lost()
        require_makeable(self.folder)
        typist = Typist(self.source, runtime=self.runtime)
        typed = typist.typed(self.model, self.target, self.precision)
        with tempfile.TemporaryDirectory(prefix="corp_onnx.") as folder:
            path = self.model
            if isinstance(typed, Model):
                path = Path(folder) / self.model.name
                write(typed.proto(), path)
            with whole_folder(self.folder, log=LOG, last=RECORD) as draft:
                built = self.target.build(path, draft, self.precision)
        built = replace(built, path=self.folder / built.path.name)
        progress(1, "engines")
        text = (
            f"{built.path} for {built.target} in {built.precision}: "
            f"{built.size_bytes / 1e6:.1f} MB in {built.seconds:.1f} s\n"
            f"time it with `corp-onnx bench {self.folder} --target {built.target} --precision "
            f"{built.precision}`"
        )
        return Answer(asdict(built) | {"path": str(built.path)}, Text(text))

    def _require_nothing_lost(self) -> None:
        """A folder of its own: what lies there already may bear the names of an engine's files."""
        folder = self.folder
        beside = folder.resolve() == self.model.resolve().parent
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        others = names - {LOG} and RECORD not in names
        if beside or others:
            raise OutputError(
                f"{folder} holds {'the model itself' if beside else 'files that are no engine'}, "
                "which those of an engine may replace; name a folder that is new, or an engine's, "
                "with -o"
            )
