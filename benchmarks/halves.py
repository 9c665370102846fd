"""DeiT with half of its MLP and query-key width gone, for counting and timing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.graph.model import load
from corp_onnx.plan import DEFAULT_SHARES, uniform
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import Surgery, operate

IMAGE = "pixel_values"
BATCH, BATCHES, SEED = 8, 2, 0


def halved(path: Path, recipe: Recipe) -> Surgery:
    """The cut model, from statistics of noise: what it computes does not matter here."""
    model = load(path)
    catalog = find_blocks(model)
    rng = np.random.default_rng(SEED)
    noise = rng.standard_normal((BATCHES, BATCH, 3, 224, 224), dtype=np.float32)
    statistics = gather(model, catalog, ({IMAGE: batch} for batch in noise), source="noise")
    plan = uniform(catalog, DEFAULT_SHARES)
    return operate(model, catalog, solve(model, catalog, plan, statistics, recipe))
