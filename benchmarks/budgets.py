"""Equal multiply-adds: the same share cut everywhere, or widths chosen by what they are worth.

A uniform cut removes the same share of every axis, to the single channel, so that it just keeps the
budget. Unequal widths are chosen as ``corp-onnx prune --macs`` does, in multiples of its default.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.methods import BEST, CORP, ONE_SHOT, PUBLISHED, cut, solution
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.samples import drawn
from benchmarks.spread import ratios, summary
from benchmarks.subjects import Subject, subjects
from corp_onnx.allocation.budget import Budget, within
from corp_onnx.allocation.probes import Probe, offered, probe
from corp_onnx.blocks import Axis
from corp_onnx.errors import PlanError
from corp_onnx.plan import DEFAULT_ALIGN, Plan, uniform
from corp_onnx.solve import Recipe
from corp_onnx.verify.checks import Check
from corp_onnx.work import PROBED

log = logging.getLogger(__name__)

MODELS = ("fashion", "dinov2", "minilm-l3", "minilm-l6", "smollm2", "smollm2-narrow")
SEEDS = 1
KEPT, KEPT_OF = (0.8, 0.6, 0.5, 0.4), {"smollm2": (0.8, 0.6), "smollm2-narrow": (0.5, 0.4)}
"""Apart, as each of the latter takes half an hour."""

CHECKED, HALF = 0.6, 0.5

PAPER: tuple[Axis, ...] = ("mlp", "qk")
STEPS = 40
"""Of the bisection over shares."""

ALL_AXES, MLP_AND_QK, UNEQUAL = "uniform, all axes", "uniform, MLP and QK", "unequal"
WAYS = (
    *((MLP_AND_QK, method) for method in ("none", "mean", PUBLISHED, CORP, ONE_SHOT)),
    *((ALL_AXES, method) for method in ("none", "mean", CORP, ONE_SHOT, BEST)),
    (UNEQUAL, BEST),
)
"""The paper leaves values alone, and `published` with it."""


def measure(place: Place) -> Outcome:
    """Every budget in every way, and the widths that were chosen."""
    runs: dict[str, list[Row]] = {}
    widths: dict[str, object] = {}
    for name, subject in subjects(place, MODELS, {}, SEEDS):
        kept = (CHECKED,) if place.quick else KEPT_OF.get(name, KEPT)
        rows, chosen = _Bench.of(subject).rows(kept)
        runs.setdefault(subject.title, []).extend(rows)
        widths[f"{subject.title}, seed {subject.seed}"] = chosen
    tables: dict[str, list[Row]] = {}
    for title, rows in runs.items():
        tables |= {title: summary(rows, ["kept", "method", "widths"])}
        tables |= {f"{title}, every draw": rows}
    checks = tuple(
        _check(title, rows)
        for title, rows in runs.items()
        if any(row["kept"] == CHECKED for row in rows)
    )
    return Outcome(tables, checks, {"unequal widths": widths, "align": DEFAULT_ALIGN})


class _Bench:
    """A subject, calibrated and probed."""

    def __init__(self, subject: Subject, probes: Sequence[Probe]) -> None:
        self.subject = subject
        self.probes = probes
        self.statistics = subject.statistics()

    @classmethod
    def of(cls, subject: Subject) -> _Bench:
        bench = cls(subject, ())
        few, _ = drawn(subject.samples, PROBED, subject.seed)
        model, catalog = subject.model, subject.catalog
        bench.probes = probe(
            *(model, catalog, bench.statistics, few.batches(1, 0), Recipe("best")),
            align=DEFAULT_ALIGN,
        )
        return bench

    def rows(self, budgets: Sequence[float]) -> tuple[list[Row], dict[str, dict[str, int]]]:
        """All of them; and the unequal widths of each."""
        rows: list[Row] = []
        chosen: dict[str, dict[str, int]] = {}
        every = offered(self.subject.catalog)
        for kept in budgets:
            plans = {
                ALL_AXES: self.uniform(every, kept),
                MLP_AND_QK: self.uniform([axis for axis in every if axis in PAPER], kept),
                UNEQUAL: self.unequal(kept),
            }
            for kind, method in WAYS:
                plan = plans[kind]
                if plan is None:
                    log.info("%s, %s: %g cannot be kept", method, kind, kept)
                    continue
                found = solution(self.subject, plan, method, self.statistics)
                row = {"kept": kept, "method": method, "widths": kind, "seed": self.subject.seed}
                rows.append(row | self.subject.measured(cut(self.subject, found)))
                log.info("%s", rows[-1])
                if kind == UNEQUAL:
                    chosen[f"{kept:g}"] = {f"{c.block}.{c.axis}": c.to for c in plan.cuts}
        return rows, chosen

    def unequal(self, kept: float) -> Plan | None:
        """What the product chooses."""
        try:
            budget = Budget("macs", kept)
            return within(self.subject.catalog, self.probes, budget, align=DEFAULT_ALIGN)
        except PlanError:
            return None

    def uniform(self, axes: Sequence[Axis], kept: float) -> Plan | None:
        """The smallest share, removed from all of these axes, that keeps the budget."""

        def plan(share: float) -> Plan:
            return uniform(self.subject.catalog, dict.fromkeys(axes, share), align=1)

        low, high = 0.0, 1.0 - 1e-9
        if self.macs(plan(high)) > kept:
            return None
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.macs(plan(middle)) <= kept else (middle, high)
        return plan(high)

    def macs(self, plan: Plan) -> float:
        """The share that a plan leaves: every channel of an axis costs the same."""
        to: Mapping[tuple[str, Axis], int] = {(c.block, c.axis): c.to for c in plan.cuts}
        gone = sum(
            one.macs * (one.width - to.get((one.blocks[0], one.axis), one.width))
            for one in self.probes
        )
        return 1.0 - gone / self.subject.catalog.macs


def _check(title: str, rows: list[Row]) -> Check:
    found = ratios(
        rows,
        {"kept": CHECKED, "method": BEST, "widths": UNEQUAL},
        {"kept": CHECKED, "method": CORP, "widths": ALL_AXES},
    )
    return Check(
        f"{title}, {CHECKED:.0%} of the multiply-adds: best with unequal widths has at most "
        f"{HALF:g} times the error of corp cut uniformly",
        bool(found) and float(np.mean(found)) <= HALF,
        ", ".join(f"{value:.3f} times" for value in found),
    )
