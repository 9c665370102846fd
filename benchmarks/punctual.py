"""Whether half of the dense time is met, by model, target, precision, length and batch.

Widths are chosen for the target (`scheduled`); a model of these widths is then raced against the
dense one once more. Half of an int8 model's time is asked for as the share of the float32 model's
that this is; how much of that limit is taken, and of the time of the dense model in int8, as it is
and after the clean-up that every cut model gets, is told by a race of all of them. As in
``latency`` what is computed does not matter: pictures are noise, weights are cut without repair.
What a deadline costs in error is for ``deadlines`` to say.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from benchmarks.deadlines import ALLOWED, LIMIT, RUNS, deadline_at
from benchmarks.latency import TARGETS, TOKENS, exported, inputs_drawn, stored_for, typed
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.samples import drawn
from benchmarks.subjects import CUTS, minilm_l6
from corp_onnx.allocation.deadline import against_dense, scheduled
from corp_onnx.allocation.probes import Probe, probe
from corp_onnx.blocks import Catalog, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.data.batching import Batch
from corp_onnx.deploy.records import Precision
from corp_onnx.graph.model import Model, load
from corp_onnx.latency.stopwatch import Lane
from corp_onnx.plan import DEFAULT_ALIGN, Plan, uniform
from corp_onnx.precision import Request
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.checks import Check

log = logging.getLogger(__name__)

MODELS = tuple(
    f"{name}, {precision}"
    for name in ("DeiT-T", "DeiT-S", "DeiT-B", "DINOv2 ViT-S", "MiniLM-L6")
    for precision in ("fp32", "int8", "bf16")
)
TEXT_MODEL = "MiniLM-L6"
TURNS: Mapping[int, int] = {1: RUNS, 8: RUNS, 32: 7}
"""By batch: of many pictures every turn is long, and so less disturbed."""

BATCHES, TEXTS = 8, 1024
"""Batches of noise, or glosses, to calibrate on: drawn texts would repeat one word."""


def measure(place: Place) -> Outcome:
    """The time that was found, for one model in one precision at every size on every target."""
    name, precision = place.model.split(", ")
    bench = _Bench.of(*_known(place, name))
    rows: list[Row] = []
    for target, tokens, batch in _cases(name, precision, quick=place.quick):
        label = {"model": name, "target": target, "precision": precision}
        label |= {"tokens": tokens, "batch": batch}
        log.info("%s", label)
        rows.append(label | bench.row(target, cast("Precision", precision), batch, tokens))
        log.info("%s", rows[-1])
    return Outcome({"half of the time": rows}, tuple(_checks(rows)), {"limit": LIMIT})


def _cases(name: str, precision: str, *, quick: bool) -> Iterator[tuple[str, int | None, int]]:
    """Target, tokens of a text, and batch."""
    lengths = TOKENS if name == TEXT_MODEL else (None,)
    for target, precisions in TARGETS.items():
        if precision in precisions:
            sizes = [(tokens, batch) for tokens in lengths for batch in TURNS]
            for tokens, batch in sizes[: 1 if quick else None]:
                yield target, tokens, batch


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

    def row(self, target: str, precision: Precision, batch: int, tokens: int | None) -> Row:
        """What was found, and how."""

        def stored(model: Model) -> Model:
            return typed(model, stored_for(target, precision), self.inputs[:2])

        dense = stored(self.model)
        with TemporaryDirectory() as folder:
            deadline = deadline_at(
                *(self.model, target, batch, Path(folder)), tokens=tokens or 0, runs=TURNS[batch]
            )
            if precision != "fp32":
                alone = against_dense(self.model, dense, deadline, precision)
                deadline = replace(deadline, limit=LIMIT / alone.speedups[1].ratio)
            schedule = scheduled(
                *(self.model, self.model, self.catalog, self.statistics, self.probes, deadline),
                align=DEFAULT_ALIGN,
                request=Request(precision),
                typed=stored,
            )
        whole_plan = uniform(self.catalog, dict.fromkeys(CUTS["all three"], 0.0))
        (cleaned, _), (small, macs) = self._cut(whole_plan), self._cut(schedule.plan)
        lanes = [
            Lane(self.model, deadline.target),
            Lane(dense, deadline.target, precision),
            Lane(stored(cleaned), deadline.target, precision),
            Lane(stored(small), deadline.target, precision),
        ]
        whole, alike, clean, last = deadline.stopwatch.race(lanes).speedups
        share = whole.ratio / last.ratio
        return {
            "time": alike.ratio / last.ratio,
            "of the cleaned": clean.ratio / last.ratio,
            "of the limit": share / deadline.limit,
            "MACs": macs,
            "tries": len(schedule.tries),
            "measured": " ".join(f"{one.measured / schedule.limit:.2f}" for one in schedule.tries),
        }

    def _cut(self, plan: Plan) -> tuple[Model, float]:
        """As fast as the plan is, and the share of the multiply-adds that it leaves."""
        bare = solve(self.model, self.catalog, plan, self.statistics, Recipe("none"))
        done = operate(self.model, self.catalog, bare)
        return done.model, done.pruned.total / done.dense.total


def _known(place: Place, name: str) -> tuple[Model, list[Batch]]:
    """A model and some inputs."""
    if name == TEXT_MODEL:
        subject = minilm_l6(place, seed=0)
        return subject.model, list(drawn(subject.samples, TEXTS, 0)[0].batches(1, 0))
    found = exported(place, name)
    model = load(found) if isinstance(found, Path) else found
    return model, inputs_drawn(model, BATCHES)


def _checks(rows: list[Row]) -> Iterator[Check]:
    for row in rows:
        name = "{model} on {target}, {precision}, batch {batch}".format(**row)
        name += f", {row['tokens']} tokens" if row["tokens"] else ""
        met = row["of the limit"] <= 1 + ALLOWED
        found = f"{row['of the limit']:.3f} of the limit, {row['time']:.3f} of the time"
        yield Check(f"{name}: {LIMIT:g} of the time is met within {ALLOWED:.0%}", met, found)
