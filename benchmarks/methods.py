"""Every way to cut a subject, from the same calibration samples."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.published_method import solve_as_published
from benchmarks.subjects import Subject
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.graph.model import Model
from corp_onnx.plan import Plan
from corp_onnx.sequential.fit import fit_in_sequence
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import Solution
from corp_onnx.surgery.operate import operate

BEST, ONE_SHOT, CORP, PUBLISHED = "best", "best, one shot", "corp", "published"

RECIPES: Mapping[str, Recipe] = {
    "none": Recipe("none"),
    "mean": Recipe("mean"),
    CORP: Recipe("corp"),
    ONE_SHOT: Recipe("best", refit=False),
}
"""In one shot, from statistics of the dense model."""

METHODS = ("none", "mean", PUBLISHED, CORP, ONE_SHOT, BEST)


def solution(subject: Subject, plan: Plan, method: str, statistics: Statistics) -> Solution:
    """The folds of a plan by one of `METHODS`."""
    if method == BEST:
        return in_sequence(subject, plan, Recipe("best"))
    if method == PUBLISHED:
        return solve_as_published(subject.model, subject.catalog, plan, statistics)
    return solve(subject.model, subject.catalog, plan, statistics, RECIPES[method])


def in_sequence(subject: Subject, plan: Plan, recipe: Recipe) -> Solution:
    """Block by block, as ``corp-onnx prune`` does it."""
    return fit_in_sequence(
        *(subject.model, subject.catalog, plan, subject.parts(), recipe),
        runtime=subject.runtime,
        seed=subject.seed,
    ).solution


def cut(subject: Subject, found: Solution) -> Model:
    """The smaller model."""
    return operate(subject.model, subject.catalog, found).model
