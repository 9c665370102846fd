"""Channels that say nothing of their own are removed from every model of the zoo, exactly.

Half of all hidden channels are copies; queries, keys and values span half of every head. The kept
half is given, in any order, and the solver has to find the maps from statistics of random inputs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from corp_onnx.blocks import axes_of, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.graph.model import from_proto
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import MlpFold, QueryKeyFold, Solution, ValueOutputFold
from corp_onnx.surgery.operate import operate
from tests.full_width import run, squared_error
from tests.redundant import plan_of, value_folds, with_redundancy
from tests.zoo_models import NAMES, TOKENS, feeds, load, module_of

pytestmark = pytest.mark.slow

BOUND = 1e-8
"""Of ``‖ŷ - y‖² / ‖y‖²``: rounding of float32, as far as the condition of a map amplifies it."""

HALF_BOUND = 1e-5
"""The same for weights of 11 bits."""

VISIBLE = 1e-4
"""Errors of wrong results are at least as large."""

RIDGE = 1e-9

"""As good as none, where queries are constant and their Gram has no inverse."""

BATCHES, SAMPLES = 2, 32
MORE_BATCHES = dict.fromkeys(("timm_cait", "timm_xcit"), 8)
"""Where there is an MLP that sees one token of every sample."""

ALL = pytest.mark.parametrize("name", NAMES)


@cache
def prepared(name):
    """A redundant model, its catalog, and its statistics, if any are needed."""
    model = from_proto(load(name))
    catalog = find_blocks(model)
    dense = with_redundancy(model, catalog)
    if not plan_of(catalog, dense).cuts:
        return dense, catalog, None
    lengths = [TOKENS - place for place in range(MORE_BATCHES.get(module_of(name), BATCHES))]
    batches = [feeds(name, SAMPLES, tokens, seed=tokens) for tokens in lengths]
    return dense, catalog, gather(dense.model, catalog, batches)


def solved(name, *, method="corp", keep=lambda block, axis, kept: kept):
    """All axes cut to what is enough: `solve` finds most maps, those of values are known."""
    dense, catalog, statistics = prepared(name)
    kept = {place: keep(*place, channels) for place, channels in dense.kept.items()}
    folds = value_folds(catalog, dense)
    if statistics:
        recipe = Recipe(method=method, ridge=RIDGE, kept=kept)
        folds += solve(dense.model, catalog, plan_of(catalog, dense), statistics, recipe).folds
    return Solution("redundant", tuple(folds))


def error_of(name, made):
    """Against the redundant model, on a batch and a length that nothing was calibrated on."""
    dense, _, _ = prepared(name)
    given = feeds(name, 3, TOKENS + 4, seed=1)
    return squared_error(run(made, given)[0], run(dense.model, given)[0])


def bound_of(model):
    halves = [t for t in model.graph.tensors().values() if t.dtype == np.float16]
    return HALF_BOUND if halves else BOUND


@ALL
def test_removing_what_is_redundant_is_exact(name):
    dense, catalog, _ = prepared(name)
    if not dense.kept:
        assert not any(axes_of(block) for block in catalog.blocks)
        pytest.skip("nothing that can be cut")
    surgery = operate(dense.model, catalog, solved(name))
    assert surgery.pruned.total < surgery.dense.total
    assert error_of(name, surgery.model) <= bound_of(dense.model)


# Wrong twins: each of these must show


def made_with(**options):
    """Solved in another way."""

    def make(name):
        dense, catalog, _ = prepared(name)
        return operate(dense.model, catalog, solved(name, **options)).model

    return make


def fold_with(kind, **changes):
    """One thing wrong in all folds of a kind."""

    def make(name):
        dense, catalog, _ = prepared(name)
        solution = solved(name)
        folds = [
            replace(
                fold, **{field: change(getattr(fold, field)) for field, change in changes.items()}
            )
            if isinstance(fold, kind)
            else fold
            for fold in solution.folds
        ]
        return operate(dense.model, catalog, replace(solution, folds=tuple(folds))).model

    return make


def bias_forgotten(role):
    """The new biases of a projection are zero."""

    def make(name):
        made = made_with()(name)
        biases = [t for key, t in made.graph.tensors().items() if f"{role}_bias" in key]
        biases = [tensor for tensor in biases if hasattr(tensor, "values")]
        assert biases
        for tensor in biases:
            tensor.values = np.zeros_like(tensor.values)
        return made

    return make


def too_few(wanted):
    return lambda block, axis, kept: kept[..., 3:] if axis == wanted else kept


def first_two_exchanged(array):
    return array[..., [1, 0, *range(2, array.shape[-1])]]


def of_neighbours(array):
    return np.roll(array, 1, axis=0)


TWINS = {
    "hidden channels too few": made_with(keep=too_few("mlp")),
    "channels of every head too few": made_with(keep=too_few("qk")),
    "nothing repaired": made_with(method="none"),
    "only means repaired": made_with(method="mean"),
    "two kept hidden channels exchanged": fold_with(MlpFold, kept=first_two_exchanged),
    "two kept keys exchanged": fold_with(QueryKeyFold, key=first_two_exchanged),
    "two kept values exchanged": fold_with(ValueOutputFold, value=first_two_exchanged),
    "key maps of neighbours": fold_with(QueryKeyFold, key=of_neighbours),
    "value maps of neighbours": fold_with(ValueOutputFold, value=of_neighbours),
    "output rows of neighbours": fold_with(ValueOutputFold, weight=of_neighbours),
    "bias behind the MLP forgotten": fold_with(MlpFold, bias=np.zeros_like),
    "bias behind the heads forgotten": fold_with(ValueOutputFold, bias=np.zeros_like),
    "bias of queries forgotten": bias_forgotten("query"),
    "bias of values forgotten": bias_forgotten("value"),
}
"""What may go wrong between channels that say nothing of their own and a model without them."""


@pytest.mark.parametrize("name", ["hf_bert_sdpa.ts17", "hf_gpt2.dynamo18", "timm_deit.dynamo23"])
@pytest.mark.parametrize("twin", TWINS)
def test_a_wrong_twin_shows(name, twin):
    assert error_of(name, TWINS[twin](name)) > VISIBLE
