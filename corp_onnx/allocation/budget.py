"""Unequal widths: as little harm as possible for what must go of a model's cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, lcm
from typing import Literal

import numpy as np
from jaxtyping import Float64

from corp_onnx.allocation.probes import Probe
from corp_onnx.blocks import Catalog
from corp_onnx.errors import PlanError
from corp_onnx.plan import Cut, Plan, least_width
from corp_onnx.surgery.operate import Surgery
from corp_onnx.verify.checks import Check

Unit = Literal["macs", "params"]


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of a model may stay."""

    unit: Unit
    kept: float
    """The share of the dense model's, above 0 and at most 1."""

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1:
            raise PlanError(
                f"--{self.unit} {self.kept:g} is not a share to keep: it must be above 0 and at "
                "most 1 (0.6 keeps 60 %)"
            )

    def check(self, surgery: Surgery) -> Check:
        """Whether it was kept."""
        found = self.share(surgery)
        said = f"{found:.1%} of the {self.unit} remain; asked for {self.kept:.1%}"
        return Check(self.unit, found <= self.kept + ROUNDING, said)

    def share(self, surgery: Surgery) -> float:
        """What is left of the dense model's."""
        if self.unit == "macs":
            return surgery.pruned.total / surgery.dense.total
        return surgery.pruned.params / surgery.dense.params


FURTHER = 1e-3
"""Of the whole, what is cut beyond what was missing, where costs do not add up; then twice that."""

ROUNDING = 1e-9
"""Of the whole."""

Costs = Sequence[Float64[np.ndarray, " w1"]]
"""Of every probe, what each width 0, 1, … ``width`` of it costs; never less for more."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One axis made narrower, from one corner of its curve to the next."""

    probe: int
    to: int
    price: float
    """Harm for what is saved."""


def within(
    catalog: Catalog,
    probes: Sequence[Probe],
    budget: Budget,
    *,
    align: int,
    left: Callable[[Plan], float] | None = None,
) -> Plan:
    """The plan that keeps a budget and does the least harm, as far as harms add up.

    Costs need not add up: a layer between two hidden axes costs the product of both, and a layer
    that is repaired gets a bias. So what really stays is counted, and more is cut until it fits.

    Args:
        catalog: The blocks.
        probes: What every axis is worth.
        budget: How much may stay.
        align: Widths are multiples of this.
        left: Counts the share that really stays under a plan; without it costs are added up.

    Raises:
        PlanError: If the budget cannot be kept, with the least that can be.
    """
    dense = catalog.macs if budget.unit == "macs" else catalog.params
    channels = [probe.macs if budget.unit == "macs" else probe.params for probe in probes]
    costs = [
        np.arange(probe.width + 1) * max(one, 0.0)
        for probe, one in zip(probes, channels, strict=True)
    ]
    aim, further = budget.kept, FURTHER
    while True:
        widths, missing = least_harm(probes, costs, dense * (1.0 - aim), align=align)
        plan = plan_of(catalog, probes, widths)
        saved = sum(float(cost[-1] - cost[to]) for cost, to in zip(costs, widths, strict=True))
        found = left(plan) if left else 1.0 - saved / dense
        if found <= budget.kept + ROUNDING:
            return plan
        if missing > 0:
            raise PlanError(
                f"--{budget.unit} {budget.kept:g} cannot be kept: with every axis as narrow as it "
                f"can be, {ceil(found * 1000) / 1000:.3f} of the {budget.unit} remain; ask "
                "for that or more"
            )
        aim -= found - budget.kept + further
        further *= 2


def least_harm(
    probes: Sequence[Probe], costs: Costs, needed: float, *, align: int
) -> tuple[list[int], float]:
    """Widths that save what is needed, and how much of that cannot be saved.

    Of every axis only the widths on the lower convex hull of its curve, harm over cost, are worth
    having. From these the cheapest step is taken, again and again, until enough is saved: for
    convex curves that add up this is the optimum at every cost that it stops at. The last step
    is taken only as far as it has to be.

    Source: allocation along convex hulls (Shoham & Gersho 1988), there of bits to quantisers.

    Args:
        probes: What every axis is worth.
        costs: What it costs.
        needed: How much less all of them must cost together.
        align: Widths are multiples of this.
    """
    widths = [probe.width for probe in probes]
    steps = sorted(
        (
            step
            for place, probe in enumerate(probes)
            for step in _steps(place, probe, costs[place], lcm(align, probe.step))
        ),
        key=lambda step: step.price,
    )
    for step in steps:
        if needed <= 0:
            break
        cost, here = costs[step.probe], widths[step.probe]
        multiple = lcm(align, probes[step.probe].step)
        width = _only_as_far_as_needed(cost, here, step.to, needed, multiple)
        needed -= float(cost[here] - cost[width])
        widths[step.probe] = width
    return widths, max(needed, 0.0)


def _steps(
    place: int, probe: Probe, cost: Float64[np.ndarray, " w1"], align: int
) -> Iterator[_Step]:
    """From the dense width down along the hull; prices rise from one step to the next."""
    widths = [probe.width, *_aligned(probe.width, least_width(probe.width, align), align)]
    at = 0
    while at + 1 < len(widths):
        here, below = widths[at], np.array(widths[at + 1 :])
        saved = cost[here] - cost[below]
        if not (saved > 0).any():
            return
        with np.errstate(divide="ignore", invalid="ignore"):
            prices = np.where(saved > 0, (probe.harm[below] - probe.harm[here]) / saved, np.inf)
        best = int(np.argmin(prices))
        at += best + 1
        yield _Step(place, widths[at], float(prices[best]))


def _aligned(width: int, least: int, align: int) -> range:
    """The multiples of ``align`` below a width, the widest first."""
    return range((width - 1) // align * align, least - 1, -align)


def _only_as_far_as_needed(
    cost: Float64[np.ndarray, " w1"], width: int, to: int, needed: float, align: int
) -> int:
    """The widest multiple of ``align`` from ``to`` on that saves enough."""
    for between in _aligned(width, to, align):
        if cost[width] - cost[between] >= needed:
            return between
    return to


def plan_of(catalog: Catalog, probes: Sequence[Probe], widths: Sequence[int]) -> Plan:
    """Every axis in the order of the graph, also those that keep their width."""
    found = {
        (block, probe.axis): Cut(block, probe.axis, probe.width, width)
        for probe, width in zip(probes, widths, strict=True)
        for block in probe.blocks
    }
    order = {block.id: place for place, block in enumerate(catalog.blocks)}
    return Plan(tuple(sorted(found.values(), key=lambda cut: order[cut.block])))
