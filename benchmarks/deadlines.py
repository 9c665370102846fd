"""Half of the dense latency: widths chosen by error and time together, or cut alike.

Both are fitted by ``best``; the uniform cut removes the same share of every axis, in multiples of
the default alignment, by bisection on the measured time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.methods import BEST, cut, solution
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.samples import drawn
from benchmarks.subjects import Subject, subjects
from corp_onnx.allocation.deadline import Deadline, against_dense, scheduled
from corp_onnx.allocation.probes import offered, probe
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.deploy.targets import open_target
from corp_onnx.graph.model import Model
from corp_onnx.latency.stopwatch import Stopwatch
from corp_onnx.plan import DEFAULT_ALIGN, Plan, uniform
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.checks import Check
from corp_onnx.work import PROBED

log = logging.getLogger(__name__)

MODELS = ("dinov2", "minilm-l6")
LIMIT, ALLOWED = 0.5, 0.05
TARGET, BATCH, TOKENS, RUNS = "ort-cpu", 8, 128, 20
SAMPLES: Mapping[str, int] = {"dinov2": 128, "minilm-l6": 1024}
STEPS = 5
"""Of the bisection over shares."""


def measure(place: Place) -> Outcome:
    """The latency that was asked for, and the error at it, in both ways."""
    rows: list[Row] = []
    checks: list[Check] = []
    widths: dict[str, object] = {}
    for name, subject in subjects(place, MODELS, {}, 1):
        few, _ = drawn(subject.samples, min(SAMPLES[name], subject.samples.count), subject.seed)
        found, chosen = _rows(subject.with_samples(few))
        rows += found
        widths[subject.title] = {f"{c.block}.{c.axis}": c.to for c in chosen.cuts}
        checks += _checks(subject.title, found)
    settings = {"limit": LIMIT, "batch": BATCH, "tokens": TOKENS, "samples": dict(SAMPLES)}
    return Outcome({"half of the latency": rows}, tuple(checks), settings | {"widths": widths})


def _rows(subject: Subject) -> tuple[list[Row], Plan]:
    statistics = subject.statistics()
    every = offered(subject.catalog)
    few, _ = drawn(subject.samples, PROBED, subject.seed)
    model, catalog = subject.model, subject.catalog
    probes = probe(
        *(model, catalog, statistics, few.batches(1, 0), Recipe("best")), align=DEFAULT_ALIGN
    )
    with TemporaryDirectory() as folder:
        deadline = deadline_at(model, TARGET, BATCH, Path(folder))
        schedule = scheduled(
            *(model, model, catalog, statistics, probes, deadline), align=DEFAULT_ALIGN
        )
    log.info("tries: %s", schedule.tries)

    def alike(share: float) -> Plan:
        return uniform(catalog, dict.fromkeys(every, share))

    low, high = 0.0, 1.0 - 1e-6
    for _ in range(STEPS):
        middle = (low + high) / 2
        share = _share(subject, _bare(subject, alike(middle), statistics))
        log.info("uniform %.3f removed: %.3f of the time", middle, share)
        low, high = (low, middle) if share <= LIMIT else (middle, high)
    plans = {"by error and time": schedule.plan, "uniform": alike(high)}
    rows = []
    for kind, plan in plans.items():
        smaller = cut(subject, solution(subject, plan, BEST, statistics))
        time = {"time": _share(subject, smaller)}
        rows.append({"model": subject.title, "widths": kind} | time | subject.measured(smaller))
        log.info("%s", rows[-1])
    return rows, schedule.plan


def deadline_at(
    model: Model,
    target: str,
    batch: int,
    cache: Path | None = None,
    *,
    tokens: int = TOKENS,
    runs: int = RUNS,
) -> Deadline:
    """Half of the time on a target, texts being of so many tokens."""
    texts = [tensor.name for tensor in model.graph.inputs if len(tensor.shape) == 2]
    watch = Stopwatch(batch, dict.fromkeys(texts, (batch, tokens)), warmup=3, runs=runs)
    return Deadline(LIMIT, False, open_target(target), watch, cache)


def _share(subject: Subject, model: Model) -> float:
    """Of the dense model's time."""
    deadline = deadline_at(subject.model, TARGET, BATCH)
    return 1.0 / against_dense(subject.model, model, deadline).speedups[1].ratio


def _bare(subject: Subject, plan: Plan, statistics: Statistics) -> Model:
    """As fast as the plan is; its values do not matter."""
    bare = solve(subject.model, subject.catalog, plan, statistics, Recipe("none"))
    return operate(subject.model, subject.catalog, bare).model


def _checks(title: str, rows: list[Row]) -> list[Check]:
    chosen, alike = rows
    return [
        Check(
            f"{title}: {LIMIT:g} of the time is met within {ALLOWED:.0%}",
            abs(chosen["time"] / LIMIT - 1) <= ALLOWED,
            f"{chosen['time']:.3f}",
        ),
        Check(
            f"{title}: with less error than cutting alike to the same time",
            chosen["error"] < alike["error"],
            f"{chosen['error']:.4f} against {alike['error']:.4f} at {alike['time']:.3f}",
        ),
    ]
