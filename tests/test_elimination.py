"""Elimination against trying every removal, and what it must do with copies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corp_onnx.errors import IllConditioned
from corp_onnx.solve import elimination
from corp_onnx.solve.elimination import eliminate
from tests.oracles import eliminated_one_by_one, vectors
from tests.tolerances import distance, rounding

SEEDS = st.integers(0, 2**16)
CONDITION = 1e2


def layer(seed, width=8, outputs=5):
    """A covariance of known condition, and a weight."""
    rng = np.random.default_rng(seed)
    x = vectors(rng, np.geomspace(1.0, 1 / CONDITION, width), samples=60)
    return np.cov(x.T, bias=True), rng.standard_normal((width, outputs))


def tolerance(width):
    return rounding(width=width**2, condition=CONDITION)


def error_of(covariance, weight, kept):
    """What the kept channels leave of the output, as a share of all, by solving once."""
    removed = np.setdiff1d(np.arange(len(weight)), kept)
    cross = covariance[np.ix_(kept, removed)]
    left = covariance[np.ix_(removed, removed)]
    left = left - cross.T @ np.linalg.solve(covariance[np.ix_(kept, kept)], cross)
    return np.vdot(weight[removed], left @ weight[removed]) / np.vdot(weight, covariance @ weight)


def assert_is_one_by_one(found, covariance, weight, ridge, keep=1):
    order, costs = eliminated_one_by_one(covariance, weight, ridge, keep)
    assert found.order.tolist() == order
    assert distance(found.costs, np.array(costs)) <= tolerance(len(weight))


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.sampled_from([0.0, 1e-3, 1e-1]))
def test_every_choice_is_that_of_trying_all(seed, ridge):
    covariance, weight = layer(seed)
    assert_is_one_by_one(eliminate(covariance, weight, ridge=ridge), covariance, weight, ridge)


@pytest.mark.parametrize("twin", ["weight", "covariance", "transposed", "all at once"])
def test_a_wrong_elimination_is_noticed(twin):
    covariance, weight = layer(0, outputs=8)
    ones = np.ones_like(weight)
    found = {
        "weight": lambda: eliminate(covariance, ones, ridge=0.0),
        "covariance": lambda: eliminate(np.eye(8), weight, ridge=0.0),
        "transposed": lambda: eliminate(covariance, weight.T, ridge=0.0),
        "all at once": lambda: eliminate(np.diag(np.diagonal(covariance)), weight, ridge=0.0),
    }[twin]()
    with pytest.raises(AssertionError):
        assert_is_one_by_one(found, covariance, weight, 0.0)


@settings(deadline=None, max_examples=15)
@given(SEEDS)
def test_the_curve_is_the_error_of_what_is_kept(seed):
    covariance, weight = layer(seed)
    found = eliminate(covariance, weight, ridge=0.0)
    for removed in range(1, 8):
        exact = error_of(covariance, weight, found.kept(8, 8 - removed))
        assert abs(found.curve()[removed] - exact) <= tolerance(8)


@pytest.mark.parametrize("lazy", [1, 2, 3, 7])
def test_the_size_of_a_block_changes_no_choice(monkeypatch, lazy):
    covariance, weight = layer(3, width=20)
    whole = eliminate(covariance, weight, ridge=1e-3)
    monkeypatch.setattr(elimination, "LAZY", lazy)
    found = eliminate(covariance, weight, ridge=1e-3)
    assert found.order.tolist() == whole.order.tolist()
    assert distance(found.costs, whole.costs) <= tolerance(20)


@settings(deadline=None, max_examples=15)
@given(SEEDS)
def test_the_order_of_channels_does_not_matter(seed):
    covariance, weight = layer(seed)
    order = np.random.default_rng(seed).permutation(8)
    found = eliminate(covariance, weight, ridge=1e-3)
    moved = eliminate(covariance[np.ix_(order, order)], weight[order], ridge=1e-3)
    assert order[moved.order].tolist() == found.order.tolist()


@settings(deadline=None, max_examples=15)
@given(SEEDS)
def test_of_two_identical_channels_exactly_one_goes_and_costs_nothing(seed):
    covariance, _ = layer(seed, width=6)
    twice = np.r_[np.arange(6), np.arange(6)]
    more = np.random.default_rng(seed).standard_normal((12, 5))
    found = eliminate(covariance[np.ix_(twice, twice)], more, ridge=1e-9, keep=6)
    assert sorted(found.kept(12, 6) % 6) == list(range(6))
    assert found.curve()[-1] <= 1e-6  # the ridge, times the condition
    single = eliminate(covariance, more[:6] + more[6:], ridge=1e-9)
    dear = eliminate(covariance[np.ix_(twice, twice)], more, ridge=1e-9).curve()[7]
    assert dear >= single.curve()[1] * (1 - 1e-3)


def test_elimination_finds_the_best_subset_where_half_are_copies():
    covariance, _ = layer(1, width=4)
    twice = np.r_[np.arange(4), np.arange(4)]
    whole = covariance[np.ix_(twice, twice)]
    weight = np.random.default_rng(1).standard_normal((8, 3))
    system = whole + 1e-9 * np.eye(8)
    subsets = [np.array(kept) for kept in itertools.combinations(range(8), 4)]
    best = min(error_of(system, weight, kept) for kept in subsets)
    kept = eliminate(whole, weight, ridge=1e-9, keep=4).kept(8, 4)
    assert abs(error_of(system, weight, kept) - best) <= 1e-7
    pairs = np.array([0, 1, 4, 5])  # the wrong twin keeps both of two pairs
    assert error_of(system, weight, pairs) > 1e-3


def test_what_never_varies_goes_first_for_nothing():
    covariance, weight = layer(2)
    covariance[[3], :] = covariance[:, [3]] = 0.0
    found = eliminate(covariance, weight, ridge=0.0)
    assert (found.order[0], found.costs[0]) == (3, 0.0)


def test_constant_channels_do_not_go_beyond_what_is_asked():
    found = eliminate(np.zeros((4, 4)), np.ones((4, 2)), ridge=1e-3, keep=3)
    assert len(found.order) == 1
    assert found.curve().tolist() == [0.0, 0.0]


def test_a_singular_covariance_without_ridge_is_refused():
    covariance, weight = layer(0)
    covariance[:, 1], covariance[1] = -covariance[:, 0], -covariance[0]
    covariance[1, 1] = covariance[0, 0] / 2
    with pytest.raises(IllConditioned, match="raise --ridge"):
        eliminate(covariance, weight, ridge=0.0)


def test_one_channel_much_larger_than_the_others_does_not_decide_for_them():
    """Scaled by as much as its row of the weight is divided by, nothing has changed."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 60)) @ rng.standard_normal((60, 96))
    covariance = np.cov((x + 0.3 * rng.standard_normal(x.shape)).T, bias=True)
    weight = rng.standard_normal((96, 5))
    scale = np.where(np.arange(96) == 3, 1e4, 1.0)
    plain = eliminate(covariance, weight, ridge=1e-4, keep=48)
    scaled = eliminate(
        scale[:, None] * covariance * scale, weight / scale[:, None], ridge=1e-4, keep=48
    )
    left = [error_of(covariance, weight, f.kept(96, 48)) for f in (plain, scaled)]
    assert left[1] < 1.1 * left[0]
