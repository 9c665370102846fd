"""What random crops of the calibration pictures give and cost, on DINOv2 ViT-S.

The same pictures are calibrated on as they are and as several crops each, of which as small a share
of the tokens counts. Half of MLP and query-key width is cut; the error is ``‖y - ŷ‖² / ‖y‖²`` of
the features of unseen photographs, which are judged plain.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from time import perf_counter, process_time

import numpy as np

from benchmarks import tasks
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.tasks import Task
from corp_onnx.blocks import Axis, Catalog, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.data.dataset import Dataset
from corp_onnx.graph.model import Model, load
from corp_onnx.plan import uniform
from corp_onnx.session import open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.checks import Check
from corp_onnx.verify.comparison import comparable

log = logging.getLogger(__name__)

CROPS = (1, 2)
FEW, SEEDS = 64, (0, 1)
"""So many pictures, drawn with each seed; all pictures are used once, with the first seed."""

BOTH: dict[Axis, float] = {"mlp": 0.5, "qk": 0.5}

MOST_TIMES = 2.2
"""How much longer two crops of a picture may take than one, in seconds of the processor."""


def measure(place: Place) -> Outcome:
    """Errors and seconds by number of pictures and of crops."""
    subject = _Subject.of(place)
    few = 16 if place.quick else FEW
    parts = [(subject.data.take(_drawn(subject.data.samples, few, seed)), seed) for seed in SEEDS]
    rows: list[Row] = []
    for part, seed in [*parts, (subject.data, SEEDS[0])][: 1 if place.quick else None]:
        for crops in CROPS:
            rows.append(subject.row(part, crops, seed))
            log.info("%s", rows[-1])
    spread = _summary(rows)
    times = max(row["times one crop"] for row in spread if row["crops"] == 2)
    check = Check(
        f"two crops of every picture take {MOST_TIMES:g} times as long as one",
        times <= MOST_TIMES,
        f"{times:.2f} times",
    )
    settings = {"seeds": SEEDS, "test": subject.task.samples["test"], "tensor": tasks.FEATURES}
    return Outcome(
        {"corp on DINOv2 ViT-S: mean over seeds": spread, "every run": rows},
        (check,),
        settings,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """The model, the photographs to calibrate on, and those to judge by."""

    task: Task
    data: Dataset
    model: Model
    catalog: Catalog
    dense: np.ndarray

    @staticmethod
    def of(place: Place) -> _Subject:
        """With the dense features of the photographs to judge by."""
        task, model = tasks.photographs(place), load(place.asset("vit_s_focus.onnx"))
        data = tasks.photo_data(place)
        first, _ = tasks.photo_parts(place, data)
        return _Subject(task, data.take(first), model, find_blocks(model), _features(task, model))

    def row(self, part: Dataset, crops: int, seed: int) -> Row:
        """Calibrate on crops of some pictures, and cut half of MLP and query-key width."""
        start = perf_counter(), process_time()
        batches = part.augmented(crops, seed).batches(tasks.PHOTO_BATCH)
        statistics = gather(self.model, self.catalog, batches, crops=crops, seed=seed)
        seconds = {"seconds": perf_counter() - start[0], "CPU seconds": process_time() - start[1]}
        error = self._error(statistics)
        pictures = {"pictures": part.samples, "seed": seed, "crops": crops}
        return pictures | {"error": error} | seconds

    def _error(self, statistics: Statistics) -> float:
        plan = uniform(self.catalog, BOTH)
        solution = solve(self.model, self.catalog, plan, statistics, Recipe("corp"))
        found = _features(self.task, operate(self.model, self.catalog, solution).model)
        lost = np.square(found - self.dense, dtype=np.float64).sum()
        return float(lost / np.square(self.dense, dtype=np.float64).sum())


def _features(task: Task, model: Model) -> np.ndarray:
    session = open_session(comparable(model, task.tensor))
    return np.concatenate([session.run(batch)[task.tensor] for batch in task.test])


def _drawn(available: int, count: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(available, count, replace=False))


def _summary(rows: list[Row]) -> list[Row]:
    """Means over seeds, with the standard deviation of the error."""
    found = []
    for pictures in dict.fromkeys(row["pictures"] for row in rows):
        alike = [row for row in rows if row["pictures"] == pictures]
        plain = np.mean([row["CPU seconds"] for row in alike if row["crops"] == 1])
        for crops in CROPS:
            runs = [row for row in alike if row["crops"] == crops]
            errors = [row["error"] for row in runs]
            seconds = float(np.mean([row["CPU seconds"] for row in runs]))
            found.append(
                {"pictures": pictures, "crops": crops, "seeds": len(runs)}
                | {"error": float(np.mean(errors)), "deviation": float(np.std(errors))}
                | {"CPU seconds": seconds, "times one crop": seconds / float(plain)}
            )
    return found
