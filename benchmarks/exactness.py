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
from corp_onnx import graph
from corp_onnx.blocks import Catalog, find_blocks
from corp_onnx.calibrate import gather
from corp_onnx.graph import Model
from corp_onnx.plan import uniform
from corp_onnx.session import Session, open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import Solution
from corp_onnx.surgery import operate
from corp_onnx.verify import Check
from tests.full_width import narrowed, padded, squared_error, turned

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
    rows: list[Row] = []
    wrong: list[Row] = []
    for name, path in _models(place):
        log.info("%s", name)
        subject = _Subject.of(path)
        rows += [{"model": name} | row for row in subject.right()]
        wrong += [{"model": name} | row for row in subject.wrong()]
    settings = {"bound": BOUND, "batches": BATCHES, "share_kept": SHARE_KEPT, "seed": SEED}
    tables = {"relative error, at most 1e-10": rows, "wrong twins, above 1e-10": wrong}
    return Outcome(tables, (_exact(rows), _seen(wrong)), settings)


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
        model = graph.load(path)
        catalog, dense = find_blocks(model), open_session(model)
        given = {batch: feeds(dense, batch) for batch in BATCHES}
        answers = [dense.run(given[batch]) for batch in BATCHES]
        return _Subject(model, catalog, given, answers, turned(model, catalog, SEED))

    def right(self) -> Iterator[Row]:
        """Errors of what must be exact."""
        half = self._answers(padded(self.turned, SHARE_KEPT))
        yield self._row("ratio 0", self._unpruned(), self.answers)
        yield self._row("another basis", self.turned, self.answers)
        yield self._row("half width", narrowed(self.turned, SHARE_KEPT), half)

    def wrong(self) -> Iterator[Row]:
        """Errors of what must not be."""
        half = self._answers(padded(self.turned, SHARE_KEPT))
        narrow = narrowed(self.turned, SHARE_KEPT)
        for name, mistake in twins.FULL_WIDTH.items():
            yield self._row(name, twins.wrong(self.turned, mistake), self.answers)
        for name, mistake in twins.NARROW.items():
            yield self._row(name, twins.wrong(narrow, mistake), half)

    def _unpruned(self) -> Solution:
        """What the solver makes of a plan that removes nothing."""
        plan = uniform(self.catalog, {"mlp": 0.0, "qk": 0.0})
        statistics = gather(self.model, self.catalog, self.feeds.values())
        return solve(self.model, self.catalog, plan, statistics, Recipe())

    def _row(self, what: str, solution: Solution, reference: Sequence[Feeds]) -> Row:
        found = self._answers(solution)
        errors = [squared_error(y, x) for y, x in zip(found, reference, strict=True)]
        return {"what": what} | {
            f"batch {batch}": error for batch, error in zip(BATCHES, errors, strict=True)
        }

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
    worst = max(rows, key=_largest)
    found = f"{_largest(worst):.1e} at most ({worst['model']}, {worst['what']})"
    return Check(f"exact to {BOUND:.0e}", _largest(worst) <= BOUND, found)


def _seen(rows: list[Row]) -> Check:
    least = min(rows, key=_smallest)
    found = f"{_smallest(least):.1e} at least ({least['model']}, {least['what']})"
    return Check(f"wrong twins above {BOUND:.0e}", _smallest(least) > BOUND, found)


def _largest(row: Row) -> float:
    return max(float(row[f"batch {batch}"]) for batch in BATCHES)


def _smallest(row: Row) -> float:
    return min(float(row[f"batch {batch}"]) for batch in BATCHES)
