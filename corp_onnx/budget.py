"""Unequal widths: as little harm as possible for the multiply-adds or parameters that must go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from corp_onnx.blocks import Catalog
from corp_onnx.errors import PlanError
from corp_onnx.plan import Cut, Plan, least_width
from corp_onnx.probes import Probe

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


@dataclass(frozen=True, slots=True)
class _Step:
    """One axis made narrower, from one corner of its curve to the next."""

    probe: int
    to: int
    saved: float
    price: float
    """Harm for each multiply-add or parameter saved."""


def within(catalog: Catalog, probes: Sequence[Probe], budget: Budget, *, align: int) -> Plan:
    """The plan that keeps a budget and does the least harm, as far as harms add up.

    Of every axis only the widths on the lower convex hull of its curve, harm over cost, are worth
    having. From these the cheapest step is taken, again and again, until the budget is kept: for
    convex curves that add up this is the optimum at every budget that it stops at. The last step
    is taken only as far as it has to be.

    Args:
        catalog: The blocks.
        probes: What every axis is worth.
        budget: How much may stay.
        align: Widths are multiples of this.

    Raises:
        PlanError: If the budget cannot be kept, with the least that can be.
    """
    dense = catalog.macs if budget.unit == "macs" else catalog.params
    needed = dense * (1.0 - budget.kept)
    widths = [probe.width for probe in probes]
    steps = sorted(
        (
            step
            for place, probe in enumerate(probes)
            for step in _steps(place, probe, budget, align)
        ),
        key=lambda step: step.price,
    )
    for step in steps:
        if needed <= 0:
            break
        cost = _cost(probes[step.probe], budget)
        width = _only_as_far_as_needed(widths[step.probe], step.to, needed / cost, align)
        needed -= (widths[step.probe] - width) * cost
        widths[step.probe] = width
    if needed > 0:
        least = 1.0 - (dense * (1.0 - budget.kept) - needed) / dense
        raise PlanError(
            f"--{budget.unit} {budget.kept:g} cannot be kept: with every axis as narrow as it can "
            f"be, {least:.2f} of the {budget.unit} remain; ask for that or more"
        )
    return _plan(catalog, probes, widths)


def _cost(probe: Probe, budget: Budget) -> float:
    return probe.macs if budget.unit == "macs" else probe.params


def _steps(place: int, probe: Probe, budget: Budget, align: int) -> Iterator[_Step]:
    """From the dense width down along the hull; prices rise from one step to the next."""
    cost = _cost(probe, budget)
    least = least_width(probe.width, align)
    aligned = range((probe.width - 1) // align * align, least - 1, -align)
    widths = [probe.width, *(width for width in aligned if width < probe.width)]
    at = 0
    while cost > 0 and at + 1 < len(widths):
        here = widths[at]
        prices = [
            (probe.harm[width] - probe.harm[here]) / ((here - width) * cost)
            for width in widths[at + 1 :]
        ]
        best = min(range(len(prices)), key=lambda index: (prices[index], index))
        at += best + 1
        yield _Step(place, widths[at], (here - widths[at]) * cost, prices[best])


def _only_as_far_as_needed(width: int, to: int, channels: float, align: int) -> int:
    """The widest multiple of ``align`` from ``to`` on that gives up enough channels."""
    enough = int((width - channels) // align) * align
    return min(max(to, enough), width) if enough < width else to


def _plan(catalog: Catalog, probes: Sequence[Probe], widths: Sequence[int]) -> Plan:
    """Every axis in the order of the graph, also those that keep their width."""
    found = {
        (block, probe.axis): Cut(block, probe.axis, probe.width, width)
        for probe, width in zip(probes, widths, strict=True)
        for block in probe.blocks
    }
    order = {block.id: place for place, block in enumerate(catalog.blocks)}
    return Plan(tuple(sorted(found.values(), key=lambda cut: order[cut.block])))
