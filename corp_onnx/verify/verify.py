"""Hold a smaller model against everything that was promised of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from corp_onnx.blocks import Axis, Catalog, find_blocks
from corp_onnx.blocks.catalog import named_as
from corp_onnx.data.batching import Batch
from corp_onnx.graph.model import Model
from corp_onnx.graph.sizes import Sizes
from corp_onnx.plan import Plan
from corp_onnx.session import Runtime, open_session
from corp_onnx.solved import Solved
from corp_onnx.surgery.operate import Surgery, operate
from corp_onnx.verify.checks import (
    Check,
    Gates,
    Verification,
    check_gates,
    check_promises,
    check_repair,
    check_structure,
    rounding_error,
)
from corp_onnx.verify.comparison import compare_each, with_masks
from corp_onnx.verify.promise import Measured, measured_errors, stream_errors

GROUPS = 4
"""Of samples, each looked at by itself where all of them together break a promise."""


def verify(
    model: Model,
    catalog: Catalog,
    plan: Plan,
    solved: Solved,
    surgery: Surgery,
    *,
    gates: Gates,
    sizes: Sizes | None = None,
    runtime: Runtime | None = None,
) -> Verification:
    """Hold the smaller model against the plan, the promises, no repair, and the user's limits."""
    found = blocks_of(surgery.model, catalog, sizes)
    checks: list[Check] = [check_structure(plan, surgery.model, model, found)]
    candidates = [surgery.model]
    if solved.solution.method != "none":
        candidates.append(operate(model, catalog, solved.bare).model)
    shown, padding = with_masks(model, catalog.blocks)
    comparison, *unrepaired = compare_each(
        open_session(shown, runtime),
        [open_session(candidate, runtime) for candidate in candidates],
        solved.held_out,
        padding=padding,
    )
    if checks[0].passed:
        checks.append(_promises(model, catalog, surgery.model, found, solved, sizes, runtime))
    rounding = rounding_error(model)
    checks += [check_repair(comparison, bare, rounding) for bare in unrepaired]
    checks += check_gates(comparison, max_error=gates.max_error, min_agreement=gates.min_agreement)
    return Verification(tuple(checks), comparison)


def _promises(
    model: Model,
    catalog: Catalog,
    pruned: Model,
    found: Catalog,
    solved: Solved,
    sizes: Sizes | None,
    runtime: Runtime | None,
) -> Check:
    """Whether the promises hold, as far as the few samples that were kept can tell.

    A prediction is a mean over all that was calibrated on, and so few samples may be unlike the
    rest. Where they break a promise, they are looked at again in groups: it counts as broken if the
    mean error of these is too large even less twice its standard error.
    """

    def measured(samples: Sequence[Batch]) -> Measured:
        return _measured(model, catalog, pruned, found, solved, samples, sizes, runtime)

    check = check_promises(solved.solution, measured(solved.seen))
    groups = [solved.seen[at::GROUPS] for at in range(GROUPS)]
    if check.passed or not all(groups):
        return check
    each = [measured(group) for group in groups]
    least = {key: _least([errors[key] for errors in each]) for key in each[0]}
    again = check_promises(solved.solution, least)
    if not again.passed:
        return check
    return replace(again, found=f"{again.found}, less two standard errors: these samples differ")


def _least(errors: Sequence[float]) -> float:
    """A mean less twice its standard error; not a number where one is none, or has no limit."""
    with np.errstate(invalid="ignore"):
        return float(np.mean(errors) - 2 * np.std(errors, ddof=1) / np.sqrt(len(errors)))


def _measured(
    model: Model,
    catalog: Catalog,
    pruned: Model,
    found: Catalog,
    solved: Solved,
    samples: Sequence[Batch],
    sizes: Sizes | None,
    runtime: Runtime | None,
) -> Measured:
    """What every fold of a solution really does, on samples that it was solved from."""
    solution = solved.solution

    def measure(
        smaller: Model, blocks: Catalog, axes: tuple[Axis, ...], *, behind_pruned: bool = False
    ) -> Measured:
        return measured_errors(
            model,
            catalog,
            smaller,
            blocks,
            samples,
            runtime,
            axes=axes,
            behind_pruned=behind_pruned,
            without_row_constants=solution.method == "best",
        )

    if solution.in_sequence:
        logits = measure(pruned, found, ("qk",), behind_pruned=True)
        return logits | stream_errors(
            *(model, catalog, pruned, solution, samples, runtime), emphases=solved.emphases
        )
    measured = measure(pruned, found, ("mlp", "qk"))
    values = tuple(fold for fold in solution.folds if fold.axis == "vo")
    if not values:
        return measured
    alone = operate(model, catalog, replace(solution, folds=values)).model
    return measured | measure(alone, blocks_of(alone, catalog, sizes), ("vo",))


def blocks_of(pruned: Model, dense: Catalog, sizes: Sizes | None = None) -> Catalog:
    """What is found in a cut model, of what was offered in the dense one and under its names."""
    return named_as(find_blocks(pruned, sizes, rotary=dense.rotary), dense)
