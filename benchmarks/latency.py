"""How much of the cut in multiply-adds arrives as speed, by target, precision and batch.

All engines of one model and batch run turn by turn, in an order drawn anew for every turn. What is
computed does not matter here: weights are cut without repair, inputs are drawn. The dense model is
timed as exported, and after the clean-up that every cut model gets: its attention written anew, its
constant shape arithmetic gone. Speed-ups are over the latter. ``share`` is the speed-up over the
ratio of multiply-adds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import exports, tasks
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.subjects import CUTS
from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.data.batching import Batch
from corp_onnx.deploy.records import Precision
from corp_onnx.deploy.targets import open_target
from corp_onnx.graph.macs import count
from corp_onnx.graph.model import Model, load
from corp_onnx.graph.shapes import evaluate, usual_sequence
from corp_onnx.graph.sizes import Sizes, input_sizes
from corp_onnx.latency import conditions
from corp_onnx.latency.race import Race, timing_inputs
from corp_onnx.latency.stopwatch import Lane, Stopwatch
from corp_onnx.plan import uniform
from corp_onnx.precision import Request, in_precision
from corp_onnx.session import open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.checks import Check
from corp_onnx.verify.comparison import comparable

log = logging.getLogger(__name__)

MODELS = (*exports.DEIT, "DINOv2 ViT-S", "MiniLM-L6")
BATCHES = (1, 8, 32)
TOKENS = (16, 128, 512)

Targets = Mapping[str, tuple[Precision, ...]]
"""Names, and the precisions that are timed there."""

TARGETS: Targets = {
    "ort-cpu": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
}
AS_EXPORTED, CLEANED = "as exported", "dense"
SHARES = {CLEANED: dict.fromkeys(CUTS["all three"], 0.0)} | {
    name: CUTS[name] for name in ("both", "all three")
}

MOST_S, MOST_RUNS, LEAST_RUNS, WARMUP = 30.0, 30, 7, 3
"""About as long as one race takes, and turns that count in it."""

JUDGED = {
    ("DeiT-S", "both"): 0.9,
    ("DeiT-B", "both"): 0.9,
    ("DeiT-S", "all three"): 0.87,
    ("DeiT-B", "all three"): 0.95,
}
"""Least share of the ratio of multiply-adds, on ONNX Runtime at batch 8 in float32."""

JUDGED_BATCH = 8


def measure(place: Place) -> Outcome:
    """Race one model at every batch."""
    name = place.model
    bench = Bench.of(exported(place, name), TARGETS)
    rows = list(bench.rows(name, (1,) if place.quick else BATCHES))
    checks = [check for row in rows for check in _checks(row)]
    settings = {"most seconds a race": MOST_S, "machine": str(conditions.read())}
    return Outcome({"latency": rows}, (*checks, *_both_help(name, rows)), settings)


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """A model as exported, cleaned and cut, each in every precision that a target is timed in."""

    exported: Model | Path
    models: Mapping[tuple[str, Precision], Model]
    macs: Mapping[str, int]
    targets: Targets
    text: bool

    @staticmethod
    def of(found: Model | Path, targets: Targets) -> Bench:
        """The same cuts of any model, without repair."""
        model = load(found) if isinstance(found, Path) else found
        catalog = find_blocks(model)
        drawn = inputs_drawn(model, 2)
        statistics = gather(model, catalog, drawn[:1])
        models: dict[tuple[str, Precision], Model] = {}
        macs = {}
        for kind, shares in SHARES.items():
            bare = solve(model, catalog, uniform(catalog, shares), statistics, Recipe("none"))
            cut = operate(model, catalog, bare).model
            macs[kind] = count(cut.graph, evaluate(cut.graph, catalog.sizes)).total
            for precision in _stored(targets):
                models[kind, precision] = typed(cut, precision, drawn)
        for precision in _stored(targets) - {"fp32"}:
            models[AS_EXPORTED, precision] = typed(model, precision, drawn)
        return Bench(found, models, macs, targets, "input_ids" in catalog.sizes)

    def rows(self, name: str, batches: Sequence[int]) -> Iterator[Row]:
        """One race for every target, batch, and length of texts."""
        for batch in batches:
            for tokens in TOKENS if self.text else (None,):
                for target in self.targets:
                    log.info("%s, batch %d, tokens %s on %s", name, batch, tokens, target)
                    labels, lanes = zip(*self.lanes(target), strict=True)
                    found = self._raced(lanes, batch, tokens)
                    common = {"model": name, "batch": batch, "tokens": tokens, "target": target}
                    yield from _rows(common, labels, found)

    def lanes(self, name: str) -> Iterator[tuple[Row, Lane]]:
        """The first is what all others are held against."""
        target = open_target(name)
        for precision in self.targets[name]:
            types = stored_for(name, precision)
            for kind in SHARES:
                label = {"precision": precision, "cut": kind}
                ratio = self.macs[CLEANED] / self.macs[kind]
                lane = Lane(self.models[kind, types], target, precision)
                yield label | {"macs_ratio": ratio}, lane
            label = {"precision": precision, "cut": AS_EXPORTED, "macs_ratio": 1.0}
            as_it_is = self.exported if types == "fp32" else self.models[AS_EXPORTED, types]
            yield label, Lane(as_it_is, target, precision)

    def _raced(self, lanes: Sequence[Lane], batch: int, tokens: int | None) -> Race:
        """As many turns as there is time for."""
        watch = Stopwatch(batch, self.sizes(batch, tokens), warmup=1, runs=1)
        once = watch.race(lanes)
        turn_s = sum(latency.median_ms for latency in once.latencies) / 1000
        runs = int(np.clip(MOST_S / turn_s, LEAST_RUNS, MOST_RUNS))
        return replace(watch, warmup=WARMUP, runs=runs).race(lanes)

    def sizes(self, batch: int, tokens: int | None) -> Sizes:
        """Of the inputs of a text model, which do not say how long texts are."""
        if tokens is None:
            return {}
        model = next(iter(self.models.values()))
        return {tensor.name: (batch, tokens) for tensor in model.graph.inputs}


def stored_for(target: str, precision: Precision) -> Precision:
    """The precision of the file that a target computes in another by itself."""
    return "fp32" if open_target(target).rounds_by_itself(precision) else precision


def _stored(targets: Targets) -> set[Precision]:
    return {stored_for(name, each) for name, some in targets.items() for each in some}


def typed(model: Model, precision: Precision, drawn: Sequence[Batch]) -> Model:
    """Whatever it costs in error."""
    if precision == "fp32":
        return model
    request = Request(precision, limit=float("inf"))
    return in_precision(model, request, drawn[:1], drawn[1:]).model


def exported(place: Place, name: str) -> Model | Path:
    """One of `MODELS`, as its exporter wrote it."""
    if name in exports.DEIT:
        return exports.deit(place, name)
    if name == "MiniLM-L6":
        return exports.drawn(place, "minilm_l6_eager", "ts17")
    return comparable(load(place.asset("vit_s_focus.onnx")), tasks.FEATURES)


def inputs_drawn(model: Model, batches: int) -> list[Batch]:
    """Inputs whose values do not matter."""
    sizes = input_sizes(model.graph, batch=4, sequence=usual_sequence(model.graph))
    session = open_session(model)
    return [timing_inputs(session.inputs, sizes, seed=seed) for seed in range(batches)]


def _rows(common: Row, labels: Sequence[Row], race: Race) -> Iterator[Row]:
    """By engine: its time, and how much faster it is than the cleaned dense one in float32."""
    for label, latency, speedup in zip(labels, race.latencies, race.speedups, strict=True):
        share = speedup.ratio / label["macs_ratio"] if label["precision"] == "fp32" else None
        yield {
            **common,
            **label,
            "median_ms": latency.median_ms,
            "p5_ms": latency.p5_ms,
            "p95_ms": latency.p95_ms,
            "speedup": speedup.ratio,
            "low": speedup.low,
            "high": speedup.high,
            "share": share,
            "runs": latency.iterations,
        }


def _checks(row: Row) -> list[Check]:
    least = JUDGED.get((row["model"], row["cut"]))
    judged = (row["target"], row["precision"], row["batch"]) == ("ort-cpu", "fp32", JUDGED_BATCH)
    if least is None or not judged:
        return []
    name = f"{row['model']}, {row['cut']}, batch {row['batch']}: {least:.0%} of the MAC ratio"
    found = f"{row['speedup']:.2f} times faster, {row['share']:.0%} of {row['macs_ratio']:.2f}"
    return [Check(name, row["share"] >= least, found)]


def _both_help(name: str, rows: Sequence[Row]) -> Iterator[Check]:
    """Whether int8 and cutting together are faster than either alone, at batch 8."""
    for target in TARGETS:
        ms = {
            (row["precision"], row["cut"]): row["median_ms"]
            for row in rows
            if (row["target"], row["batch"]) == (target, JUDGED_BATCH)
            and row["tokens"] in {None, 128}
        }
        if ms:
            both, alone = ms["int8", "both"], min(ms["int8", CLEANED], ms["fp32", "both"])
            found = f"{both:.1f} ms; int8 alone or cut alone {alone:.1f} ms at best"
            yield Check(f"{name} on {target}: int8 and cut", both < alone, found)
