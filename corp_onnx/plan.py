"""How wide every axis will be."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import lcm

from corp_onnx.blocks import Attention, Axis, Block, Catalog, axes_of, width_of
from corp_onnx.errors import NothingPrunable, PlanError

log = logging.getLogger(__name__)

DEFAULT_SHARES: Mapping[Axis, float] = {"mlp": 0.5, "qk": 0.5}
DEFAULT_ALIGN = 8
"""Widths that are a multiple of this run as fast as kernels can."""


LOOKED_FOR: Mapping[Axis, str] = {
    "mlp": "no two linear layers with a function between them",
    "qk": "no attention",
    "vo": "no attention",
}
"""What is missing in a model that offers nothing, and gives no reasons."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One axis of one block: its dense width and the width it will have.

    For ``mlp`` these are hidden channels, for ``qk`` and ``vo`` channels of every head.
    """

    block: str
    axis: Axis
    width: int
    to: int


LEAST = 2
"""Channels that stay of an axis: one alone could not be told from a size that is no axis."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Every cut, in the order of the graph."""

    cuts: tuple[Cut, ...]

    def concerned(self, catalog: Catalog) -> Catalog:
        """The blocks with no axis but those of a kind that is cut."""
        axes = {cut.axis for cut in self.cuts}
        blocks = [
            replace(block, refused=dict.fromkeys(others, "it is not cut") | dict(block.refused))
            for block in catalog.blocks
            for others in [set(axes_of(block)) - axes]
        ]
        return replace(catalog, blocks=tuple(blocks))


def uniform(
    catalog: Catalog, shares_removed: Mapping[Axis, float], *, align: int = DEFAULT_ALIGN
) -> Plan:
    """The same share removed from every axis of a kind.

    The width that stays is the multiple of ``align`` nearest to ``(1 - share) · width``, at least
    one multiple and two channels, and never more than there is. A share of 0 keeps the width as it
    is, and still makes a cut: the whole surgery is done.

    Raises:
        PlanError: If a share is outside 0…1 or takes everything.
        NothingPrunable: If no block offers an axis that was asked for.
    """
    for axis, share in shares_removed.items():
        if not 0 <= share < 1:
            raise PlanError(
                f"--{axis} {share:g} is not a share to remove: it must be at least 0 and below 1 "
                "(0.5 removes half)"
            )
    if align < 1:
        raise PlanError(f"--align {align} is not a multiple to round to: it must be at least 1")
    require_offered(catalog, shares_removed)
    return Plan(
        tuple(
            Cut(block.id, axis, width, _narrowed(width, share, lcm(align, step_of(block, axis))))
            for block in catalog.blocks
            for axis, share in shares_removed.items()
            if axis in axes_of(block)
            for width in [width_of(block, axis)]
        )
    )


def require_offered(catalog: Catalog, axes: Collection[Axis] = tuple(LOOKED_FOR)) -> None:
    """See whether any block offers one of some axes, or any at all.

    Raises:
        NothingPrunable: If none does; says why.
    """
    if not any(axis in axes for block in catalog.blocks for axis in axes_of(block)):
        raise NothingPrunable(_nothing(catalog, axes))


def warn_of_uncut(plan: Plan, shares_removed: Mapping[Axis, float], *, align: int) -> None:
    """Say which axes keep their width although some of it was to go."""
    for axis, share in shares_removed.items():
        cuts = [cut for cut in plan.cuts if cut.axis == axis]
        if not cuts:
            log.warning("no block offers the axis %r; nothing of it is cut", axis)
        widths = {cut.width for cut in cuts if cut.to == cut.width}
        if share > 0 and widths:
            log.warning(
                "--%s %g leaves axes of width %s as they are, rounded to multiples of %d; give a "
                "smaller --align",
                *(axis, share, ", ".join(map(str, sorted(widths))), align),
            )


def _narrowed(width: int, share: float, align: int) -> int:
    if share == 0:
        return width
    wanted = round((1 - share) * width / align) * align
    return min(width, max(least_width(width, align), wanted))


def step_of(block: Block, axis: Axis) -> int:
    """How many channels of an axis go together: pairs, where these are rotated."""
    return 2 if axis == "qk" and isinstance(block, Attention) and block.rotation else 1


def least_width(width: int, align: int) -> int:
    """The least that can stay of an axis: one multiple of ``align``, and two channels."""
    return min(width, max(align, LEAST))


def _nothing(catalog: Catalog, axes: Collection[Axis]) -> str:
    """Why nothing can be cut, with every reason that was found."""
    wanted = " or ".join(axes)
    reasons = [f"{item.op} {item.node!r}: {item.reason}" for item in catalog.refusals]
    reasons += [reason for block in catalog.blocks for reason in _refused(block, axes)]
    found = "; ".join(reasons[:5]) or " and ".join(dict.fromkeys(LOOKED_FOR[axis] for axis in axes))
    more = f" (and {len(reasons) - 5} more; see `corp-onnx inspect`)" if len(reasons) > 5 else ""
    return f"nothing prunable was found for {wanted}: {found}{more}"


def _refused(block: Block, axes: Collection[Axis]) -> list[str]:
    return [f"{block.id} {axis}: {why}" for axis, why in block.refused.items() if axis in axes]
