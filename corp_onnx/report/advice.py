"""What a user should know of the data and of the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from corp_onnx.solve.folds import Solution

SMALL_ERROR = 1e-4
"""Relative error of a block below which its gap matters to nobody."""

WIDE_GAP, GOOD_GAP = 0.10, 0.05
"""How much larger the unseen error may be before advice is given, and what the advice aims at."""


def gaps(solution: Solution) -> Mapping[str, float]:
    """By block and axis, by how much the unseen error exceeds the seen one, as a share of it.

    The unseen error is that of a fit to the other part of the samples, about half of them; a fit to
    all has about half the gap, because it shrinks with the number of samples.
    """
    return {
        f"{fold.block} {fold.axis}" if fold.axis else fold.block: max(
            fold.evidence.unseen / fold.evidence.error - 1.0, 0.0
        )
        for fold in solution.folds
        if fold.evidence.unseen is not None and fold.evidence.error > SMALL_ERROR
    }


def advice(solution: Solution, samples: int) -> tuple[str, ...]:
    """What to do about a set that is too small or too uniform; nothing if it is neither."""
    unseen = [fold.evidence.unseen for fold in solution.folds]
    if solution.in_sequence and unseen and set(unseen) == {None}:
        return (
            f"{samples} calibration inputs are too few to hold some of them out of a fit, so "
            "nothing was fitted to the dense stream: give some hundreds",
        )
    found = gaps(solution)
    if not found:
        return ()
    mean = float(np.mean(list(found.values()))) / 2.0
    worst = max(found, key=found.__getitem__)
    if mean <= WIDE_GAP:
        return ()
    wanted = int(np.ceil(samples * mean / GOOD_GAP / 10.0)) * 10
    return (
        f"on inputs that a fit has not seen, blocks err by about {mean:.0%} more than on those "
        f"that it has, and {worst} by {found[worst] / 2.0:.0%}: {samples} calibration inputs are "
        f"few, or too alike. About {wanted} of equal variety, or fewer from more sources, would "
        f"bring that to {GOOD_GAP:.0%}",
    )


def uncounted(nodes: Sequence[str]) -> tuple[str, ...]:
    """That MACs leave nodes out, if they do."""
    if not nodes:
        return ()
    several = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
    return (
        f"MACs leave out {nodes[0]}{several}: how much they multiply depends on the data, or is "
        "not known, so shares of MACs are of the rest",
    )
