"""`export`: an ONNX file from a framework."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from corp_onnx.commands.records import Answer, Progress
from corp_onnx.export import export


@dataclass(frozen=True, slots=True)
class Export:
    """An ONNX file from a timm or transformers model, or from a script."""

    source: str
    output: Path
    checkpoint: Path | None
    random_weights: bool
    exporter: str
    opset: int | None

    def __call__(self, progress: Progress) -> Answer:
        """Export, check parity, write the preprocessing beside it."""
        record = export(
            self.source,
            self.output,
            checkpoint=self.checkpoint,
            random_weights=self.random_weights,
            exporter=self.exporter,
            opset=self.opset,
        )
        document = {key: _plain(value) for key, value in asdict(record).items()}
        lines = "\n".join(f"{key}: {value}" for key, value in document.items())
        return Answer(document, Text(lines))


def _plain(value: Any) -> Any:  # noqa: ANN401 (whatever a record holds)
    return str(value) if isinstance(value, Path) else value
