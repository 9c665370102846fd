"""`bench`: latency of several models, on several targets, in several precisions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from corp_onnx import conditions, timetable
from corp_onnx.commands.records import Answer, Progress
from corp_onnx.deploy.records import Precision, Target
from corp_onnx.timing import Lane, Stopwatch


@dataclass(frozen=True, slots=True)
class Bench:
    """Latency of models on targets, measured turn by turn."""

    models: tuple[Path, ...]
    targets: tuple[Target, ...]
    precisions: tuple[Precision, ...]
    batches: tuple[int, ...]
    stopwatch: Stopwatch

    def __call__(self, progress: Progress) -> Answer:
        """One race of all engines at every batch; each is held against the first."""
        for target in self.targets:
            for precision in self.precisions:
                target.require(precision)
        lanes = [
            Lane(model, target, precision)
            for target in self.targets
            for precision in self.precisions
            for model in self.models
        ]
        machine = conditions.read()
        races, labels = [], []
        for batch in self.batches:
            races.append(replace(self.stopwatch, batch=batch).race(lanes))
            labels.append([_label(lane, batch) for lane in lanes])
            progress(len(lanes), "engines")
        document = timetable.race_json(labels, races, machine)
        return Answer(document, timetable.race_table(document))


def _label(lane: Lane, batch: int) -> timetable.Label:
    names = (str(lane.model), lane.target.name, lane.precision, batch)
    return dict(zip(timetable.LABELS, names, strict=True))
