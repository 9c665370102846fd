"""`bench` on times that `trtexec` measured elsewhere, as on a Jetson."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from corp_onnx.commands.records import Answer, Progress
from corp_onnx.deploy.records import Precision
from corp_onnx.errors import PlanError
from corp_onnx.files import require_writable
from corp_onnx.latency.race import unpaired
from corp_onnx.latency.trtexec import read_times
from corp_onnx.report import timetable
from corp_onnx.report.plot import bars

SUFFIX, MEASURED_BY = ".json", "trtexec"


@dataclass(frozen=True, slots=True)
class Imported:
    """Latency of engines from files of ``trtexec --exportTimes``; nothing is run."""

    files: tuple[Path, ...]
    precision: Precision | None
    batch: int
    """Both as they were measured: the files do not say."""
    seed: int = 0
    plot: Path | None = None

    def __call__(self, progress: Progress) -> Answer:
        """Each is held against the first; they were not timed in turn, so medians are compared."""
        if self.plot is not None:
            require_writable(self.plot, self.files)
        times = [read_times(path) for path in self.files]
        race = unpaired(
            [each.latency_ms for each in times], [each.device_ms for each in times], seed=self.seed
        )
        labels = [
            timetable.label(str(path), MEASURED_BY, self.precision, self.batch)
            for path in self.files
        ]
        setups = [timetable.Setup()] * len(labels)
        document = timetable.race_json([labels], [race], setups=setups)
        if self.plot is not None:
            bars(document["runs"], self.plot)
        return Answer(document, timetable.race_table(document))


def are_times(paths: tuple[Path, ...]) -> bool:
    """Whether what is to be timed was timed already.

    Raises:
        PlanError: If some of it was.
    """
    found = [path.suffix == SUFFIX for path in paths]
    if any(found) and not all(found):
        raise PlanError(
            "times that trtexec exported (.json) were measured elsewhere and cannot race with "
            "models that are timed here; give files of one kind"
        )
    return all(found)
