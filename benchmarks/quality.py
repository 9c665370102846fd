"""What a cut costs on real models and data, and how much of it each method repairs.

Every method cuts the same widths, from the same calibration samples, which are drawn anew with each
seed. The error is ``‖y - ŷ‖² / ‖y‖²`` of the judged tensor on test samples, which no method has
seen.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from benchmarks.methods import BEST, CORP, METHODS, PUBLISHED, cut, solution
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.spread import ratios, summary
from benchmarks.subjects import CROPS, CUTS, Subject, subjects
from corp_onnx.plan import uniform
from corp_onnx.verify.checks import Check

log = logging.getLogger(__name__)

MODELS = ("fashion", "dinov2", "dinov2-neighbours", "minilm-l3", "minilm-l6")
SEEDS, SEEDS_OF = 3, {"dinov2": 2, "dinov2-neighbours": 1}

LEAST_REDUCTION = 2.0
"""How many times the paper's repair of MLP and of both must cut the error of no repair."""

GLANCE = ("both", "all three")
"""Cuts that are measured if a glance is enough."""

HALF = 0.5
"""Of the error or of the loss of ``corp``, at most, for ``best``."""


def measure(place: Place) -> Outcome:
    """Cut every model in every way."""
    runs: dict[str, list[Row]] = {}
    settings: dict[str, object] = {"crops": CROPS}
    checked: dict[str, Subject] = {}
    for name, subject in subjects(place, MODELS, SEEDS_OF, SEEDS):
        if place.quick:
            subject = replace(subject, cuts=tuple(kind for kind in GLANCE if kind in subject.cuts))
        runs.setdefault(name, []).extend(_rows(subject))
        checked[name] = subject
        settings[name] = {"calibration": subject.samples.count, "test": subject.tested}
    tables: dict[str, list[Row]] = {}
    checks: list[Check] = []
    for name, rows in runs.items():
        title = checked[name].title
        means = _with_ratios(summary(rows, ["cut", "method"]), rows)
        tables |= {title: means, f"{title}, every draw": rows}
        checks += _checks(name, checked[name], rows, means)
    return Outcome(tables, tuple(checks), settings)


def _rows(subject: Subject) -> list[Row]:
    """Dense, then every cut by every method."""
    dense: Row = {"cut": "dense", "method": "-", "seed": subject.seed, "error": 0.0, "MACs": 1.0}
    rows = [dense | subject.accuracies()]
    statistics = subject.statistics()
    for name in subject.cuts:
        plan = uniform(subject.catalog, CUTS[name])
        for method in METHODS:
            if method == PUBLISHED and "vo" in CUTS[name]:
                continue  # the paper leaves values alone
            found = subject.measured(cut(subject, solution(subject, plan, method, statistics)))
            rows.append({"cut": name, "method": method, "seed": subject.seed, **found})
            log.info("%s", rows[-1])
    return rows


def _with_ratios(means: list[Row], rows: list[Row]) -> list[Row]:
    """How the error compares with that of the paper's repair, draw by draw."""
    for row in means:
        kind = {"cut": row["cut"]}
        found = ratios(rows, kind | {"method": row["method"]}, kind | {"method": CORP})
        row["of corp"] = [round(value, 3) for value in found]
    return means


def _checks(name: str, subject: Subject, rows: list[Row], means: list[Row]) -> list[Check]:
    by_kind = {(row["cut"], row["method"]): row for row in means}
    checks = []
    for kind in [kind for kind in ("MLP", "both") if kind in subject.cuts]:
        times = by_kind[kind, "none"]["error"] / by_kind[kind, CORP]["error"]
        wanted = f"{subject.title}, {kind}: corp repairs at least {LEAST_REDUCTION:g} times"
        checks.append(Check(wanted, times >= LEAST_REDUCTION, f"{times:.2f} times"))
    if name == "dinov2":
        checks.append(_half_the_error(subject, rows))
    if name in {"fashion", "minilm-l6"}:
        checks.append(_half_the_loss(subject, by_kind))
    if "all three" in subject.cuts:
        checks.append(_all_three(subject, rows))
    return checks


def _half_the_error(subject: Subject, rows: list[Row]) -> Check:
    found = ratios(rows, {"cut": "both", "method": BEST}, {"cut": "both", "method": CORP})
    return Check(
        f"{subject.title}, both: the error of best is at most {HALF:g} times that of corp",
        float(np.mean(found)) <= HALF,
        f"{np.mean(found):.3f} times; by draw {_listed(found)}",
    )


def _half_the_loss(subject: Subject, by_kind: dict[tuple[str, str], Row]) -> Check:
    """Of accuracy, where what corp loses is more than chance."""
    (judge,) = subject.judges
    dense = by_kind["dense", "-"][judge]
    error = float(np.sqrt(dense * (1 - dense) / subject.tested))
    lost = {method: dense - by_kind["both", method][judge] for method in (CORP, BEST)}
    noise = lost[CORP] <= 2 * error
    return Check(
        f"{subject.title}, both: best loses at most {HALF:g} times the {judge} accuracy that corp "
        "loses, where that exceeds two standard errors",
        noise or lost[BEST] <= HALF * lost[CORP],
        f"corp loses {lost[CORP]:.4f}, best {lost[BEST]:.4f}, standard error {error:.4f}"
        + ("; within the noise" if noise else ""),
    )


def _all_three(subject: Subject, rows: list[Row]) -> Check:
    found = ratios(rows, {"cut": "all three", "method": BEST}, {"cut": "both", "method": CORP})
    return Check(
        f"{subject.title}: best with all three cut has less error than corp with both cut",
        float(np.mean(found)) < 1,
        f"{np.mean(found):.3f} times; by draw {_listed(found)}",
    )


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
