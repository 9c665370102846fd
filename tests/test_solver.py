"""Values by every method, and what a recipe stands for."""

from __future__ import annotations

import numpy as np
import pytest

from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.errors import PlanError
from corp_onnx.graph.model import from_proto
from corp_onnx.plan import uniform
from corp_onnx.solve import METHODS, Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.promise import measured_errors
from tests.attention_builders import GROUPED
from tests.builders import TINY, feeds
from tests.tolerances import rounding

ROUNDING = rounding(width=200, dtype=np.float32)
BUILDERS = {
    **{name: TINY[name] for name in ("separate", "packed_split", "narrow_values", "tokens_first")},
    **{name: GROUPED[name] for name in ("one_for_all", "packed_grouped", "operator_grouped")},
}


def values(name, method, share=0.5, **options):
    proto = BUILDERS[name](0).proto
    model = from_proto(proto)
    catalog = find_blocks(model)
    batches = [feeds(proto, 8, 9, seed) for seed in range(3)]
    plan = uniform(catalog, {"vo": share}, align=1)
    statistics = gather(model, catalog, batches)
    solution = solve(model, catalog, plan, statistics, Recipe(method, **options))
    small = operate(model, catalog, solution).model
    found = measured_errors(model, catalog, small, find_blocks(small), batches, axes=("vo",))
    (fold,) = solution.folds
    return fold, found[fold.block, "vo"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BUILDERS)
def test_the_error_of_values_is_the_predicted_one(name, method):
    fold, found = values(name, method)
    predicted = fold.evidence.error
    assert predicted > 1e-4
    assert abs(found - predicted) <= 2 * np.sqrt(predicted) * ROUNDING + ROUNDING**2


@pytest.mark.parametrize("name", BUILDERS)
def test_truncated_values_lose_least(name):
    errors = {method: values(name, method)[0].evidence.error for method in METHODS}
    assert errors["best"] < errors["corp"] < errors["mean"] <= errors["none"]
    selected, _ = values(name, "best", truncate=False)
    assert abs(selected.evidence.error / errors["corp"] - 1) <= 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BUILDERS)
def test_all_values_kept_is_nothing_lost(name, method):
    fold, found = values(name, method, share=0.0)
    assert found <= ROUNDING**2 * 10
    assert fold.evidence.error <= ROUNDING**2 * 10


@pytest.mark.parametrize("method", ["corp", "mean", "none"])
def test_selected_values_are_coordinates(method):
    fold, _ = values("separate", method)
    assert set(np.unique(fold.value)) == {0.0, 1.0}
    assert (fold.value.sum(axis=1) == 1).all()


def test_a_recipe_says_what_it_stands_for():
    assert Recipe().eliminates
    assert Recipe("best", ranking="elimination").eliminates
    assert not Recipe("best", ranking="energy").eliminates
    assert not Recipe("corp").eliminates
    assert [Recipe(method).repair for method in METHODS] == ["corp", "corp", "mean", "none"]
    assert Recipe().selection == Recipe(ranking="elimination").selection == "energy"
    assert Recipe("corp", ranking="energy-norm").selection == "energy-norm"
    assert Recipe().goes_in_sequence
    assert not Recipe(refit=False).goes_in_sequence
    assert not Recipe("corp").goes_in_sequence


@pytest.mark.parametrize("method", ["corp", "mean", "none"])
def test_elimination_belongs_to_best(method):
    with pytest.raises(PlanError, match="belongs to --method best"):
        Recipe(method, ranking="elimination")


@pytest.mark.parametrize("ridge", [-1.0, np.inf, np.nan])
def test_a_ridge_that_is_none_is_refused(ridge):
    with pytest.raises(PlanError, match="--ridge"):
        Recipe(ridge=ridge)
