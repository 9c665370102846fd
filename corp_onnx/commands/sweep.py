"""`sweep`: how far to go, from one calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from corp_onnx.allocation.budget import Budget
from corp_onnx.commands.records import Answer, Progress, Source, opener, telling
from corp_onnx.data.preprocessing import Preprocessing, keep_beside
from corp_onnx.deploy.records import Target
from corp_onnx.files import made, whole
from corp_onnx.graph.model import described
from corp_onnx.latency.race import Race
from corp_onnx.latency.stopwatch import Lane, Stopwatch
from corp_onnx.pipeline import Settings, sweep
from corp_onnx.report import points
from corp_onnx.report.page import as_json
from corp_onnx.report.plot import curve


@dataclass(frozen=True, slots=True)
class Sweep:
    """Error, MACs and latency over several budgets."""

    model: Path
    folder: Path
    source: Source
    budgets: tuple[Budget, ...]
    settings: Settings
    target: Target
    """Where the models are timed."""

    def __call__(self, progress: Progress) -> Answer:
        """Calibrate once; cut, verify and time every budget; write models, table and plot."""
        self.target.require("fp32")
        recipe = Preprocessing.beside(self.model)
        watch = Stopwatch.of(described(self.model), self.settings.sizes)
        made(self.folder)
        outputs = {self._output(budget): budget for budget in self.budgets}
        found = sweep(
            self.model,
            outputs,
            opener(self.source, self.model, self.settings.runtime),
            settings=telling(self.settings, progress),
        )
        for output in found:
            keep_beside(recipe, output)
        document = points.sweep_json(self.model, outputs, found, self._raced(list(found), watch))
        with whole(self.folder / "sweep.json") as draft:
            draft.write_text(as_json(document) + "\n", encoding="utf-8")
        curve(document["points"], self.folder / "sweep.png")
        passed = document["chosen"] is not None
        return Answer(document, points.sweep_table(document, self.folder), 0 if passed else 1)

    def _output(self, budget: Budget) -> Path:
        percent = f"{100 * budget.kept:.10g}".replace(".", "_")
        return self.folder / f"{self.model.stem}_{budget.unit}{percent}.onnx"

    def _raced(self, paths: list[Path], watch: Stopwatch) -> Race:
        """The dense model and all others, timed turn by turn."""
        return watch.race([Lane(path, self.target) for path in (self.model, *paths)])
