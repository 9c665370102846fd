"""The whole story on one screen: from a model and some inputs to a smaller model with evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from corp_onnx.blocks import Axis, Catalog, find_blocks
from corp_onnx.budget import Budget, within
from corp_onnx.calibrate import calibrate
from corp_onnx.checking import Gates, verify
from corp_onnx.clock import Clock
from corp_onnx.data import Dataset
from corp_onnx.deadline import Deadline, Kept, against_dense, scheduled
from corp_onnx.graph import Model, load, require_writable, save
from corp_onnx.plan import DEFAULT_ALIGN, DEFAULT_SHARES, Plan, uniform
from corp_onnx.precision import Request, Typed, in_precision, require_convertible
from corp_onnx.probes import Probe, offered, probe
from corp_onnx.session import Runtime
from corp_onnx.sizes import Sizes
from corp_onnx.solve import Recipe
from corp_onnx.solved import Solved, from_statistics, in_sequence
from corp_onnx.statistics import Statistics
from corp_onnx.surgery import Surgery, operate
from corp_onnx.verify import Check, Verification, check_gates

Knowledge = Callable[[Model], Dataset] | Path
"""Opens calibration data for a model, or is the file of earlier statistics."""

DENSE = "dense"
"""Name of the comparison of a typed model with the dense one."""

PROBED_BATCHES = 2
"""Of calibration samples, for seeing what a cut of one axis does."""


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """A smaller model and the record of every stage that made it."""

    catalog: Catalog
    plan: Plan
    solved: Solved
    surgery: Surgery
    verification: Verification
    seconds: Mapping[str, float]
    kept: Kept | None = None
    """How a deadline was kept, where one was given."""
    typed: Typed | None = None
    """The same in another precision, where one was asked for."""
    typed_checks: tuple[Check, ...] = ()
    """The user's limits, held against what is written then."""

    @property
    def passed(self) -> bool:
        """Whether all checks hold."""
        return self.verification.passed and all(check.passed for check in self.typed_checks)

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
        runtime: How models are run.
        seed: Decides which samples are held out, and what crops show.
        crops: Inputs to calibrate on that are made of every picture; None fills small sets up.
        request: The precision that the result is written in.
        on_batch: Called after every calibration batch with its number of samples.
        on_block: Called with every block that is done, where they are fitted in sequence.
    """

    align: int = DEFAULT_ALIGN
    recipe: Recipe = field(default_factory=Recipe)
    gates: Gates = field(default_factory=Gates)
    sizes: Sizes | None = None
    runtime: Runtime | None = None
    seed: int = 0
    crops: int | None = None
    request: Request = field(default_factory=Request)
    on_batch: Callable[[int], None] = lambda samples: None
    on_block: Callable[[str], None] = lambda block: None


def prune(
    path: Path,
    output: Path,
    knowledge: Knowledge,
    *,
    shares_removed: Mapping[Axis, float] = DEFAULT_SHARES,
    budget: Budget | Deadline | None = None,
    settings: Settings | None = None,
) -> Pruned:
    """Cut a model and write the result to ``output``.

    Args:
        path: The dense ONNX file.
        output: Where the smaller one goes; it appears whole or not at all.
        knowledge: Opens calibration data for the model, or the file of earlier statistics.
        shares_removed: By axis, the share of its width to remove, the same in every block.
        budget: What may stay of the whole, or how long it may take, instead of shares: widths
            are then chosen by block.
        settings: How models are cut.

    Raises:
        CorpError: Whatever is wrong with the model, the data or the request.
    """
    require_writable(output)
    work = Work.begun(path, settings or Settings())
    if budget is None:
        plan = uniform(work.catalog, shares_removed, align=work.settings.align)
        result = work.informed(knowledge).cut(plan)
    elif isinstance(budget, Budget):
        work = work.informed(knowledge).calibrated()
        result = work.cut(work.within(budget, work.probed()))
    else:
        budget.require(work.model.graph)
        result = work.informed(knowledge).calibrated().in_time(path, budget)
    result = work.typed(result)
    with work.clock.stage("save"):
        save(result.model, output)
    return result


def sweep(
    path: Path,
    outputs: Mapping[Path, Budget],
    knowledge: Callable[[Model], Dataset],
    *,
    settings: Settings | None = None,
) -> Mapping[Path, Pruned]:
    """Cut a model to several budgets, from one calibration, and write all results.

    Raises:
        CorpError: As `prune`.
    """
    for output in outputs:
        require_writable(output)
    work = Work.begun(path, settings or Settings()).informed(knowledge).calibrated()
    probes = work.probed()
    results = {}
    for output, plan in [(path, work.within(budget, probes)) for path, budget in outputs.items()]:
        results[output] = work.cut(plan)
        save(results[output].surgery.model, output)
    return results


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
        with clock.stage("blocks"):
            catalog = find_blocks(model, settings.sizes)
        if not offered(catalog):
            uniform(catalog, DEFAULT_SHARES)  # says why nothing can be cut
        return Work(model, catalog, settings, clock)

    def informed(self, knowledge: Knowledge) -> Work:
        """With data, or with earlier statistics."""
        if isinstance(knowledge, Path):
            return replace(self, statistics=Statistics.load(knowledge))
        return replace(self, data=knowledge(self.model))

    def calibrated(self) -> Work:
        """With statistics of the dense model."""
        if self.statistics is not None:
            return self
        assert self.data is not None, "there are data or statistics"
        given = self.settings
        with self.clock.stage("calibrate"):
            statistics = calibrate(
                self.model,
                self.catalog,
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
                self.statistics.seen[:PROBED_BATCHES],
                Recipe(ridge=self.settings.recipe.ridge, device=self.settings.recipe.device),
                align=self.settings.align,
                runtime=self.settings.runtime,
            )

    def within(self, budget: Budget, probes: Sequence[Probe]) -> Plan:
        """Widths that keep a budget."""
        return within(self.catalog, probes, budget, align=self.settings.align)

    def in_time(self, path: Path, deadline: Deadline) -> Pruned:
        """Widths that keep a deadline, cut and timed once more."""
        assert self.statistics is not None, "calibrated before"
        with self.clock.stage("schedule"):
            schedule = scheduled(
                *(path, self.model, self.catalog, self.statistics, self.probed(), deadline),
                align=self.settings.align,
                typed=self._typed_for_timing,
            )
        result = self.cut(schedule.plan)
        with self.clock.stage("latency"):
            model = self._typed_for_timing(result.surgery.model)
            kept = Kept(schedule, against_dense(path, model, deadline))
        checks = (*result.verification.checks, kept.check())
        verification = replace(result.verification, checks=checks)
        return replace(result, verification=verification, kept=kept)

    def _typed_for_timing(self, model: Model) -> Model:
        """The model in the precision asked for, whatever that costs."""
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
        statistics = self.calibrated().statistics
        assert statistics is not None, "calibrated"
        with self.clock.stage("solve"):
            return from_statistics(self.model, self.catalog, plan, statistics, given.recipe)
