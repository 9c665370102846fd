"""The whole story on one screen: from a model and some inputs to a smaller model with evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from corp_onnx.blocks import Axis, Catalog, find_blocks
from corp_onnx.blocks.catalog import named_as
from corp_onnx.calibrate import calibrate
from corp_onnx.data import Dataset
from corp_onnx.errors import PlanError
from corp_onnx.graph import Model, load, require_writable, save
from corp_onnx.plan import DEFAULT_ALIGN, DEFAULT_SHARES, Plan, uniform
from corp_onnx.promise import Measured, measured_errors, stream_errors
from corp_onnx.session import Runtime, open_session
from corp_onnx.sizes import Sizes
from corp_onnx.solve import Recipe
from corp_onnx.solved import Solved, from_statistics, in_sequence
from corp_onnx.statistics import Statistics
from corp_onnx.surgery import Surgery, operate
from corp_onnx.verify import (
    Check,
    Verification,
    check_gates,
    check_promises,
    check_repair,
    check_structure,
    compare_each,
)


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits that the user sets on held-out samples."""

    max_error: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        if self.max_error is not None and not self.max_error >= 0:
            raise PlanError(f"--max-error {self.max_error:g} is no limit; it must be 0 or more")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise PlanError(
                f"--min-agreement {self.min_agreement:g} is no share of samples; it must be "
                "between 0 and 1"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """A smaller model and the record of every stage that made it."""

    catalog: Catalog
    plan: Plan
    solved: Solved
    surgery: Surgery
    verification: Verification
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds that every stage took, by name."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage; several visits to the same stage add up."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def prune(
    path: Path,
    output: Path,
    knowledge: Callable[[Model], Dataset] | Path,
    *,
    shares_removed: Mapping[Axis, float] = DEFAULT_SHARES,
    align: int = DEFAULT_ALIGN,
    recipe: Recipe | None = None,
    gates: Gates | None = None,
    sizes: Sizes | None = None,
    runtime: Runtime | None = None,
    seed: int = 0,
    crops: int = 1,
    on_batch: Callable[[int], None] = lambda samples: None,
    on_block: Callable[[str], None] = lambda block: None,
) -> Pruned:
    """Cut a model and write the result to ``output``.

    Args:
        path: The dense ONNX file.
        output: Where the smaller one goes; it appears whole or not at all.
        knowledge: Opens calibration data for the model, or the file of earlier statistics.
        shares_removed: By axis, the share of its width to remove.
        align: Widths become multiples of this.
        recipe: Method, ranking and ridge.
        gates: The user's own limits.
        sizes: Input dimensions for counting MACs.
        runtime: How models are run.
        seed: Decides which samples are held out, and what crops show.
        crops: Inputs to calibrate on that are made of every picture.
        on_batch: Called after every calibration batch with its number of samples.
        on_block: Called with every block that is done, where they are fitted in sequence.

    Raises:
        CorpError: Whatever is wrong with the model, the data or the request.
    """
    require_writable(output)
    clock, recipe = Clock(), recipe or Recipe()
    with clock.stage("load"):
        model = load(path)
    with clock.stage("blocks"):
        catalog = find_blocks(model, sizes)
        plan = uniform(catalog, shares_removed, align=align)
    if isinstance(knowledge, Path):
        with clock.stage("calibrate"):
            statistics = Statistics.load(knowledge)
        with clock.stage("solve"):
            solved = from_statistics(model, catalog, plan, statistics, recipe)
    elif recipe.method == "best" and recipe.refit:
        with clock.stage("fit"):
            solved = in_sequence(
                *(model, catalog, plan, knowledge(model), recipe),
                runtime=runtime,
                seed=seed,
                crops=crops,
                on_block=on_block,
            )
    else:
        with clock.stage("calibrate"):
            statistics = calibrate(
                model,
                catalog,
                knowledge(model),
                runtime=runtime,
                seed=seed,
                crops=crops,
                on_batch=on_batch,
            )
        with clock.stage("solve"):
            solved = from_statistics(model, catalog, plan, statistics, recipe)
    with clock.stage("surgery"):
        surgery = operate(model, catalog, solved.solution)
    with clock.stage("verify"):
        verification = verify(
            *(model, catalog, plan, solved, surgery),
            gates=gates or Gates(),
            sizes=sizes,
            runtime=runtime,
        )
    with clock.stage("save"):
        save(surgery.model, output)
    return Pruned(catalog, plan, solved, surgery, verification, clock.seconds)


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
    found = named_as(find_blocks(surgery.model, sizes), catalog)
    checks: list[Check] = [check_structure(plan, surgery.model, model, found)]
    candidates = [surgery.model]
    if solved.solution.method != "none":
        candidates.append(operate(model, catalog, solved.bare).model)
    comparison, *unrepaired = compare_each(
        open_session(model, runtime),
        [open_session(candidate, runtime) for candidate in candidates],
        solved.held_out,
    )
    if checks[0].passed:
        measured = kept_promises(model, catalog, surgery.model, found, solved, runtime)
        checks.append(check_promises(solved.solution, measured))
    checks += [check_repair(comparison, bare) for bare in unrepaired]
    checks += check_gates(comparison, max_error=gates.max_error, min_agreement=gates.min_agreement)
    return Verification(tuple(checks), comparison)


def kept_promises(
    model: Model,
    catalog: Catalog,
    pruned: Model,
    found: Catalog,
    solved: Solved,
    runtime: Runtime | None,
) -> Measured:
    """What every fold of a solution really does, on samples that it was solved from."""
    solution, seen = solved.solution, solved.seen

    def measure(
        smaller: Model, blocks: Catalog, axes: tuple[Axis, ...], *, behind_pruned: bool = False
    ) -> Measured:
        return measured_errors(
            model,
            catalog,
            smaller,
            blocks,
            seen,
            runtime,
            axes=axes,
            behind_pruned=behind_pruned,
            without_row_constants=solution.method == "best",
        )

    if solution.in_sequence:
        logits = measure(pruned, found, ("qk",), behind_pruned=True)
        return logits | stream_errors(model, catalog, pruned, solution, seen, runtime)
    measured = measure(pruned, found, ("mlp", "qk"))
    values = tuple(fold for fold in solution.folds if fold.axis == "vo")
    if not values:
        return measured
    alone = operate(model, catalog, replace(solution, folds=values)).model
    return measured | measure(alone, named_as(find_blocks(alone), catalog), ("vo",))
