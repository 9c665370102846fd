"""The reference code's repair, held against its formulas done slowly, and against ``corp``."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.published_method import RECIPE, solve_as_published, symmetrised
from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.plan import uniform
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import QueryKeyFold
from tests.builders import HEAD
from tests.inputs import activations
from tests.tolerances import distance, rounding

HALF = {"mlp": 0.5, "qk": 0.5}


@pytest.fixture
def solved(tiny):
    model = tiny("transformer")
    catalog = find_blocks(model)
    statistics = gather(model, catalog, [{"x": activations()}])
    plan = uniform(catalog, HALF, align=1)
    return model, catalog, statistics, plan


def of_logits(solution):
    return [fold for fold in solution.folds if isinstance(fold, QueryKeyFold)]


def slowly(query_gram, key_gram, kept, ridge):
    """``G_Q M G_K + λM = C`` as one system of Kronecker products, symmetrised."""
    gone = np.setdiff1d(np.arange(len(query_gram)), kept)
    left, right = query_gram[np.ix_(kept, kept)], key_gram[np.ix_(kept, kept)]
    target = query_gram[np.ix_(kept, gone)] @ key_gram[np.ix_(gone, kept)]
    scale = ridge * np.trace(left) * np.trace(right) / len(kept) ** 2
    system = np.kron(left, right) + scale * np.eye(len(kept) ** 2)
    m = np.linalg.solve(system, target.ravel()).reshape(target.shape)
    return np.eye(len(kept)) + (m + m.T) / 2


def test_logits_are_those_of_the_formula(solved):
    model, catalog, statistics, plan = solved
    folds = of_logits(solve_as_published(model, catalog, plan, statistics))
    corp = of_logits(solve(model, catalog, plan, statistics, RECIPE))
    assert folds
    for fold, paper in zip(folds, corp, strict=True):
        query = statistics.sites[f"{fold.block}.query"].gram
        key = statistics.sites[f"{fold.block}.key"].gram
        _, width, left = fold.query.shape
        for head in range(len(query)):
            found = fold.query[head] @ fold.key[head].T
            kept = np.flatnonzero(np.abs(paper.query[head]).sum(axis=1))
            wanted = np.zeros((width, width))
            wanted[np.ix_(kept, kept)] = slowly(query[head], key[head], kept, RECIPE.ridges[0])
            scale = np.sqrt(width / left)
            bound = rounding(width=left**2 * width, condition=fold.evidence.condition)
            assert distance(found, scale * wanted) < bound
            unsymmetrised = scale * paper.query[head] @ paper.key[head].T
            assert distance(unsymmetrised, scale * wanted) > 100 * bound
            assert distance(found, wanted) > 100 * bound


def test_channels_are_those_of_energy_and_norms(solved):
    model, catalog, statistics, plan = solved
    found = solve_as_published(model, catalog, plan, statistics)
    ranked = solve(model, catalog, plan, statistics, RECIPE)
    by_energy = solve(model, catalog, plan, statistics, Recipe("corp"))
    kept = [
        [fold.kept.tolist() for fold in solution.folds if fold.axis == "mlp"]
        for solution in (found, ranked, by_energy)
    ]
    assert kept[0] == kept[1] != kept[2]


def test_nothing_is_rescaled_where_nothing_is_cut(solved):
    model, catalog, statistics, _ = solved
    whole = uniform(catalog, {"qk": 0.0})
    for fold in of_logits(solve_as_published(model, catalog, whole, statistics)):
        np.testing.assert_array_equal(fold.query, np.broadcast_to(np.eye(HEAD), fold.query.shape))


def test_the_symmetric_part_may_be_indefinite():
    product = np.array([[[0.0, 1.0], [1.0, 0.0]]])
    query, key = symmetrised(product, np.eye(2)[None])
    assert distance(query @ key.swapaxes(1, 2), product) < rounding(width=4)
