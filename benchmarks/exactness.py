"""Surgery that keeps every channel must give back the dense function, and see every mistake.

Four things are done to every model, and each result is held against its reference as
``‖y - ŷ‖² / ‖y‖²`` of the worst output:

- ratio 0: the way that ``prune --mlp 0 --qk 0`` goes, from statistics to surgery;
- another basis: hidden channels shuffled, ``q A`` and ``k B`` with ``A Bᵀ = I`` and ``v P`` with
  ``P⁻¹`` in the output projection, all random, in every head of every block;
- half width: half of that basis, against a full-width model with zeros where this one has nothing;
- wrong twins: one mistake in one block, which has to show.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import exports, twins
from benchmarks.outcome import Outcome, Place, Row
from corp_onnx.blocks import Catalog, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.graph.model import Model, load
from corp_onnx.plan import uniform
from corp_onnx.session import Session, open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import Solution
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from corp_onnx.verify.checks import Check
from tests.full_width import narrowed, padded, squared_error

log = logging.getLogger(__name__)

BOUND = 1e-10
BATCHES = (1, 3)
TOKENS, VOCABULARY = 12, 1000
SHARE_KEPT = 0.5
SEED = 0

ASSETS: Mapping[str, str] = {"DINOv2 ViT-S": "vit_s_focus.onnx", "MiniLM-L3": "minilm_l3.onnx"}
QUICK = ("MiniLM-L3", "hf_vit_sdpa.dynamo23", "hf_bert_eager.ts17")

Feeds = Mapping[str, np.ndarray]


def measure(place: Place) -> Outcome:
    """Run every model through every comparison."""
    right: list[Row] = []
    wrong: list[Row] = []
    for name, path in _models(place):
        log.info("%s", name)
        subject = _Subject.of(path)
        right.append({"model": name} | subject.right())
        wrong.append({"model": name} | subject.wrong())
    settings = {"bound": BOUND, "batches": BATCHES, "share_kept": SHARE_KEPT, "seed": SEED}
    tables = {
        f"largest relative error at batch {BATCHES}, wanted: at most {BOUND:.0e}": right,
        f"smallest of wrong twins at batch {BATCHES}, wanted: above {BOUND:.0e}": wrong,
    }
    return Outcome(tables, (_exact(right), _seen(wrong)), settings)


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """One model with its inputs, by batch size, and its answers to them."""

    model: Model
    catalog: Catalog
    feeds: Mapping[int, Feeds]
    answers: Sequence[Feeds]
    turned: Solution

    @staticmethod
    def of(path: Path) -> _Subject:
        """A model, asked once."""
        model = load(path)
        catalog, dense = find_blocks(model), open_session(model)
        given = {batch: feeds(dense, batch) for batch in BATCHES}
        answers = [dense.run(given[batch]) for batch in BATCHES]
        return _Subject(model, catalog, given, answers, turned(model, catalog, SEED))

    def right(self) -> dict[str, float]:
        """Errors of what must be exact."""
        half = self._answers(padded(self.turned, SHARE_KEPT))
        return {
            "ratio 0": max(self._errors(self._unpruned(), self.answers)),
            "another basis": max(self._errors(self.turned, self.answers)),
            "half width": max(self._errors(narrowed(self.turned, SHARE_KEPT), half)),
        }

    def wrong(self) -> dict[str, float]:
        """Errors of what must not be."""
        half = self._answers(padded(self.turned, SHARE_KEPT))
        narrow = narrowed(self.turned, SHARE_KEPT)
        found = {
            name: min(self._errors(twins.wrong(self.turned, mistake), self.answers))
            for name, mistake in twins.FULL_WIDTH.items()
        }
        for name, mistake in twins.NARROW.items():
            found[name] = min(self._errors(twins.wrong(narrow, mistake), half))
        return found

    def _unpruned(self) -> Solution:
        """What the solver makes of a plan that removes nothing."""
        plan = uniform(self.catalog, {"mlp": 0.0, "qk": 0.0})
        statistics = gather(self.model, self.catalog, self.feeds.values())
        return solve(self.model, self.catalog, plan, statistics, Recipe("corp"))

    def _errors(self, solution: Solution, reference: Sequence[Feeds]) -> list[float]:
        """The error at every batch size."""
        found = self._answers(solution)
        return [squared_error(y, x) for y, x in zip(found, reference, strict=True)]

    def _answers(self, solution: Solution) -> list[Feeds]:
        session = open_session(operate(self.model, self.catalog, solution).model)
        return [session.run(self.feeds[batch]) for batch in BATCHES]


def feeds(session: Session, batch: int) -> dict[str, np.ndarray]:
    """Random inputs; in masks, later samples end earlier."""
    rng = np.random.default_rng(batch)
    made = {}
    for spec in session.inputs:
        shape = (batch, *(TOKENS if size is None else size for size in spec.shape[1:]))
        values: np.ndarray
        if spec.dtype.kind == "f":
            values = rng.standard_normal(shape)
        elif "mask" in spec.name:
            values = np.arange(TOKENS) < TOKENS - np.arange(batch)[:, None]
        else:
            values = rng.integers(0, VOCABULARY, shape)
        made[spec.name] = values.astype(spec.dtype)
    return made


def _models(place: Place) -> Iterator[tuple[str, Path]]:
    names = [f"{net}.{exporter}" for net in exports.NETWORKS for exporter in exports.EXPORTERS]
    for name in (*ASSETS, *names):
        if place.quick and name not in QUICK:
            continue
        if name in ASSETS:
            yield name, place.asset(ASSETS[name])
        else:
            yield name, exports.drawn(place, *name.split("."))


def _exact(rows: list[Row]) -> Check:
    error, where = max(_cells(rows))
    return Check(f"exact to {BOUND:.0e}", error <= BOUND, f"{error:.1e} at most ({where})")


def _seen(rows: list[Row]) -> Check:
    error, where = min(_cells(rows))
    return Check(f"wrong twins above {BOUND:.0e}", error > BOUND, f"{error:.1e} at least ({where})")


def _cells(rows: list[Row]) -> Iterator[tuple[float, str]]:
    """Every error, and where it was found."""
    for row in rows:
        yield from ((row[what], f"{row['model']}, {what}") for what in row if what != "model")
