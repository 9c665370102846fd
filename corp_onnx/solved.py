"""Two ways from data to a solution: in one shot from statistics, or block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from corp_onnx.blocks import Catalog
from corp_onnx.calibration.calibrate import BATCH_SIZE, MOST_SEEN
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.data.batching import Batch
from corp_onnx.data.dataset import Dataset
from corp_onnx.data.samples import drawn, enriched, held_apart
from corp_onnx.errors import DataError
from corp_onnx.graph.model import Model
from corp_onnx.plan import Plan
from corp_onnx.sequential.emphasis import Emphasis
from corp_onnx.sequential.fit import fit_in_sequence
from corp_onnx.session import Runtime
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import Solution

LEAST_TO_REFIT = 16
"""Samples below which two halves say nothing of how well a fit carries over."""

FIT_BATCH = 16
"""Samples per run of one segment, which holds fewer tensors than the whole model."""


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """A solution, the same cut without repair, and the samples to hold both against."""

    solution: Solution
    bare: Solution
    seen: tuple[Batch, ...]
    """A few of the samples that it was solved from."""
    held_out: tuple[Batch, ...]
    """Samples that it knows nothing of."""
    samples: int
    source: str
    crops: float
    emphases: Mapping[str, Emphasis] = field(default_factory=dict)
    """By block, tokens that counted more than others."""


def from_statistics(
    model: Model,
    catalog: Catalog,
    plan: Plan,
    statistics: Statistics,
    recipe: Recipe,
) -> Solved:
    """One shot: every block from the statistics of the dense model.

    Raises:
        DataError: If they are of another model, or keep no samples to verify with.
    """
    if not statistics.held_out:
        raise DataError(
            f"the statistics of {statistics.source} keep no samples to verify with; calibrate again"
        )
    return Solved(
        solve(model, catalog, plan, statistics, recipe),
        solve(model, catalog, plan, statistics, recipe.bare),
        statistics.seen,
        statistics.held_out,
        statistics.samples,
        statistics.source,
        statistics.crops,
    )


def in_sequence(
    model: Model,
    catalog: Catalog,
    plan: Plan,
    data: Dataset,
    recipe: Recipe,
    *,
    runtime: Runtime | None = None,
    seed: int = 0,
    crops: int | None = 1,
    on_batch: Callable[[int], None] = lambda samples: None,
    on_block: Callable[[str], None] = lambda block: None,
) -> Solved:
    """Block by block, each fitted behind those before it as they were cut."""
    held_out, used = held_apart(data, seed)
    enough = max(LEAST_TO_REFIT, 2 * (used.fixed_batch or 1))
    halves = used.split(0.5, seed) if used.samples >= enough else (used,)
    parts = [enriched(half, crops, seed, of=len(halves)) for half in halves]
    fitted = fit_in_sequence(
        *(model, catalog, plan),
        [part.batches(FIT_BATCH) for part in parts],
        recipe,
        runtime=runtime,
        seed=seed,
        on_batch=on_batch,
        on_block=on_block,
    )
    return Solved(
        fitted.solution,
        fitted.bare,
        tuple(drawn(used, MOST_SEEN, seed).batches(BATCH_SIZE)),
        tuple(held_out.batches(BATCH_SIZE)),
        sum(part.samples for part in parts),
        data.source,
        parts[0].crops,
        fitted.emphases,
    )
