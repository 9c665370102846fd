"""Four exports of one encoder, pruned: are they the same function?

all-MiniLM-L6 (6 blocks, width 384) is written by both exporters, with attention as Python code and
as one call: four different graphs. Each is calibrated on the same glosses and cut by the same plan.
The difference is ``‖y - ŷ‖² / ‖y‖²`` of all tokens that count, against the first of the four. What
is left differs by float32 rounding, amplified by repairs of condition 1e3 and more.
"""

from __future__ import annotations

import logging

import numpy as np

from benchmarks import exports
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.tasks import glosses
from corp_onnx.blocks import axes_of, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.data.batching import Batch
from corp_onnx.graph.model import Model, load
from corp_onnx.plan import uniform
from corp_onnx.session import open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.checks import Check

log = logging.getLogger(__name__)

NETWORKS, EXPORTERS = ("minilm_l6_eager", "minilm_l6_sdpa"), ("ts17", "dynamo18")
SHARES = {"mlp": 0.5, "qk": 0.5}
CALIBRATION, TEST = 8, 4
"""Batches of glosses."""

MOST_DIFFERENCE = 1e-6


def measure(place: Place) -> Outcome:
    """Cut all four alike and compare what they compute."""
    task = glosses(place)
    calibration = task.calibration[: 2 if place.quick else CALIBRATION]
    tests = task.test[:TEST]
    rows: list[Row] = []
    first: dict[str, np.ndarray] = {}
    for network in NETWORKS:
        for exporter in EXPORTERS:
            log.info("%s, %s", network, exporter)
            row, found = _cut(place, network, exporter, calibration, tests)
            first = first or found
            rows.append(row | {key: _difference(found[key], first[key]) for key in found})
    settings = {"shares_removed": "mlp 0.5, qk 0.5", "batches": [len(calibration), len(tests)]}
    worst = max(row["cut"] for row in rows)
    name = f"the four cut models differ by at most {MOST_DIFFERENCE:g}"
    check = Check(name, worst <= MOST_DIFFERENCE, f"{worst:.1e}")
    return Outcome({"all-MiniLM-L6, against its first export": rows}, (check,), settings)


def _cut(
    place: Place, network: str, exporter: str, calibration: list[Batch], tests: list[Batch]
) -> tuple[Row, dict[str, np.ndarray]]:
    """What was found in one export, and what it computes dense and cut."""
    model = load(exports.drawn(place, network, exporter))
    catalog = find_blocks(model)
    statistics = gather(model, catalog, calibration)
    solution = solve(model, catalog, uniform(catalog, SHARES), statistics, Recipe("corp"))
    small = operate(model, catalog, solution).model
    row = {
        "export": f"{network}.{exporter}",
        "nodes": len(model.graph.nodes),
        "axes": sum(len(axes_of(block)) for block in catalog.blocks),
    }
    return row, {"dense": _outputs(model, tests), "cut": _outputs(small, tests)}


def _outputs(model: Model, tests: list[Batch]) -> np.ndarray:
    """The first output at every token that counts."""
    session = open_session(model)
    made = []
    for batch in tests:
        hidden = next(iter(session.run(batch).values())).astype(np.float64)
        made.append(hidden[batch["attention_mask"].astype(bool)])
    return np.concatenate(made)


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())
