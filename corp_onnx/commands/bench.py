"""`bench`: latency of several models, on several targets, in several precisions."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from corp_onnx import conditions, timetable
from corp_onnx.commands.records import Answer, Progress, Source
from corp_onnx.commands.typed import Typist
from corp_onnx.deploy.records import Precision, Target
from corp_onnx.footprint import footprint
from corp_onnx.graph import require_writable
from corp_onnx.plot import bars
from corp_onnx.timing import Lane, Stopwatch


@dataclass(frozen=True, slots=True)
class Bench:
    """Latency of models on targets, measured turn by turn."""

    models: tuple[Path, ...]
    targets: tuple[Target, ...]
    precisions: tuple[Precision, ...]
    batches: tuple[int, ...]
    stopwatch: Stopwatch
    source: Source | None = None
    """Inputs for models in other precisions."""
    profile: bool = False
    """Whether to tell where the time goes, at the first batch."""
    memory: bool = False
    """Whether to tell how much memory each engine takes, likewise."""
    plot: Path | None = None
    """Where a picture of the times goes."""

    def __call__(self, progress: Progress) -> Answer:
        """One race of all engines at every batch; each is held against the first."""
        for target in self.targets:
            for precision in self.precisions:
                target.require(precision)
        if self.plot is not None:
            require_writable(self.plot)
        names, lanes = self._lanes(progress)
        machine = conditions.read()
        races, labels = [], []
        for batch in self.batches:
            races.append(replace(self.stopwatch, batch=batch).race(lanes))
            labels.append([_label(*each, batch) for each in zip(names, lanes, strict=True)])
            progress(len(lanes), "engines")
        document = timetable.race_json(labels, races, machine)
        if self.plot is not None:
            bars(document["runs"], self.plot)
        watch = replace(self.stopwatch, batch=self.batches[0]).beside(lanes)
        if self.memory:
            document["memory"] = [
                {**label, **asdict(footprint(lane, watch))}
                for label, lane in zip(labels[0], lanes, strict=True)
            ]
        if self.profile:
            profiles = zip(labels[0], watch.operator_times(lanes), strict=True)
            document["profiles"] = [{**label, "operators_ms": times} for label, times in profiles]
        return Answer(document, timetable.race_table(document))

    def _lanes(self, progress: Progress) -> tuple[list[str], list[Lane]]:
        """The names of all models, and where and in which types each of them runs."""
        typist = Typist(self.source, only_timed=True, sizes=self.stopwatch.sizes)
        names, lanes = [], []
        for target in self.targets:
            for precision in self.precisions:
                for model in self.models:
                    names.append(str(model))
                    typed = typist.typed(model, target, precision)
                    lanes.append(Lane(typed, target, precision))
                    progress(1, "models")
        return names, lanes


def _label(name: str, lane: Lane, batch: int) -> timetable.Label:
    return timetable.label(name, lane.target.name, lane.precision, batch)
