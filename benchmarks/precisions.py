"""Cut, then rounded: errors add, and sizes multiply.

The dense model and the one cut to half by ``best``, both in every precision, against the dense
model in float32 on held-out inputs. ``sum`` is the error of the cut plus that of the rounding
alone. ``expected`` is the size of the rounded model less what the cut removes, that rounded too:
sizes multiply where weights are both cut and rounded. Tables of embeddings are neither.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice

from benchmarks.methods import BEST, cut, solution
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.subjects import CUTS, Subject, subjects
from corp_onnx.graph.model import Model
from corp_onnx.plan import uniform
from corp_onnx.precision import Request, Typed, in_precision
from corp_onnx.session import open_session
from corp_onnx.verify.checks import Check
from corp_onnx.verify.comparison import compare, with_masks

log = logging.getLogger(__name__)

MODELS = ("fashion", "dinov2", "minilm-l6")
UNLIMITED = float("inf")
REQUESTS = (
    Request("fp16", limit=UNLIMITED),
    Request("bf16", limit=UNLIMITED),
    Request("int8", limit=UNLIMITED),
    Request(weight_only="int8", limit=UNLIMITED),
    Request(weight_only="int4", limit=UNLIMITED),
)
SEEN = 8
"""Batches of calibration samples for ranges."""

REMOVED = "both"
DENSE = "dense"

MORE = 1.25
"""Times the sum of both errors that the error of both may be, for them to add up."""

KEPT_BITS = {
    "fp16": 16.0,
    "bf16": 16.0,
    "int8": 8.0,
    "weight-only int8": 8.0 + 40 / 32,
    "weight-only int4": 4.0 + 36 / 32,
}
"""Of 32, for a weight that is rounded; with the scale and zero point of every 32 weights."""

NEAR = 0.1
"""How far the size may be from what is expected."""


def measure(place: Place) -> Outcome:
    """Every model in every precision, dense and cut."""
    rows: list[Row] = []
    checks: list[Check] = []
    for _, subject in subjects(place, MODELS, {}, 1):
        found = list(_rows(subject))
        rows += found
        checks += [check for row in found for check in (_adds(row), _multiplies(row))]
    return Outcome({"cut and rounded": rows}, tuple(checks), {"removed": CUTS[REMOVED]})


def _rows(subject: Subject) -> Iterator[Row]:
    plan = uniform(subject.catalog, CUTS[REMOVED])
    smaller = cut(subject, solution(subject, plan, BEST, subject.statistics()))
    shown, padding = with_masks(subject.model, subject.catalog.blocks)
    dense, cut_alone = (open_session(model) for model in (shown, smaller))
    of_cut = compare(dense, cut_alone, subject.test, padding=padding).relative_error
    for request in REQUESTS:
        log.info("%s in %s", subject.title, request.name)
        alone, both = (_typed(subject, model, request) for model in (subject.model, smaller))
        rounding = _error(alone)
        whole, rounded = alone.size_bytes
        left, smallest = (size / whole for size in both.size_bytes)
        yield {
            "model": subject.title,
            "precision": request.name,
            "cut": of_cut,
            "rounded": rounding,
            "sum": of_cut + rounding,
            "both": _error(both),
            "size, cut": left,
            "size, rounded": rounded / whole,
            "expected": rounded / whole - KEPT_BITS[request.name] / 32 * (1 - left),
            "size, both": smallest,
        }


def _typed(subject: Subject, model: Model, request: Request) -> Typed:
    seen = list(islice(subject.samples.batches(subject.crops, subject.seed), SEEN))
    return in_precision(model, request, seen, subject.test, others={DENSE: subject.model})


def _error(typed: Typed) -> float:
    return typed.against[DENSE].relative_error


def _adds(row: Row) -> Check:
    found = f"{row['both']:.2e}, the sum is {row['sum']:.2e}"
    name = f"{row['model']} in {row['precision']}: errors add"
    return Check(name, row["both"] <= MORE * row["sum"], found)


def _multiplies(row: Row) -> Check:
    found = f"{row['size, both']:.1%}, expected {row['expected']:.1%}"
    name = f"{row['model']} in {row['precision']}: what is cut would have been rounded as well"
    return Check(name, abs(row["size, both"] / row["expected"] - 1) <= NEAR, found)
