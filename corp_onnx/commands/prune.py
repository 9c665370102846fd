"""`prune`: a smaller model, with evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from corp_onnx.allocation.budget import Budget
from corp_onnx.allocation.deadline import Deadline
from corp_onnx.blocks import Axis
from corp_onnx.commands.records import Answer, Progress, Source, opener, telling
from corp_onnx.data.preprocessing import Preprocessing, keep_beside
from corp_onnx.files import require_writable
from corp_onnx.pipeline import Settings, prune
from corp_onnx.report.results import pruned_json, pruned_table
from corp_onnx.work import Knowledge


@dataclass(frozen=True, slots=True)
class Prune:
    """The main job: a smaller model, with evidence."""

    model: Path
    output: Path
    source: Source | None
    """Inputs to calibrate on; None takes the statistics."""
    statistics: Path | None
    widths: Mapping[Axis, float] | Budget | Deadline
    settings: Settings

    def __call__(self, progress: Progress) -> Answer:
        """Cut, repair, verify, write."""
        given, recipe = self.settings, Preprocessing.beside(self.model)
        knowledge: Knowledge | None = self.statistics
        if self.source is not None:
            require_writable(self.output, self.source.files())
            knowledge = opener(self.source, self.model, given.runtime)
        assert knowledge is not None, "there are data or statistics"
        result = prune(
            self.model,
            self.output,
            knowledge,
            shares_removed=self.widths if isinstance(self.widths, Mapping) else {},
            budget=None if isinstance(self.widths, Mapping) else self.widths,
            settings=telling(given, progress),
        )
        keep_beside(recipe, self.output)
        return Answer(
            pruned_json(result, str(self.output)),
            pruned_table(result, str(self.output)),
            0 if result.passed else 1,
        )
