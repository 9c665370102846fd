"""Cut an exported ONNX transformer to half its width in one shot, and repair it in closed form.

The stages, in order: `load`, `find_blocks`, `calibrate`, `confirmed`, `uniform`, `solve`,
`operate`, `compare`, `save`; `prune` is all of them.
"""

from __future__ import annotations

from corp_onnx.blocks import Catalog, find_blocks
from corp_onnx.calibration.calibrate import calibrate
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.data.dataset import open_data
from corp_onnx.errors import CorpError
from corp_onnx.graph.model import Model, load, save
from corp_onnx.pipeline import Pruned, prune
from corp_onnx.plan import Plan, uniform
from corp_onnx.session import Runtime, open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.comparison import compare
from corp_onnx.verify.confirm import confirmed

__all__ = [
    "Catalog",
    "CorpError",
    "Model",
    "Plan",
    "Pruned",
    "Recipe",
    "Runtime",
    "Statistics",
    "calibrate",
    "compare",
    "confirmed",
    "find_blocks",
    "load",
    "open_data",
    "open_session",
    "operate",
    "prune",
    "save",
    "solve",
    "uniform",
]
