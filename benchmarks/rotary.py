"""What cutting rotated queries and keys costs, and what the same saving costs in the MLPs.

Rotary embeddings turn pairs of channels; whole pairs can go, the same in all heads of a layer, and
what makes up for them is a factor and a constant angle of every pair that is left
(`corp_onnx.solve.rotary`). Held against it: MLPs that are cut by as much as saves the same
multiply-adds. Everything in one shot, from statistics of the dense model. Errors of the logits
compare within a method only: ``best`` leaves out what Softmax does not notice, of both sums.
"""

from __future__ import annotations

import logging

import numpy as np

from benchmarks import exports
from benchmarks.language import CALIBRATION, TEST, WINDOW, batches, read, windows_of
from benchmarks.outcome import Outcome, Place, Row
from corp_onnx.blocks import Catalog, Mlp, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.graph.model import Model, load
from corp_onnx.plan import Plan, uniform
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import Surgery, operate

log = logging.getLogger(__name__)

CALIBRATED, JUDGED = 48, 24
"""Windows to calibrate on, and windows to judge on."""

SHARES = (0.125, 0.25, 0.5)
RECIPES = {
    "none": Recipe("none"),
    "corp": Recipe("corp"),
    "best": Recipe("best", refit=False),
}


def measure(place: Place) -> Outcome:
    """Every share of the pairs by every method, beside the MLPs that save as much."""
    model = load(exports.drawn(place, "smollm2", "dynamo18"))
    (name,) = (tensor.name for tensor in model.graph.inputs)
    catalog = find_blocks(model, {name: (1, WINDOW)}, rotary=True)
    used, judged = (4, 4) if place.quick else (CALIBRATED, JUDGED)
    windows = windows_of(place, CALIBRATION + TEST)
    statistics = gather(model, catalog, batches(windows[:used]), source="definitions")
    models, rows = {"dense": model}, list[Row]()
    for share in SHARES[: 1 if place.quick else None]:
        plan = uniform(catalog, {"qk": share}, align=1)
        for method, recipe in RECIPES.items():
            made, error = _cut(model, catalog, plan, statistics, recipe)
            saved = 1.0 - made.pruned.total / made.dense.total
            models[f"{share:.1%} of the pairs, {method}"] = made.model
            rows.append(
                {
                    "pairs removed": f"{share:.1%}",
                    "method": method,
                    "error of the logits": error,
                    "MACs saved": saved,
                }
            )
            log.info("%s", rows[-1])
        narrow = uniform(catalog, {"mlp": saved / _of_mlps(catalog)}, align=1)
        made, _ = _cut(model, catalog, narrow, statistics, RECIPES["best"])
        models[f"MLPs, as much as {share:.1%} of the pairs, best"] = made.model
    return Outcome(
        {
            "SmolLM2-135M: error of the logits that solving predicts, mean over layers": rows,
            "SmolLM2-135M: what it does to the text": read(models, windows[-judged:]),
        },
        (),
        {"window": WINDOW, "calibration windows": used, "test windows": judged},
    )


def _cut(
    model: Model, catalog: Catalog, plan: Plan, statistics: Statistics, recipe: Recipe
) -> tuple[Surgery, float]:
    """The smaller model, and the mean of what solving says of its folds."""
    found = solve(model, catalog, plan, statistics, recipe)
    return operate(model, catalog, found), float(
        np.mean([fold.evidence.error for fold in found.folds])
    )


def _of_mlps(catalog: Catalog) -> float:
    """The share of all multiply-adds that MLPs have."""
    mlps = [block for block in catalog.blocks if isinstance(block, Mlp)]
    return sum(catalog.macs_by_block[block.id] for block in mlps) / catalog.macs
