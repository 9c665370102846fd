"""Error by the number of calibration samples, and how far errors on these can be trusted.

``seen`` and ``unseen`` are means over all fitted layers of what `refit` reports: the error of what
a block adds to the stream, on the samples that it was fitted to and on those held out of the fit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from benchmarks.methods import BEST, CORP, ONE_SHOT, cut, in_sequence, solution
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.samples import Samples, drawn
from benchmarks.spread import summary
from benchmarks.subjects import CUTS, Subject, subjects
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.errors import CorpError
from corp_onnx.plan import Plan, uniform
from corp_onnx.solve import DEFAULT_RIDGE, Recipe
from corp_onnx.solve.folds import Solution

log = logging.getLogger(__name__)

MODELS = ("fashion-whole", "dinov2", "minilm-l6")
SEEDS = 1
SIZES = (32, 64, 128, 256, 512, 1024)
KIND = "both"
ONE_RIDGE = "best, one ridge for all layers"
"""Where the refit begins, rather than one for each by samples held out."""


def measure(place: Place) -> Outcome:
    """Both cuts, by each method, from ever more samples."""
    runs: dict[str, list[Row]] = {}
    for _, subject in subjects(place, MODELS, {}, SEEDS):
        rows = [row for size in _sizes(subject.samples) for row in _rows(subject, size)]
        runs.setdefault(subject.title, []).extend(rows)
    tables = {title: summary(rows, ["samples", "method"]) for title, rows in runs.items()}
    return Outcome(tables, (), {"cut": KIND})


def _sizes(samples: Samples) -> Sequence[int]:
    """As many as there are; all of them in any case."""
    return [*(size for size in SIZES if size < samples.count), samples.count]


def _rows(subject: Subject, size: int) -> list[Row]:
    fewer = subject.with_samples(drawn(subject.samples, size, subject.seed)[0])
    plan = uniform(subject.catalog, CUTS[KIND])
    statistics = fewer.statistics()
    rows = [
        {"samples": size, "method": method, "seed": subject.seed}
        | _figures(fewer, plan, method, statistics)
        for method in (CORP, ONE_SHOT, BEST, ONE_RIDGE)
    ]
    log.info("%s", rows)
    return rows


def _figures(subject: Subject, plan: Plan, method: str, statistics: Statistics) -> Row:
    """What was measured, or why the samples are too few."""
    try:
        found = _solution(subject, plan, method, statistics)
    except CorpError as error:
        empty = dict.fromkeys(["error", "MACs", *subject.judges, "seen", "unseen"])
        return empty | {"refused": str(error)}
    return subject.measured(cut(subject, found)) | _gap(found) | {"refused": None}


def _solution(subject: Subject, plan: Plan, method: str, statistics: Statistics) -> Solution:
    if method == ONE_RIDGE:
        return in_sequence(subject, plan, Recipe("best", ridge=DEFAULT_RIDGE))
    return solution(subject, plan, method, statistics)


def _gap(found: Solution) -> Row:
    """Means over the fitted layers; none were fitted in one shot."""
    fitted = [fold.evidence for fold in found.folds if fold.evidence.unseen is not None]
    if not fitted:
        return {"seen": None, "unseen": None}
    return {
        "seen": float(np.mean([evidence.error for evidence in fitted])),
        "unseen": float(np.mean([evidence.unseen for evidence in fitted])),
    }
