"""What halving the values of every head must cost: shares of each attention's output that are lost.

``by itself`` is what is left unsaid if every head stands for itself, ``together`` if one output
projection is fitted over all heads, and ``unbound`` if as many channels could be any linear
function of what all heads mixed. A head mixes by its own logits, so it cannot: the distance from
``together`` to ``unbound`` is what no choice of directions within heads makes up for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from benchmarks.outcome import Outcome, Place, Row
from benchmarks.subjects import Subject, subjects
from corp_onnx.blocks import Attention
from corp_onnx.plan import Cut
from corp_onnx.solve import Recipe
from corp_onnx.solve.affine import covariance_of
from corp_onnx.solve.solver import Solver

log = logging.getLogger(__name__)

MODELS = ("fashion", "dinov2", "minilm-l3", "minilm-l6")


def measure(place: Place) -> Outcome:
    """Every attention of every model, from statistics of the dense model."""
    tables = {}
    for _, subject in subjects(place, MODELS, {}, 1):
        tables[subject.title] = list(_rows(subject))
        log.info("%s", tables[subject.title])
    return Outcome(tables, (), {"kept": "half of every head's values"})


def _rows(subject: Subject) -> Iterator[Row]:
    statistics = subject.statistics()
    solver = Solver.of(subject.model, statistics, Recipe("best", refit=False))
    for block in subject.catalog.blocks:
        if isinstance(block, Attention) and block.output is not None:
            half = block.value_width // 2
            fold = solver.fold(block, Cut(block.id, "vo", block.value_width, half))
            linear = block.output.linear
            weight = solver.branch(block.id, linear, np.ones(linear.width_out)).weight
            covariance = covariance_of(statistics.sites[f"{block.id}.context"])
            yield {
                "block": block.id,
                "by itself": fold.evidence.unexplained,
                "together": fold.evidence.error,
                "unbound": _tail(covariance, weight, half * block.heads),
            }


def _tail(covariance: np.ndarray, weight: np.ndarray, rank: int) -> float:
    """Of the variance of ``o W``, what the best ``rank`` linear functions of ``o`` leave."""
    variances = np.linalg.eigvalsh(weight.T @ covariance @ weight)[::-1].clip(min=0)
    return float(variances[rank:].sum() / variances.sum())
