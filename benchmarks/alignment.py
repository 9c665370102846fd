"""What widths that are no multiple of 8 are worth: models a little narrower each time, in one race.

DINOv2 ViT-S on drawn pictures, cut without repair. Widths are small, so that one channel is a large
share; each is held against the next multiple of 8 above it, which it could have been.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from benchmarks.latency import exported, inputs_drawn
from benchmarks.outcome import Outcome, Place, Row
from corp_onnx.blocks import Axis, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.deploy.targets import open_target
from corp_onnx.graph.model import Model, load
from corp_onnx.latency.stopwatch import Lane, Stopwatch
from corp_onnx.plan import DEFAULT_ALIGN, uniform
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.checks import Check

log = logging.getLogger(__name__)

MODEL, TARGETS, BATCH, RUNS = "DINOv2 ViT-S", ("ort-cpu", "openvino"), 8, 40
STEPS = (0, 1, 4, 7, 8)
"""Channels below an aligned width: of these the first and the last are aligned."""

CASES: Mapping[str, tuple[tuple[Axis, ...], int, int]] = {
    "MLP": (("mlp",), 1536, 128),
    "heads": (("qk", "vo"), 64, 32),
}
"""Axes that are cut together, their dense width, and the aligned width to begin at."""

NOISE = 0.02
"""Share of the time by which two models that take equally long may seem to differ."""


def measure(place: Place) -> Outcome:
    """Every case on every target."""
    found = exported(place, MODEL)
    model = found if isinstance(found, Model) else load(found)
    rows: list[Row] = []
    for case in CASES:
        models = list(_models(model, case))
        for target in TARGETS:
            log.info("%s on %s", case, target)
            rows += _rows(case, target, models, 5 if place.quick else RUNS)
    return Outcome({"alignment": rows}, tuple(_checks(rows)), {"batch": BATCH, "runs": RUNS})


def _models(model: Model, case: str) -> Iterator[Model]:
    """The narrower ones, as many channels as `STEPS` says below the aligned width."""
    axes, dense, aligned = CASES[case]
    catalog = find_blocks(model)
    statistics = gather(model, catalog, inputs_drawn(model, 2)[:1])
    for step in STEPS:
        share = 1 - (aligned - step) / dense
        plan = uniform(catalog, dict.fromkeys(axes, share), align=1)
        bare = solve(model, catalog, plan, statistics, Recipe("none"))
        yield operate(model, catalog, bare).model


def _rows(case: str, name: str, models: list[Model], runs: int) -> Iterator[Row]:
    target, (_, _, aligned) = open_target(name), CASES[case]
    race = Stopwatch(BATCH, runs=runs).race([Lane(model, target) for model in models])
    for step, latency, speedup in zip(STEPS, race.latencies, race.speedups, strict=True):
        yield {
            "axes": case,
            "target": name,
            "width": aligned - step,
            "aligned": (aligned - step) % DEFAULT_ALIGN == 0,
            "median_ms": latency.median_ms,
            "speedup": speedup.ratio,
            "low": speedup.low,
            "high": speedup.high,
        }


def _checks(rows: list[Row]) -> Iterator[Check]:
    """That none of the widths between two multiples gains more than the lower one."""
    for case in CASES:
        for target in TARGETS:
            some = [row for row in rows if (row["axes"], row["target"]) == (case, target)]
            between = max(row["speedup"] for row in some if not row["aligned"])
            following = some[-1]["speedup"]
            yield Check(
                f"{case} on {target}: widths between gain no more than a whole multiple less",
                between <= max(1 + NOISE, following),
                f"{between:.3f} times at most, {following:.3f} times where {DEFAULT_ALIGN} go",
            )
