"""What every ingredient of ``best`` is worth: each is left out in turn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
from jaxtyping import Float64

from benchmarks.methods import BEST, ONE_SHOT, in_sequence, solution
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.samples import halves
from benchmarks.spread import summary
from benchmarks.subjects import CUTS, Subject, subjects
from corp_onnx.calibration import sites
from corp_onnx.plan import Plan, uniform
from corp_onnx.sequential import fit
from corp_onnx.sequential.fit import fit_in_sequence
from corp_onnx.solve import DEFAULT_RIDGE, Recipe, refit, values
from corp_onnx.solve.folds import Solution
from corp_onnx.solve.joint import Joint
from corp_onnx.surgery.operate import operate

log = logging.getLogger(__name__)

MODELS = ("fashion", "dinov2", "minilm-l6")
SEEDS = 1
KINDS = ("both", "all three")

FIXED: refit.Choice = (0.1, 1.0)
"""Ridge and step, where these are not chosen on samples held out."""

Variant = Callable[[Subject, Plan], Solution]


def measure(place: Place) -> Outcome:
    """Every variant at both cuts and at all three."""
    runs: dict[str, list[Row]] = {}
    kinds = KINDS[: 1 if place.quick else None]
    for _, subject in subjects(place, MODELS, {}, SEEDS):
        runs.setdefault(subject.title, []).extend(_rows(subject, kinds))
    tables = {title: summary(rows, ["cut", "variant"]) for title, rows in runs.items()}
    return Outcome(tables, (), {"fixed ridge and step": FIXED, "crops": 1})


def _rows(subject: Subject, kinds: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    for kind in kinds:
        plan = uniform(subject.catalog, CUTS[kind])
        whole: float | None = None
        for name, variant in VARIANTS.items():
            if not _says_something(name, subject, kind):
                continue
            model = operate(subject.model, subject.catalog, variant(subject, plan)).model
            found = subject.measured(model)
            whole = whole or found["error"]
            labels = {"cut": kind, "variant": name, "seed": subject.seed}
            rows.append(labels | found | {"of best": found["error"] / whole})
            log.info("%s", rows[-1])
    return rows


def _says_something(name: str, subject: Subject, kind: str) -> bool:
    """Crops are of pictures, heads share where values are cut, and classifiers read one token."""
    if name == TWO_CROPS:
        return subject.samples.crops(2) > 1
    if name == ALIKE:
        return "top-1" in subject.judges
    return name != HEAD_BY_HEAD or "vo" in CUTS[kind]


def _with(recipe: Recipe) -> Variant:
    return lambda subject, plan: in_sequence(subject, plan, recipe)


def _one_shot(subject: Subject, plan: Plan) -> Solution:
    return solution(subject, plan, ONE_SHOT, subject.statistics())


def _without_refit(subject: Subject, plan: Plan) -> Solution:
    """With one part of the samples, `fit_in_sequence` refits nothing."""
    return fit_in_sequence(
        *(subject.model, subject.catalog, plan),
        [subject.samples.batches(subject.crops, subject.seed)],
        Recipe("best"),
        seed=subject.seed,
    ).solution


def _two_crops(subject: Subject, plan: Plan) -> Solution:
    return in_sequence(replace(subject, crops=2), plan, Recipe("best"))


def _half_of_the_data(subject: Subject, plan: Plan) -> Solution:
    half, _ = halves(subject.samples, subject.seed)
    return in_sequence(subject.with_samples(half), plan, Recipe("best"))


def _fixed_refit(subject: Subject, plan: Plan) -> Solution:
    with fixed_choice(FIXED):
        return in_sequence(subject, plan, Recipe("best"))


def _keys_as_they_are(subject: Subject, plan: Plan) -> Solution:
    """Truncated by the energy of whole keys, though Softmax ignores what a sequence shares."""
    with mock.patch.object(sites, "centred", lambda heads, *_: heads):
        return in_sequence(subject, plan, Recipe("best"))


def _every_head_by_itself(subject: Subject, plan: Plan) -> Solution:
    """The refit begins with values that help no other head."""
    with mock.patch.object(values, "taken_over", lambda _, lost, __: (np.zeros_like(lost), 1.0)):
        return in_sequence(subject, plan, Recipe("best"))


def _all_tokens_alike(subject: Subject, plan: Plan) -> Solution:
    with mock.patch.object(fit, "emphasised", return_value={}):
        return in_sequence(subject, plan, Recipe("best"))


@contextmanager
def fixed_choice(choice: refit.Choice) -> Iterator[None]:
    """While this lasts, a ridge and a step are taken whatever held-out samples say."""
    trials = refit._trials

    def only(held: Joint, train: Joint, start: Float64[np.ndarray, "k o"]) -> dict:
        found = trials(held, train, start)[choice]
        return {choice: found, refit.NO_REFIT: np.inf}

    with mock.patch.object(refit, "_trials", only):
        yield


HEAD_BY_HEAD = "every head by itself where the refit begins"
ALIKE = "all tokens alike instead of more weight for those that are read"
TWO_CROPS = "two crops of every picture instead of one"
VARIANTS: Mapping[str, Variant] = {
    BEST: _with(Recipe("best")),
    "MLP channels ranked by energy instead of eliminated": _with(Recipe("best", ranking="energy")),
    "queries, keys and values selected and repaired instead of truncated": _with(
        Recipe("best", truncate=False)
    ),
    "keys as they are instead of less their mean over each sequence": _keys_as_they_are,
    ALIKE: _all_tokens_alike,
    HEAD_BY_HEAD: _every_head_by_itself,
    "one shot": _one_shot,
    "in sequence, but not refitted": _without_refit,
    TWO_CROPS: _two_crops,
    "ridge and step fixed instead of chosen": _fixed_refit,
    "one ridge for all layers where the refit begins": _with(Recipe("best", ridge=DEFAULT_RIDGE)),
    "half of the calibration samples": _half_of_the_data,
}
"""The first is what the others are held against."""
