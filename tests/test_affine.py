"""Affine recovery against least squares on the raw data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corp_onnx.calibration.moments import Moments
from corp_onnx.errors import DataError, IllConditioned
from corp_onnx.solve.affine import fold, mean_only, no_repair, recover_mlp, share
from corp_onnx.solve.algebra import MAX_CONDITION
from tests.oracles import lstsq_affine, squared_error, vectors
from tests.tolerances import distance, rounding

WIDTH = 12


def rng(seed=0):
    return np.random.default_rng(seed)


def with_constants(z):
    z[:, 0], z[:, 7] = 3.0, -100.0
    return z


HALF = np.array([0, 2, 3, 5, 8, 11])


def falling(low=1e-2, *, width=WIDTH, samples=200):
    return vectors(rng(), np.geomspace(1.0, low, width), samples=samples)


CASES = {
    "well conditioned": lambda: (falling(), HALF, 0.0),
    "with ridge": lambda: (falling(), HALF, 1e-2),
    "badly conditioned": lambda: (falling(1e-8), HALF, 0.0),
    "rank deficient": lambda: (
        vectors(rng(), np.repeat([1.0, 0.0], [4, WIDTH - 4]), samples=200),
        HALF,
        1e-3,
    ),
    "fewer samples than channels": lambda: (rng().standard_normal((5, WIDTH)), HALF, 1e-3),
    "one channel kept": lambda: (falling(), np.array([4]), 0.0),
    "one channel removed": lambda: (falling(), np.delete(np.arange(WIDTH), 4), 0.0),
    "wide": lambda: (falling(1e-3, width=96, samples=300), np.arange(0, 96, 3), 0.0),
    "constant channels": lambda: (with_constants(falling()), HALF, 0.0),
    "constant channels with ridge": lambda: (with_constants(falling()), HALF, 1e-3),
}
TABLE = list(CASES)


def hidden(name):
    """Activations, kept channels and ridge of a row of the table."""
    return CASES[name]()


def complement(kept, width):
    return np.setdiff1d(np.arange(width), kept)


def down(width, outputs=5):
    return rng(7).standard_normal((width, outputs)), rng(8).standard_normal(outputs)


def assert_is_least_squares(answer, z, kept, ridge):
    removed = complement(kept, z.shape[1])
    weight, offset = lstsq_affine(z, kept, removed, ridge)
    tolerance = rounding(width=len(z), condition=answer.condition)
    assert distance(answer.weight, weight) <= tolerance
    assert distance(answer.offset, offset) <= tolerance


def assert_shares_are_measured(answer, z, kept):
    removed = complement(kept, z.shape[1])
    left = z[:, removed] - z[:, kept] @ answer.weight - answer.offset
    measured = left.var(axis=0).sum() / z[:, removed].var(axis=0).sum()
    assert abs(answer.unexplained - measured) <= rounding(width=len(z), condition=answer.condition)


@pytest.mark.parametrize("name", TABLE)
def test_fold_is_least_squares_on_the_raw_data(name):
    z, kept, ridge = hidden(name)
    answer = fold(Moments.of(z), kept, complement(kept, z.shape[1]), ridge=ridge)
    assert_is_least_squares(answer, z, kept, ridge)
    assert_shares_are_measured(answer, z, kept)


MUTANTS = {
    "the weight transposed": lambda a: replace(a, weight=a.weight.T),
    "the sign turned": lambda a: replace(a, weight=-a.weight),
    "the offset dropped": lambda a: replace(a, offset=np.zeros_like(a.offset)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_fold_is_noticed(mutant):
    z, kept, ridge = hidden("well conditioned")
    answer = MUTANTS[mutant](fold(Moments.of(z), kept, complement(kept, WIDTH), ridge=ridge))
    with pytest.raises(AssertionError):
        assert_is_least_squares(answer, z, kept, ridge)


def test_swapping_kept_and_removed_is_noticed():
    z, kept, ridge = hidden("well conditioned")
    answer = fold(Moments.of(z), complement(kept, WIDTH), kept, ridge=ridge)
    with pytest.raises(AssertionError):
        assert_is_least_squares(answer, z, kept, ridge)


@pytest.mark.parametrize("ridge", [0.0, 1.001e-2])
def test_another_ridge_is_noticed(ridge):
    z, kept, _ = hidden("with ridge")
    answer = fold(Moments.of(z), kept, complement(kept, WIDTH), ridge=ridge)
    with pytest.raises(AssertionError):
        assert_is_least_squares(answer, z, kept, 1e-2)


def test_the_ridge_is_relative_to_the_mean_variance():
    z, kept, ridge = hidden("with ridge")
    removed = complement(kept, WIDTH)
    small = fold(Moments.of(z), kept, removed, ridge=ridge)
    large = fold(Moments.of(z * 1e4), kept, removed, ridge=ridge)
    assert distance(small.weight, large.weight) <= rounding(width=200, condition=small.condition)


@pytest.mark.parametrize("spread", [1e2, 1e4, 1e6])
def test_the_condition_is_that_of_the_regularised_system(spread):
    z = vectors(rng(), np.geomspace(1.0, 1 / spread, WIDTH), samples=100)
    kept = np.arange(WIDTH - 1)
    moments = Moments.of(z)
    for ridge in (0.0, 1e-3):
        absolute = ridge * moments.variance.mean()
        system = moments.covariance[:-1, :-1] + absolute * np.eye(WIDTH - 1)
        exact = np.linalg.cond(system, 1)
        answer = fold(moments, kept, np.array([WIDTH - 1]), ridge=ridge)
        assert exact / 3 <= answer.condition <= exact * (1 + 1e-6)  # LAPACK's estimate


def test_constant_channels_predict_nothing_and_cost_nothing():
    z, kept, ridge = hidden("constant channels")
    removed = complement(kept, WIDTH)
    answer = fold(Moments.of(z), kept, removed, ridge=ridge)
    assert not answer.weight[kept == 0].any()
    assert not answer.weight[:, removed == 7].any()
    assert answer.offset[removed == 7] == -100.0


def test_a_constant_whose_mean_was_rounded_is_still_a_constant():
    z, kept, _ = hidden("well conditioned")
    z[:, [0, 7]] = 0.1
    moments = sum((Moments.of(z[i : i + 3]) for i in range(0, len(z), 3)), Moments.empty((WIDTH,)))
    assert moments.variance[0] > 0.0  # of rounding, or this test tests nothing
    answer = fold(moments, kept, complement(kept, WIDTH), ridge=0.0)
    assert not answer.weight[kept == 0].any()
    assert_is_least_squares(answer, z, kept, 0.0)


@pytest.mark.parametrize("repair", ["corp", "mean"])
def test_a_layer_that_never_varies_is_repaired_exactly(repair):
    z = np.full((20, WIDTH), 0.1) * np.arange(WIDTH)
    weight, bias = down(WIDTH)
    small = recover_mlp(Moments.of(z), np.arange(3), weight, bias, repair=repair, ridge=0.0)
    assert (small.condition, small.unexplained) == (1.0, 0.0)
    output = z[:, :3] @ small.weight + small.bias
    assert distance(output, z @ weight + bias) <= rounding(width=WIDTH)


def test_a_layer_that_never_varies_without_repair_is_infinitely_wrong():
    z = np.ones((20, WIDTH))
    small = recover_mlp(Moments.of(z), np.arange(3), *down(WIDTH), repair="none", ridge=0.0)
    assert small.error == np.inf


def test_a_removed_constant_leaves_nothing_unexplained():
    z, _, _ = hidden("constant channels")
    kept, removed = np.delete(np.arange(WIDTH), 7), np.array([7])
    for answer in (
        fold(Moments.of(z), kept, removed, ridge=1e-3),
        mean_only(Moments.of(z), kept, removed),
        no_repair(Moments.of(z), kept, removed),
    ):
        assert answer.unexplained == 0.0


def test_keeping_nothing_leaves_the_mean():
    z, _, _ = hidden("well conditioned")
    answer = fold(Moments.of(z), np.arange(0), np.arange(WIDTH), ridge=0.0)
    assert np.array_equal(answer.offset, Moments.of(z).mean)
    assert answer.unexplained == 1.0


def test_repairs_without_prediction():
    z, kept, _ = hidden("well conditioned")
    moments, removed = Moments.of(z), complement(kept, WIDTH)
    mean, none = mean_only(moments, kept, removed), no_repair(moments, kept, removed)
    assert not mean.weight.any()
    assert not none.weight.any()
    assert np.array_equal(mean.offset, moments.mean[removed])
    assert not none.offset.any()
    assert mean.unexplained == none.unexplained == 1.0


@pytest.mark.parametrize("name", ["rank deficient", "fewer samples than channels"])
def test_a_singular_system_is_refused_with_a_remedy(name):
    z, kept, _ = hidden(name)
    with pytest.raises(IllConditioned, match=r"6 kept channels .* raise --ridge"):
        fold(Moments.of(z), kept, complement(kept, WIDTH), ridge=0.0)


def test_a_duplicated_channel_is_refused_without_ridge():
    z = falling()
    z[:, 1] = z[:, 0]
    kept = np.array([0, 1, 2])
    with pytest.raises(IllConditioned, match="3 kept channels"):
        fold(Moments.of(z), kept, complement(kept, WIDTH), ridge=0.0)
    assert fold(Moments.of(z), kept, complement(kept, WIDTH), ridge=1e-6).unexplained < 1


@pytest.mark.parametrize(("spread", "refused"), [(1e-2, False), (1e2, True)])
def test_the_limit_of_the_condition_number(spread, refused):
    z = vectors(rng(), np.array([1.0, 1 / (spread * MAX_CONDITION)]), samples=100, mean=0.0)
    z = np.column_stack([z, z[:, 0]])
    if refused:
        with pytest.raises(IllConditioned, match=r"condition may be 1e\+12"):
            fold(Moments.of(z), np.array([0, 1]), np.array([2]), ridge=0.0)
    else:
        assert fold(Moments.of(z), np.array([0, 1]), np.array([2]), ridge=0.0).condition > 1e9


def test_no_samples_are_refused():
    with pytest.raises(DataError, match="no samples"):
        fold(Moments.empty((3,)), np.array([0]), np.array([1, 2]), ridge=0.0)


def assert_error_is_measured(small, z, kept, weight, bias):
    actual = z[:, kept] @ small.weight + small.bias
    measured = squared_error(actual, z @ weight + bias, centre=True)
    tolerance = rounding(width=len(z), condition=small.condition) * (1 + measured)
    assert abs(small.error - measured) <= tolerance


@pytest.mark.parametrize("repair", ["corp", "mean", "none"])
@pytest.mark.parametrize("name", TABLE)
def test_the_predicted_error_is_the_measured_one(name, repair):
    z, kept, ridge = hidden(name)
    weight, bias = down(z.shape[1])
    small = recover_mlp(Moments.of(z), kept, weight, bias, repair=repair, ridge=ridge)
    assert_error_is_measured(small, z, kept, weight, bias)


LAYER_MUTANTS = {
    "the offset dropped": lambda s, b: replace(s, bias=b),
    "the rows in another order": lambda s, b: replace(s, weight=s.weight[::-1]),
    "the prediction dropped": lambda s, b: replace(s, weight=down(WIDTH)[0][: len(s.weight)]),
    "the error of the mean": lambda s, b: replace(s, error=s.unexplained),
}


@pytest.mark.parametrize("mutant", LAYER_MUTANTS)
def test_a_wrong_layer_is_noticed(mutant):
    z, kept, ridge = hidden("with ridge")
    weight, bias = down(WIDTH)
    small = recover_mlp(Moments.of(z), kept, weight, bias, repair="corp", ridge=ridge)
    with pytest.raises(AssertionError):
        assert_error_is_measured(LAYER_MUTANTS[mutant](small, bias), z, kept, weight, bias)


def test_the_error_of_no_repair_counts_the_lost_mean():
    z, kept, _ = hidden("well conditioned")
    weight, bias = down(WIDTH)
    mean = recover_mlp(Moments.of(z), kept, weight, bias, repair="mean", ridge=0.0)
    none = recover_mlp(Moments.of(z), kept, weight, bias, repair="none", ridge=0.0)
    with pytest.raises(AssertionError):
        assert_error_is_measured(replace(none, error=mean.error), z, kept, weight, bias)


@pytest.mark.parametrize("name", TABLE)
def test_every_repair_is_better_than_the_next(name):
    z, kept, ridge = hidden(name)
    weight, bias = down(z.shape[1])
    errors = [
        recover_mlp(Moments.of(z), kept, weight, bias, repair=repair, ridge=ridge).error
        for repair in ("corp", "mean", "none")
    ]
    assert errors == sorted(errors)


@settings(deadline=None)
@given(
    seed=st.integers(0, 999),
    keep=st.integers(1, 10),
    remove=st.integers(1, 10),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_removed_channels_affine_in_kept_ones_are_recovered_exactly(seed, keep, remove, dtype):
    draw = rng(seed)
    z_kept = vectors(draw, np.geomspace(1.0, 0.1, keep), samples=60)
    z_removed = z_kept @ draw.standard_normal((keep, remove)) + draw.standard_normal(remove)
    order = draw.permutation(keep + remove)
    z = np.empty((60, keep + remove))
    kept, removed = np.sort(order[:keep]), np.sort(order[keep:])
    z[:, kept], z[:, removed] = z_kept, z_removed
    weight, bias = down(keep + remove)
    moments = Moments.of(z.astype(dtype))
    small = recover_mlp(moments, kept, weight, bias, repair="corp", ridge=0.0)
    tolerance = rounding(width=60, condition=10 * keep, dtype=dtype)
    scale = np.abs(z) @ np.abs(weight) + np.abs(bias)
    actual = z[:, kept] @ small.weight + small.bias
    assert np.linalg.norm(actual - (z @ weight + bias)) <= tolerance * np.linalg.norm(scale)


@pytest.mark.parametrize("name", TABLE)
def test_the_order_of_kept_channels_changes_only_the_order_of_rows(name):
    z, kept, ridge = hidden(name)
    weight, bias = down(z.shape[1])
    order = rng(3).permutation(len(kept))
    sorted_, shuffled = (
        recover_mlp(Moments.of(z), which, weight, bias, repair="corp", ridge=ridge)
        for which in (kept, kept[order])
    )
    tolerance = rounding(width=len(z), condition=sorted_.condition)
    assert distance(shuffled.weight, sorted_.weight[order]) <= tolerance
    assert distance(shuffled.bias, sorted_.bias) <= tolerance


@pytest.mark.parametrize("repair", ["corp", "mean", "none"])
@pytest.mark.parametrize("name", ["well conditioned", "rank deficient", "constant channels"])
def test_keeping_every_channel_gives_the_layer_back_bit_for_bit(name, repair):
    z, _, _ = hidden(name)
    weight, bias = (values.astype(np.float32) for values in down(WIDTH))
    small = recover_mlp(Moments.of(z), np.arange(WIDTH), weight, bias, repair=repair, ridge=0.0)
    assert np.array_equal(small.weight, weight.astype(np.float64))
    assert np.array_equal(small.bias, bias.astype(np.float64))
    assert (small.condition, small.unexplained, small.error) == (1.0, 0.0, 0.0)


def test_kept_channels_that_repeat_are_our_bug():
    z, _, _ = hidden("well conditioned")
    with pytest.raises(AssertionError, match="repeat"):
        recover_mlp(Moments.of(z), np.array([1, 1]), *down(WIDTH), repair="none", ridge=0.0)


def test_nothing_of_the_input_is_changed_or_shared():
    z, kept, ridge = hidden("with ridge")
    weight, bias = down(WIDTH)
    before = weight.copy(), bias.copy(), kept.copy()
    small = recover_mlp(Moments.of(z), kept, weight, bias, repair="corp", ridge=ridge)
    for now, then in zip((weight, bias, kept), before, strict=True):
        assert np.array_equal(now, then)
    with pytest.raises(ValueError, match="read-only"):
        small.weight[:] = 0


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [(1.0, 4.0, 0.25), (0.0, 0.0, 0.0), (-1e-20, 0.0, 0.0), (1.0, 0.0, np.inf)],
)
def test_share(part, whole, expected):
    assert share(part, whole) == expected


def lost(z, scale, ridge):
    """Share of the removed variance that is left, with the first channel scaled, which stays."""
    places = np.arange(z.shape[1])
    scaled = z * np.where(places == 0, scale, 1.0)
    return fold(Moments.of(scaled), places[::2], places[1::2], ridge=ridge).unexplained


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_one_channel_much_larger_than_the_others_does_not_drown_them(scale):
    z, ridge = falling(1e-5, width=96, samples=400), 1e-5
    dense, found = (lost(z, by, ridge) for by in (1.0, scale))
    drowned = lost(z, 1.0, ridge * scale**2 / z.shape[1])  # a share of the plain mean
    assert found < 1.5 * dense
    assert drowned > 2 * found
