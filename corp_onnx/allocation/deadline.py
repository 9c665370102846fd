"""Widths for a latency on a target: chosen by a table of times, corrected by the clock."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_graphsurgeon as gs

from corp_onnx.allocation import latency_table
from corp_onnx.allocation.budget import least_harm, plan_of
from corp_onnx.allocation.latency_table import LatencyTable
from corp_onnx.allocation.probes import Probe
from corp_onnx.blocks import Catalog
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.deploy.records import Precision, Target
from corp_onnx.errors import PlanError
from corp_onnx.graph.model import Model
from corp_onnx.latency.race import Race
from corp_onnx.latency.stopwatch import Lane, Stopwatch
from corp_onnx.plan import Plan
from corp_onnx.precision import Request
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.checks import Check

log = logging.getLogger(__name__)

TRIES = 6
AIMED = 0.98
"""Of the limit, so that the measured value lies below it."""

LEAST_SAVED = 0.01
"""Of the dense time: an attempt that saved less says nothing of how far the table is off."""

WITHIN = 0.95
"""Of the limit: no more is cut than has to be."""

ALLOWED = 1.05
"""Times the limit: what is still taken for met, as times are never quite the same."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """How long one inference may take on a target.

    Attributes:
        limit: A share of the dense model's time there, or milliseconds.
        in_ms: Whether it is the latter.
        target: Where.
        stopwatch: At which batch and sizes.
        cache: Folder of latency tables; the user's cache unless told otherwise.
    """

    limit: float
    in_ms: bool
    target: Target
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.limit < (float("inf") if self.in_ms else 1 + 1e-9):
            raise PlanError(
                f"--latency {self.limit:g} is not a share of the dense model's time to keep: it "
                "must be above 0 and at most 1 (0.6 keeps 60 %), or a time such as 5ms"
            )

    def require(self, graph: gs.Graph, precision: Precision) -> None:
        """See whether a model can be timed so, before any work is done for it.

        Raises:
            BackendUnavailable: As `Target.require`.
            PlanError: Likewise, or as `Stopwatch.sizes_of`.
        """
        self.target.require(precision)
        self.stopwatch.sizes_of(graph)

    def share(self, dense_ms: float) -> float:
        """As a share of the dense model's time."""
        return self.limit / dense_ms if self.in_ms else self.limit


@dataclass(frozen=True, slots=True)
class Timed:
    """One attempt at widths: the time they were chosen for, and the time that was measured.

    Both are shares of the dense model's time.
    """

    aim: float
    measured: float


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The plan that was chosen for a deadline.

    Attributes:
        deadline: What was asked for.
        plan: The widths.
        limit: As a share of the dense model's time.
        tries: Every attempt, in order.
    """

    deadline: Deadline
    plan: Plan
    limit: float
    tries: tuple[Timed, ...]


def scheduled(
    dense: Model | Path,
    model: Model,
    catalog: Catalog,
    statistics: Statistics,
    probes: Sequence[Probe],
    deadline: Deadline,
    *,
    align: int,
    request: Request | None = None,
    typed: Callable[[Model], Model] = lambda model: model,
    on_variant: Callable[[int], None] = lambda variants: None,
) -> Schedule:
    """Choose widths by harm and by measured time together, until the clock agrees.

    A table says what every width of every axis costs (`latency_table`); it takes costs to add up.
    So the model of the chosen widths, with weights that do not matter, is timed against the dense
    one, and the aim corrected by the ratio of what was saved to what should have been, but never
    beyond an aim that kept the limit or one that missed it, until the time lies within the last
    twentieth below the limit. What keeps it is raced once more and the slower time counts, so that
    no lucky race decides. Of several that keep the limit the slowest is taken; if none does, the
    fastest.

    Args:
        dense: The model, or its file, that is timed for comparison.
        model: The dense model.
        catalog: Its blocks.
        statistics: Of the dense model.
        probes: What every axis is worth.
        deadline: What is to be kept.
        align: Widths are multiples of this.
        request: The precision of the finished model; the dense one is timed as it is.
        typed: Brings a model into the types in which it is to run.
        on_variant: Called with the number of variants that were timed.

    Raises:
        CorpError: As `Stopwatch.race`.
    """
    request = request or Request()
    trial = _Trial(dense, model, catalog, statistics, probes, deadline, align, request, typed)
    table = latency_table.cached(
        lambda: latency_table.measured(
            *(probes, trial.shrunk, deadline.target, deadline.stopwatch),
            precision=request.precision,
            align=align,
            on_variant=on_variant,
        ),
        trial.key(),
        deadline.cache,
    )
    return trial.corrected(table)


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """All that it takes to make models of other widths, and to time them."""

    dense: Model | Path
    model: Model
    catalog: Catalog
    statistics: Statistics
    probes: Sequence[Probe]
    deadline: Deadline
    align: int
    request: Request = field(default_factory=Request)
    typed: Callable[[Model], Model] = lambda model: model

    def shrunk(self, widths: Mapping[int, int]) -> Model:
        """A model of these widths, without repair: as fast, and soon made."""
        chosen = [widths[place] for place in range(len(self.probes))]
        plan = plan_of(self.catalog, self.probes, chosen)
        bare = solve(self.model, self.catalog, plan, self.statistics, Recipe("none"))
        return self.typed(operate(self.model, self.catalog, bare).model)

    def key(self) -> dict[str, object]:
        """All that times depend on, but for the machine."""
        watch = self.deadline.stopwatch
        return {
            "model": self.model.fingerprint.sha256,
            "target": str(self.deadline.target),
            "versions": dict(self.deadline.target.versions()),
            "batch": watch.batch,
            "precision": self.request.name,
            "narrow_io": not self.request.keep_io_types,
            "sizes": {name: list(shape) for name, shape in watch.sizes.items()},
            "align": self.align,
            "axes": sorted(Counter(map(latency_table.kind_of, self.probes)).items()),
        }

    def corrected(self, table: LatencyTable) -> Schedule:
        """Choose, time, correct the aim; and again."""
        costs = table.costs(self.probes)
        race = self._raced({place: probe.width for place, probe in enumerate(self.probes)})
        whole, dense_ms = 1.0 / race.speedups[1].ratio, race.latencies[0].median_ms
        limit = self.deadline.share(dense_ms)
        aim = AIMED * limit
        found: dict[tuple[int, ...], Timed] = {}
        kept, missed = 0.0, whole
        for _ in range(TRIES):
            needed = table.whole_ms * max(0.0, 1.0 - aim / whole)
            widths, missing = least_harm(self.probes, costs, needed, align=self.align)
            if tuple(widths) in found:
                break
            share = self._share(widths)
            if share <= limit:
                share = max(share, self._share(widths))
            found[tuple(widths)] = Timed(aim, share)
            log.info("aimed at %.3f of the dense time, measured %.3f", aim, share)
            if WITHIN * limit <= share <= limit or (missing > 0 and share > limit):
                break
            kept, missed = (max(kept, aim), missed) if share <= limit else (kept, min(missed, aim))
            aim = whole - (whole - AIMED * limit) * (whole - aim) / max(whole - share, LEAST_SAVED)
            if not kept < aim < missed:
                aim = (kept + missed) / 2
        plan = plan_of(self.catalog, self.probes, _best(found, limit))
        return Schedule(self.deadline, plan, limit, tuple(found.values()))

    def _share(self, widths: Sequence[int]) -> float:
        """Of the dense model's time, that of these widths takes."""
        return 1.0 / self._raced(dict(enumerate(widths))).speedups[1].ratio

    def _raced(self, widths: Mapping[int, int]) -> Race:
        small = self.shrunk(widths)
        return against_dense(self.dense, small, self.deadline, self.request.precision)


def _best(found: Mapping[tuple[int, ...], Timed], limit: float) -> tuple[int, ...]:
    """The slowest that keeps the limit, else the fastest."""
    kept = {widths: timed.measured for widths, timed in found.items() if timed.measured <= limit}
    if kept:
        return max(kept, key=kept.__getitem__)
    return min(found, key=lambda widths: found[widths].measured)


def against_dense(
    dense: Model | Path, model: Model, deadline: Deadline, precision: Precision = "fp32"
) -> Race:
    """A model and the dense one, turn by turn."""
    lanes = [Lane(dense, deadline.target), Lane(model, deadline.target, precision)]
    return deadline.stopwatch.race(lanes)


@dataclass(frozen=True, slots=True, eq=False)
class DeadlineOutcome:
    """How a deadline was kept by the finished model, timed against the dense one."""

    schedule: Schedule
    race: Race

    @property
    def share(self) -> float:
        """Of the dense model's time."""
        return 1.0 / self.race.speedups[1].ratio

    def check(self) -> Check:
        """Whether it was, as nearly as times can be told."""
        deadline = self.schedule.deadline
        dense, cut = self.race.latencies
        limit = deadline.share(dense.median_ms)
        met = self.share <= limit * ALLOWED
        found = (
            f"{cut.median_ms:.2f} ms on {deadline.target.name}, {self.share:.3f} of the dense "
            f"model's {dense.median_ms:.2f} ms; asked for {limit:.3f}"
        )
        return Check("latency", met, found if met else f"{found}; nothing nearer was found")
