"""What every axis is worth: its error at every width, and what a cut of it alone does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from threadpoolctl import threadpool_limits

from corp_onnx.blocks import Axis, Catalog, axes_of
from corp_onnx.blocks.records import leader_of
from corp_onnx.calibration.moments import read_only
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.data.batching import Batch
from corp_onnx.graph.macs import Counts, count
from corp_onnx.graph.model import Model
from corp_onnx.graph.shapes import evaluate
from corp_onnx.plan import Cut, Plan, step_of, uniform
from corp_onnx.session import Runtime, open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import Solution
from corp_onnx.solve.solver import Solver
from corp_onnx.surgery.operate import carried_out
from corp_onnx.verify.comparison import Paddings, Remembered, compare, with_masks

PROBED_SHARE = 0.5
"""What is removed of an axis to see what that does to the model's output."""


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """One axis of a block, or of all blocks that share one set of weights.

    Attributes:
        blocks: The blocks, which all get the same width.
        axis: The axis.
        width: Its dense width.
        harm: What keeping 0, 1, … ``width`` of it adds to the relative error of the model's
            output: the curve of the block's own error, scaled so that it gives what was measured
            at one width.
        macs: Multiply-adds that one channel of it costs.
        params: Parameters that one channel of it costs.
        step: Channels that go together.
    """

    blocks: tuple[str, ...]
    axis: Axis
    width: int
    harm: Float64[np.ndarray, " w1"]
    macs: float
    params: float
    step: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "harm", read_only(self.harm))


def probe(
    model: Model,
    catalog: Catalog,
    statistics: Statistics,
    samples: Iterable[Batch],
    recipe: Recipe,
    *,
    align: int,
    runtime: Runtime | None = None,
) -> tuple[Probe, ...]:
    """Cut every axis alone, run the model, and see how far its output moves.

    With ``e(w)`` an axis' own error at width ``w`` (`Solver.curve`) and ``E`` the relative error of
    the model's output where only that axis is cut to ``w₀``, the harm at any width is taken to be
    ``E · e(w) / e(w₀)``: small errors pass through the rest of the model in proportion.

    Args:
        model: The dense model.
        catalog: Its blocks.
        statistics: Of the dense model.
        samples: What the model is run on, once for every axis.
        recipe: Method and ridge.
        align: Widths that are tried are multiples of this.
        runtime: How the models are run.
    """
    half = uniform(catalog, dict.fromkeys(offered(catalog), PROBED_SHARE), align=align)
    solution = solve(model, catalog, half, statistics, recipe)
    solver = Solver.of(model, statistics, recipe)
    blocks = {block.id: block for block in catalog.blocks}
    groups = _groups(catalog, half)
    with ThreadPoolExecutor(recipe.device.workers) as pool, threadpool_limits(1, user_api="blas"):
        curves = list(
            pool.map(lambda cuts: solver.curve(blocks[cuts[0].block], cuts[0].axis), groups)
        )
    counts = count(model.graph, evaluate(model.graph, catalog.sizes))
    shown, padding = with_masks(model, catalog.blocks)
    dense = Remembered(open_session(shown, runtime))
    bench = _Bench(model, catalog, counts, dense, padding, tuple(samples), runtime)
    return tuple(
        bench.probe(cuts, curve, solution, step_of(blocks[cuts[0].block], cuts[0].axis))
        for cuts, curve in zip(groups, curves, strict=True)
    )


def offered(catalog: Catalog) -> tuple[Axis, ...]:
    """The axes that any block offers."""
    return tuple(dict.fromkeys(axis for block in catalog.blocks for axis in axes_of(block)))


def _groups(catalog: Catalog, plan: Plan) -> list[tuple[Cut, ...]]:
    """Cuts by axis; those of blocks that share their weights together."""
    leaders = {block.id: leader_of(block) for block in catalog.blocks}
    groups: dict[tuple[str, Axis], list[Cut]] = {}
    for cut in plan.cuts:
        groups.setdefault((leaders[cut.block], cut.axis), []).append(cut)
    return [tuple(cuts) for cuts in groups.values()]


@dataclass(frozen=True, slots=True, eq=False)
class _Bench:
    """The dense model, ready to be compared with cut ones."""

    model: Model
    catalog: Catalog
    counts: Counts
    dense: Remembered
    padding: Paddings
    samples: tuple[Batch, ...]
    runtime: Runtime | None

    def probe(
        self, cuts: Sequence[Cut], curve: Float64[np.ndarray, " w1"], solution: Solution, step: int
    ) -> Probe:
        """What some cuts do, without all others."""
        first = cuts[0]
        folds = [solution.of(cut.block, cut.axis) for cut in cuts]
        graph = carried_out(self.model, self.catalog, folds)
        cut = open_session(self.model.with_graph(graph), self.runtime)
        found = compare(self.dense, cut, self.samples, padding=self.padding)
        before, after = self.counts, count(graph, evaluate(graph, self.catalog.sizes))
        gone = max(first.width - first.to, 1)
        own = float(curve[first.to])
        return Probe(
            tuple(cut.block for cut in cuts),
            first.axis,
            first.width,
            curve * (found.relative_error / own if own > 0 else 1.0),
            (before.total - after.total) / gone,
            (before.params - after.params) / gone,
            step,
        )
