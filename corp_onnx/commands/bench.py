"""`bench`: latency of several models, on several targets, in several precisions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from corp_onnx.commands.records import Answer, Progress, Source
from corp_onnx.commands.typist import Typist
from corp_onnx.deploy.records import Precision, Target
from corp_onnx.errors import PlanError
from corp_onnx.files import require_writable
from corp_onnx.latency import conditions
from corp_onnx.latency.footprint import footprint
from corp_onnx.latency.race import Race
from corp_onnx.latency.stopwatch import Lane, Stopwatch
from corp_onnx.report import timetable
from corp_onnx.report.page import Json
from corp_onnx.report.plot import bars
from corp_onnx.session import Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bench:
    """Latency of models on targets, measured turn by turn."""

    models: tuple[Path, ...]
    targets: tuple[Target, ...]
    precisions: tuple[Precision, ...]
    batches: tuple[int, ...]
    """Samples of one inference; without any, as the first model has them."""
    stopwatch: Stopwatch
    source: Source | None = None
    """Inputs for models in other precisions."""
    profile: bool = False
    """Whether to tell where the time goes, at the first batch."""
    memory: bool = False
    """Whether to tell how much memory each engine takes, likewise."""
    plot: Path | None = None
    """Where a picture of the times goes."""
    runtime: Runtime | None = None
    """How models are run to bring them into other precisions."""

    def __call__(self, progress: Progress) -> Answer:
        """One race of all engines at every batch; each is held against the first."""
        able = self._able()
        if self.plot is not None:
            require_writable(self.plot, self.models)
        names, lanes = self._lanes(able, progress)
        batches = self.batches or (Stopwatch.of(lanes[0].reads(), self.stopwatch.sizes).batch,)
        labels = [[_label(*each, b) for each in zip(names, lanes, strict=True)] for b in batches]
        document = self._raced(labels, lanes, batches, progress)
        if self.plot is not None:
            bars(document["runs"], self.plot)
        self._look_into(document, labels[0], lanes, batches[0])
        return Answer(document, timetable.race_table(document))

    def _raced(
        self,
        labels: Sequence[Sequence[timetable.Label]],
        lanes: Sequence[Lane],
        batches: Sequence[int],
        progress: Progress,
    ) -> Json:
        """The races, with the machine before the first and at the end of the last."""
        machine = [conditions.read()]
        races: list[Race] = []
        for batch in batches:
            watch = replace(self.stopwatch, batch=batch)
            races.append(watch.race(lanes, on_end=lambda: machine.append(conditions.glance())))
            progress(len(lanes), "engines")
        setups = [_setup(lane) for lane in lanes]
        return timetable.race_json(
            labels, races, setups=setups, before=machine[0], after=machine[-1]
        )

    def _look_into(
        self,
        document: Json,
        labels: Sequence[timetable.Label],
        lanes: Sequence[Lane],
        batch: int,
    ) -> None:
        """Add where time and memory go, where that is asked for."""
        watch = replace(self.stopwatch, batch=batch).beside(lanes)
        if self.memory:
            document["memory"] = [
                {**label, **asdict(footprint(lane, watch))}
                for label, lane in zip(labels, lanes, strict=True)
            ]
        if self.profile:
            profiles = zip(labels, watch.operator_times(lanes), strict=True)
            document["profiles"] = [{**label, "operators_ms": times} for label, times in profiles]

    def _able(self) -> Sequence[tuple[Target, Precision]]:
        """Every target with every precision that it has.

        Raises:
            PlanError: If no target has one of the precisions, or one has none of them.
        """
        able: list[tuple[Target, Precision]] = []
        lacking: list[tuple[Target, Precision, PlanError]] = []
        for target in self.targets:
            for precision in self.precisions:
                try:
                    target.require(precision)
                    able.append((target, precision))
                except PlanError as error:
                    lacking.append((target, precision, error))
        targets, precisions = [one for one, _ in able], [one for _, one in able]
        for target, precision, reason in lacking:
            if target not in targets or precision not in precisions:
                raise reason
            log.warning("left out: %s", reason)
        return able

    def _lanes(
        self, able: Sequence[tuple[Target, Precision]], progress: Progress
    ) -> tuple[list[str], list[Lane]]:
        """The names of all models, and where and in which types each of them runs."""
        typist = Typist(
            self.source, only_timed=True, sizes=self.stopwatch.sizes, runtime=self.runtime
        )
        names, lanes = [], []
        for target, precision in able:
            for model in self.models:
                names.append(str(model))
                lanes.append(Lane(typist.typed(model, target, precision), target, precision))
                progress(1, "models")
        return names, lanes


def _label(name: str, lane: Lane, batch: int) -> timetable.Label:
    return timetable.label(name, lane.target.name, lane.precision, batch)


def _setup(lane: Lane) -> timetable.Setup:
    return timetable.Setup(lane.target.inference_threads, lane.target.versions())
