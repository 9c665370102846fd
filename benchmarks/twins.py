"""Full-width solutions with one mistake each: the comparison with the dense model must see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from corp_onnx.solve.folds import Fold, MlpFold, QueryKeyFold, Solution, ValueOutputFold

Mistake = Callable[[Fold], Fold | None]
"""The fold done wrong; None if this kind of fold cannot be wrong in this way."""


def _query_transposed(fold: Fold) -> Fold | None:
    if not isinstance(fold, QueryKeyFold):
        return None
    return replace(fold, query=fold.query.transpose(0, 2, 1))


def _value_transposed(fold: Fold) -> Fold | None:
    if not isinstance(fold, ValueOutputFold):
        return None
    return replace(fold, value=fold.value.transpose(0, 2, 1))


def _mlp_bias_dropped(fold: Fold) -> Fold | None:
    return replace(fold, bias=0 * fold.bias) if isinstance(fold, MlpFold) else None


def _output_bias_dropped(fold: Fold) -> Fold | None:
    return replace(fold, bias=0 * fold.bias) if isinstance(fold, ValueOutputFold) else None


def _query_heads_swapped(fold: Fold) -> Fold | None:
    return replace(fold, query=_swapped(fold.query)) if isinstance(fold, QueryKeyFold) else None


def _output_heads_swapped(fold: Fold) -> Fold | None:
    if not isinstance(fold, ValueOutputFold):
        return None
    return replace(fold, weight=_swapped(fold.weight))


def _scale_forgotten(fold: Fold) -> Fold | None:
    if not isinstance(fold, QueryKeyFold):
        return None
    return replace(fold, query=fold.query * np.sqrt(fold.query.shape[1]))


def _scale_of_narrow_head(fold: Fold) -> Fold | None:
    """As if the scale were computed again, from what is left of the head."""
    if not isinstance(fold, QueryKeyFold):
        return None
    _, width, kept = fold.query.shape
    return replace(fold, query=fold.query * np.sqrt(width / kept))


FULL_WIDTH: Mapping[str, Mistake] = {
    "query Aᵀ": _query_transposed,
    "value Pᵀ": _value_transposed,
    "no MLP bias": _mlp_bias_dropped,
    "no output bias": _output_bias_dropped,
    "query heads swapped": _query_heads_swapped,
    "output heads swapped": _output_heads_swapped,
    "no scale": _scale_forgotten,
}
NARROW: Mapping[str, Mistake] = {"narrow scale": _scale_of_narrow_head}


def wrong(solution: Solution, mistake: Mistake) -> Solution:
    """The solution with the mistake in the first fold that admits it."""
    for place, fold in enumerate(solution.folds):
        changed = mistake(fold)
        if changed is not None:
            folds = (*solution.folds[:place], changed, *solution.folds[place + 1 :])
            return Solution(f"{solution.method}, wrong", folds)
    raise AssertionError("every kind of fold is in every model that is measured")


def _swapped(heads: np.ndarray) -> np.ndarray:
    """The first two heads in each other's place."""
    return heads[[1, 0, *range(2, len(heads))]]
