"""Whether half of the dense time is met, by model, target, precision and batch.

Widths are chosen for the target (`scheduled`); a model of these widths is then raced against the
dense one once more. Half of an int8 model's time is asked for as the share of the float32 model's
that this is; how much of that limit is taken, and of the time of the dense model in int8, is told
by a race of all three. As in ``latency`` what is computed does not matter: pictures are noise,
weights are cut without repair. What a deadline costs in error is for ``deadlines`` to say.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.deadlines import ALLOWED, LIMIT, deadline_at
from benchmarks.latency import JUDGED_BATCH, TARGETS, exported, inputs_drawn, stored_for, typed
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.samples import drawn
from benchmarks.subjects import minilm_l6
from corp_onnx.allocation.deadline import against_dense, scheduled
from corp_onnx.allocation.probes import Probe, probe
from corp_onnx.blocks import Catalog, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.data.batching import Batch
from corp_onnx.deploy.records import Precision
from corp_onnx.graph.model import Model, load
from corp_onnx.latency.stopwatch import Lane
from corp_onnx.plan import DEFAULT_ALIGN
from corp_onnx.precision import Request
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.checks import Check

log = logging.getLogger(__name__)

MODELS: Mapping[str, tuple[int, ...]] = {
    "DeiT-T": (1, 8, 32),
    "DeiT-S": (1, 8),
    "DeiT-B": (1, 8),
    "DINOv2 ViT-S": (1, 8),
    "MiniLM-L6": (1, 8, 32),
}
"""Batches by model, as far as a table of times takes minutes, not hours; in float32. Other
precisions are tried at `JUDGED_BATCH`."""

BATCHES, TEXTS = 8, 1024
"""Batches of noise, or glosses, to calibrate on: drawn texts would repeat one word."""


def measure(place: Place) -> Outcome:
    """The time that was found, for one model on every target at every batch."""
    name = place.model
    bench = _Bench.of(*_known(place, name))
    rows: list[Row] = []
    for target, precision, batch in _cases(MODELS[name], quick=place.quick):
        label = {"model": name, "target": target, "precision": precision, "batch": batch}
        log.info("%s", label)
        rows.append(label | bench.row(target, precision, batch))
        log.info("%s", rows[-1])
    return Outcome({"half of the time": rows}, tuple(_checks(rows)), {"limit": LIMIT})


def _cases(batches: Sequence[int], *, quick: bool) -> Iterator[tuple[str, Precision, int]]:
    for target, precisions in TARGETS.items():
        for precision in precisions:
            some = batches if precision == "fp32" else (JUDGED_BATCH,)
            for batch in some[: 1 if quick else None]:
                yield target, precision, batch


@dataclass(frozen=True, slots=True, eq=False)
class _Bench:
    """A model, some inputs, and what every axis is worth."""

    model: Model
    catalog: Catalog
    inputs: Sequence[Batch]
    statistics: Statistics
    probes: tuple[Probe, ...]

    @staticmethod
    def of(model: Model, inputs: list[Batch]) -> _Bench:
        catalog = find_blocks(model)
        statistics = gather(model, catalog, inputs)
        best = Recipe("best")
        probes = probe(model, catalog, statistics, inputs[:1], best, align=DEFAULT_ALIGN)
        return _Bench(model, catalog, inputs, statistics, probes)

    def row(self, target: str, precision: Precision, batch: int) -> Row:
        """What was found, and how."""

        def stored(model: Model) -> Model:
            return typed(model, stored_for(target, precision), self.inputs[:2])

        dense = stored(self.model)
        with TemporaryDirectory() as folder:
            deadline = deadline_at(self.model, target, batch, Path(folder))
            if precision != "fp32":
                alone = against_dense(self.model, dense, deadline, precision)
                deadline = replace(deadline, limit=LIMIT / alone.speedups[1].ratio)
            schedule = scheduled(
                *(self.model, self.model, self.catalog, self.statistics, self.probes, deadline),
                align=DEFAULT_ALIGN,
                request=Request(precision),
                typed=stored,
            )
        bare = solve(self.model, self.catalog, schedule.plan, self.statistics, Recipe("none"))
        done = operate(self.model, self.catalog, bare)
        target, small = deadline.target, stored(done.model)
        whole, *alike, last = deadline.stopwatch.race(
            [
                Lane(self.model, target),
                *([Lane(dense, target, precision)] if precision != "fp32" else []),
                Lane(small, target, precision),
            ]
        ).speedups
        share = whole.ratio / last.ratio
        return {
            "time": (alike[0].ratio if alike else whole.ratio) / last.ratio,
            "of the limit": share / deadline.limit,
            "MACs": done.pruned.total / done.dense.total,
            "tries": len(schedule.tries),
        }


def _known(place: Place, name: str) -> tuple[Model, list[Batch]]:
    """A model and some inputs."""
    if name == "MiniLM-L6":
        subject = minilm_l6(place, seed=0)
        return subject.model, list(drawn(subject.samples, TEXTS, 0)[0].batches(1, 0))
    found = exported(place, name)
    model = load(found) if isinstance(found, Path) else found
    return model, inputs_drawn(model, BATCHES)


def _checks(rows: list[Row]) -> Iterator[Check]:
    for row in rows:
        name = "{model} on {target}, {precision}, batch {batch}".format(**row)
        met = row["of the limit"] <= 1 + ALLOWED
        found = f"{row['of the limit']:.3f} of the limit, {row['time']:.3f} of the time"
        yield Check(f"{name}: {LIMIT:g} of the time is met within {ALLOWED:.0%}", met, found)
