"""Every cut of a plan, in one shot, from the statistics of the dense model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from threadpoolctl import threadpool_limits

from corp_onnx.blocks import Catalog
from corp_onnx.blocks.records import leader_of
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.graph.model import Model
from corp_onnx.plan import Plan
from corp_onnx.solve.folds import Solution
from corp_onnx.solve.recipe import Recipe
from corp_onnx.solve.solver import Solver


def solve(
    model: Model, catalog: Catalog, plan: Plan, statistics: Statistics, recipe: Recipe
) -> Solution:
    """New weights for every cut of a plan, from the statistics of the dense model.

    Raises:
        DataError: If the statistics are of another model.
        PlanError: If the ranking is unknown.
        IllConditioned: If a system cannot be solved.
    """
    statistics.require_of(model.fingerprint.sha256)
    solver = Solver.of(model, statistics, recipe)
    blocks = {block.id: block for block in catalog.blocks}
    with ThreadPoolExecutor(recipe.device.workers) as pool, threadpool_limits(1, user_api="blas"):
        cuts = [cut for cut in plan.cuts if cut.block == leader_of(blocks[cut.block])]
        found = pool.map(lambda cut: solver.fold(blocks[cut.block], cut), cuts)
        folds = {(cut.block, cut.axis): fold for cut, fold in zip(cuts, found, strict=True)}
    return Solution(
        recipe.method,
        tuple(
            replace(folds[leader_of(blocks[cut.block]), cut.axis], block=cut.block)
            for cut in plan.cuts
        ),
    )
