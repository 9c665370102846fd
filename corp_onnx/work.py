"""The stages one after the other, with what each of them needs of the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from corp_onnx.allocation.budget import Budget, within
from corp_onnx.allocation.deadline import Deadline, DeadlineOutcome, against_dense, scheduled
from corp_onnx.allocation.probes import Probe, probe
from corp_onnx.blocks import Catalog, find_blocks
from corp_onnx.calibration.calibrate import BATCH_SIZE, calibrate, gather
from corp_onnx.calibration.independence import warn_of_mixing
from corp_onnx.calibration.scarcity import spared
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.clock import Clock
from corp_onnx.data.batching import Batch, first
from corp_onnx.data.dataset import Dataset
from corp_onnx.data.samples import drawn, held_out
from corp_onnx.errors import PlanError
from corp_onnx.graph.model import Model, load
from corp_onnx.graph.sizes import Sizes
from corp_onnx.plan import DEFAULT_ALIGN, Plan, require_offered
from corp_onnx.precision import Request, Typed, in_precision, require_convertible
from corp_onnx.session import Runtime
from corp_onnx.solve import Recipe, solve
from corp_onnx.solved import Solved, from_statistics, in_sequence
from corp_onnx.surgery.operate import Surgery, operate
from corp_onnx.verify.checks import Check, Gates, Verification, check_gates
from corp_onnx.verify.comparison import require_judged
from corp_onnx.verify.confirm import confirmed
from corp_onnx.verify.verify import verify

log = logging.getLogger(__name__)

Knowledge = Callable[[Model], Dataset] | Path
"""Opens calibration data for a model, or is the file of earlier statistics."""

DENSE = "dense"
"""Name of the comparison of a typed model with the dense one."""

PROBED = 16
"""Calibration samples for seeing what a cut of one axis does."""


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """A smaller model and the record of every stage that made it."""

    catalog: Catalog
    plan: Plan
    solved: Solved
    surgery: Surgery
    verification: Verification
    seconds: Mapping[str, float]
    deadline: DeadlineOutcome | None = None
    """How a deadline was kept, where one was given."""
    typed: Typed | None = None
    """The same in another precision, where one was asked for."""
    typed_checks: tuple[Check, ...] = ()
    """The user's limits, held against what is written then."""

    @property
    def passed(self) -> bool:
        """Whether all checks hold."""
        return self.verification.passed and all(check.passed for check in self.typed_checks)

    def held_to(self, check: Check) -> Pruned:
        """With one more check."""
        checks = (*self.verification.checks, check)
        return replace(self, verification=replace(self.verification, checks=checks))

    @property
    def model(self) -> Model:
        """What is written."""
        return self.surgery.model if self.typed is None else self.typed.model


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """How models are cut, whatever their widths.

    Attributes:
        align: Widths become multiples of this.
        recipe: Method, ranking and ridge.
        gates: The user's own limits.
        sizes: Input dimensions for counting MACs.
        rotary: Whether rotated queries and keys are cut too, by whole pairs of channels.
        runtime: How models are run.
        seed: Decides which samples are held out, and what crops show.
        crops: Inputs to calibrate on that are made of every picture; None fills small sets up.
        request: The precision that the result is written in.
        on_batch: Called after every calibration batch with its number of samples.
        on_block: Called with every block that is done, where they are fitted in sequence.
        on_variant: Called with the number of variants that were timed, for a deadline.
    """

    align: int = DEFAULT_ALIGN
    recipe: Recipe = field(default_factory=Recipe)
    gates: Gates = field(default_factory=Gates)
    sizes: Sizes | None = None
    rotary: bool = False
    runtime: Runtime | None = None
    seed: int = 0
    crops: int | None = None
    request: Request = field(default_factory=Request)
    on_batch: Callable[[int], None] = lambda samples: None
    on_block: Callable[[str], None] = lambda block: None
    on_variant: Callable[[int], None] = lambda variants: None


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A model with its blocks, and what is known of its inputs, ready to be cut."""

    model: Model
    catalog: Catalog
    settings: Settings
    clock: Clock
    data: Dataset | None = None
    statistics: Statistics | None = None

    @staticmethod
    def begun(path: Path, settings: Settings) -> Work:
        """A model, loaded, with its blocks."""
        clock = Clock()
        with clock.stage("load"):
            model = load(path)
        require_convertible(model, settings.request)
        require_judged(model)
        with clock.stage("blocks"):
            catalog = find_blocks(model, settings.sizes, rotary=settings.rotary)
        require_offered(catalog)
        return Work(model, catalog, settings, clock)

    def informed(self, knowledge: Knowledge) -> Work:
        """With data or earlier statistics; without axes of which these say too little or ill."""
        if isinstance(knowledge, Path):
            statistics = Statistics.load(knowledge)
            statistics.require_of(self.model.fingerprint.sha256)
            known = replace(self, statistics=statistics)
            return known._confirmed(spared(self.catalog, statistics), statistics.seen)
        data = knowledge(self.model)
        some = [*drawn(data, BATCH_SIZE, self.settings.seed).batches(BATCH_SIZE)]
        if data.fixed_batch is None:
            warn_of_mixing(self.model, some[0], self.settings.runtime)
        few = gather(self.model, self.catalog, some, runtime=self.settings.runtime)
        used = data.samples - held_out(data)
        known = replace(self, data=data)
        return known._confirmed(spared(self.catalog, few, used), some)

    def _confirmed(self, catalog: Catalog, batches: Iterable[Batch]) -> Work:
        """With those blocks of the catalog that these samples show to be what they were read as."""
        with self.clock.stage("confirm"):
            found = confirmed(self.model, catalog, batches, self.settings.runtime)
        require_offered(found)
        return replace(self, catalog=found)

    def calibrated(self, plan: Plan | None = None) -> Work:
        """With statistics of the dense model, of all that can be cut or of what a plan cuts."""
        if self.statistics is not None:
            return self
        assert self.data is not None, "there are data or statistics"
        given = self.settings
        with self.clock.stage("calibrate"):
            statistics = calibrate(
                self.model,
                plan.concerned(self.catalog) if plan else self.catalog,
                self.data,
                runtime=given.runtime,
                seed=given.seed,
                crops=given.crops,
                device=given.recipe.device,
                on_batch=given.on_batch,
            )
        return replace(self, statistics=statistics)

    def probed(self) -> tuple[Probe, ...]:
        """What every axis is worth."""
        assert self.statistics is not None, "calibrated before"
        with self.clock.stage("probe"):
            return probe(
                self.model,
                self.catalog,
                self.statistics,
                first(self.statistics.seen, PROBED),
                Recipe(ridge=self.settings.recipe.ridge, device=self.settings.recipe.device),
                align=self.settings.align,
                runtime=self.settings.runtime,
            )

    def within(self, budget: Budget, probes: Sequence[Probe]) -> Plan:
        """Widths that keep a budget."""

        def left(plan: Plan) -> float:
            assert self.statistics is not None, "calibrated before"
            recipe = self.settings.recipe.bare
            bare = solve(self.model, self.catalog, plan, self.statistics, recipe)
            return budget.share(operate(self.model, self.catalog, bare))

        return within(self.catalog, probes, budget, align=self.settings.align, left=left)

    def plans(self, budgets: Mapping[Path, Budget]) -> Mapping[Path, Plan]:
        """Those for all budgets that can be kept.

        Raises:
            PlanError: If none can.
        """
        probes = self.probed()
        found: dict[Path, Plan] = {}
        refused: list[PlanError] = []
        for output, budget in budgets.items():
            try:
                found[output] = self.within(budget, probes)
            except PlanError as error:
                refused.append(error)
        if not found:
            raise refused[0]
        for reason in refused:
            log.warning("%s", reason)
        return found

    def in_time(self, path: Path, deadline: Deadline) -> Pruned:
        """Widths that keep a deadline, cut and timed once more."""
        assert self.statistics is not None, "calibrated before"
        with self.clock.stage("schedule"):
            schedule = scheduled(
                *(path, self.model, self.catalog, self.statistics, self.probed(), deadline),
                align=self.settings.align,
                request=self.settings.request,
                typed=self._typed_for_timing,
                on_variant=self.settings.on_variant,
            )
        result = self.cut(schedule.plan)
        with self.clock.stage("latency"):
            model = self._typed_for_timing(result.surgery.model)
            precision = self.settings.request.precision
            outcome = DeadlineOutcome(schedule, against_dense(path, model, deadline, precision))
        return replace(result.held_to(outcome.check()), deadline=outcome)

    def _typed_for_timing(self, model: Model) -> Model:
        """The model in the precision that is written, whatever that costs."""
        assert self.statistics is not None, "calibrated before"
        request, seen = replace(self.settings.request, limit=float("inf")), self.statistics.seen[:1]
        if request.wants_nothing:
            return model
        return in_precision(model, request, seen, seen, runtime=self.settings.runtime).model

    def cut(self, plan: Plan) -> Pruned:
        """Solve a plan, carry it out, and verify the result."""
        solved = self._solved(plan)
        with self.clock.stage("surgery"):
            surgery = operate(self.model, self.catalog, solved.solution)
        with self.clock.stage("verify"):
            verification = verify(
                *(self.model, self.catalog, plan, solved, surgery),
                gates=self.settings.gates,
                sizes=self.settings.sizes,
                runtime=self.settings.runtime,
            )
        return Pruned(self.catalog, plan, solved, surgery, verification, self.clock.seconds)

    def typed(self, result: Pruned) -> Pruned:
        """The result in the precision asked for, compared with itself before and with the dense."""
        given = self.settings
        if given.request.wants_nothing:
            return result
        with self.clock.stage("precision"):
            made = in_precision(
                *(result.surgery.model, given.request, result.solved.seen, result.solved.held_out),
                others={DENSE: self.model},
                runtime=given.runtime,
            )
        limits = check_gates(
            made.against[DENSE],
            max_error=given.gates.max_error,
            min_agreement=given.gates.min_agreement,
        )
        return replace(result, typed=made, typed_checks=limits)

    def _solved(self, plan: Plan) -> Solved:
        """Block by block where the method does so and there are data to run, else in one shot."""
        given = self.settings
        if self.data is not None and given.recipe.goes_in_sequence:
            with self.clock.stage("fit"):
                return in_sequence(
                    *(self.model, self.catalog, plan, self.data, given.recipe),
                    runtime=given.runtime,
                    seed=given.seed,
                    crops=given.crops,
                    on_batch=given.on_batch,
                    on_block=given.on_block,
                )
        statistics = self.calibrated(plan).statistics
        assert statistics is not None, "calibrated"
        with self.clock.stage("solve"):
            return from_statistics(self.model, self.catalog, plan, statistics, given.recipe)
