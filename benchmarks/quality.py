"""What a cut costs on real models and data, and how much of it each method repairs.

Every method cuts the same widths, from the same statistics. The error is ``‖y - ŷ‖² / ‖y‖²`` of the
judged tensor on test samples, which no statistic has seen; ``of none`` is the error without repair
over this one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks import tasks
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.tasks import Task
from corp_onnx import graph
from corp_onnx.blocks import Axis, Catalog, find_blocks
from corp_onnx.calibrate import gather
from corp_onnx.graph import Model
from corp_onnx.plan import uniform
from corp_onnx.session import open_session
from corp_onnx.solve import METHODS, Recipe, solve
from corp_onnx.statistics import Batch, Statistics
from corp_onnx.surgery import operate
from corp_onnx.verify import Check, comparable

log = logging.getLogger(__name__)

TASKS: tuple[Callable[[Place], Task], ...] = (tasks.photographs, tasks.glosses, tasks.fashion)

CUTS: Mapping[str, dict[Axis, float]] = {
    "MLP": {"mlp": 0.5},
    "QK": {"qk": 0.5},
    "both": {"mlp": 0.5, "qk": 0.5},
}
RECIPES = (
    Recipe(),
    Recipe(ranking="energy-norm"),
    Recipe(ridge=1e-4),
    Recipe(ridge=1e-2),
)
"""Variants of the paper's repair, at both cuts."""

LEAST_REDUCTION = 2.0
"""How many times the repair of MLP and of both must cut the error of no repair."""


def measure(place: Place) -> Outcome:
    """Cut every model in every way."""
    tables: dict[str, list[Row]] = {}
    checks: list[Check] = []
    settings: dict[str, object] = {"seed": tasks.SEED}
    for make in TASKS:
        task = make(place)
        log.info("%s: %s", task.name, task.samples)
        subject = _Subject.of(task)
        rows, variants = subject.methods(), subject.variants()
        tables |= {task.name: rows, f"{task.name}: both cuts, other recipes": variants}
        checks += [_check(task.name, rows, cut) for cut in ("MLP", "both")]
        settings[task.name] = {
            "tensor": task.tensor,
            "samples": task.samples,
            "largest_standard_error": round(0.5 / task.samples["test"] ** 0.5, 4),
        }
    return Outcome(tables, tuple(checks), settings)


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """A task with its model's statistics and its dense tensors, on calibration and test samples."""

    task: Task
    model: Model
    catalog: Catalog
    statistics: Statistics
    dense: tuple[np.ndarray, np.ndarray]

    @staticmethod
    def of(task: Task) -> _Subject:
        """Calibrated once, for every cut."""
        model = graph.load(task.model)
        catalog = find_blocks(model)
        statistics = gather(model, catalog, task.calibration, source=task.name)
        return _Subject(task, model, catalog, statistics, _tensors(task, model))

    def methods(self) -> list[Row]:
        """Dense, then every cut by every method."""
        unharmed: Row = {"cut": "dense", "method": "-", "error": 0.0, "of none": None}
        rows = [unharmed | self._accuracies(self.dense)]
        for cut in CUTS:
            bare: float | None = None
            for method in reversed(METHODS):  # none first
                found = self._measured(cut, Recipe(method), bare)
                bare = bare or found["error"]
                rows.append({"cut": cut, "method": method, **found})
        return rows

    def variants(self) -> list[Row]:
        """Both cuts by every recipe."""
        return [
            {"ranking": recipe.ranking, "ridge": recipe.ridge}
            | self._measured("both", recipe, None)
            for recipe in RECIPES
        ]

    def _measured(self, cut: str, recipe: Recipe, bare: float | None) -> Row:
        """Error and accuracies of one cut; ``bare`` is the error without repair."""
        log.info("%s, %s, %s", cut, recipe.method, recipe.ranking)
        plan = uniform(self.catalog, CUTS[cut])
        solution = solve(self.model, self.catalog, plan, self.statistics, recipe)
        found = _tensors(self.task, operate(self.model, self.catalog, solution).model)
        error = _relative(found[1], self.dense[1])
        reduction = None if bare is None else bare / error
        return {"error": error, "of none": reduction} | self._accuracies(found)

    def _accuracies(self, tensors: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        return {name: judge(*tensors) for name, judge in self.task.judges.items()}


def _tensors(task: Task, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """The judged tensor on calibration and on test samples."""
    session = open_session(comparable(model, task.tensor))

    def run(batches: tuple[Batch, ...]) -> np.ndarray:
        return np.concatenate([session.run(batch)[task.tensor] for batch in batches])

    return run(task.calibration), run(task.test)


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    lost = np.square(found - wanted, dtype=np.float64).sum()
    return float(lost / np.square(wanted, dtype=np.float64).sum())


def _check(task: str, rows: list[Row], cut: str) -> Check:
    (row,) = (row for row in rows if (row["cut"], row["method"]) == (cut, "corp"))
    found = f"error {row['error']:.3g}, {row['of none']:.2f} times less than without repair"
    name = f"{task}, {cut}: repaired at least {LEAST_REDUCTION:g} times"
    return Check(name, row["of none"] >= LEAST_REDUCTION, found)
