"""Moments are right, mergeable, and hide nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corp_onnx.calibration.moments import Accumulator, Moments, read_only
from corp_onnx.errors import DataError
from tests.oracles import two_pass
from tests.tolerances import distance, rounding

FLOAT32 = 1e-6
"""What `Accumulator.add` promises for float32 batches."""


def activations(seed, samples, width, *, mean=3.0, spread=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    centre = mean * rng.standard_normal(width)
    mixing = rng.standard_normal((width, width)) / np.sqrt(width)
    return (centre + spread * rng.standard_normal((samples, width)) @ mixing).astype(dtype)


def accumulated(x, batch_size):
    accumulator = Accumulator(x.shape[1:])
    for start in range(0, len(x), batch_size):
        accumulator.add(x[start : start + batch_size])
    return accumulator.moments()


def assert_is_of(moments, x, tolerance):
    mean, scatter = two_pass(x)
    assert moments.count == len(x)
    assert distance(moments.mean, mean) <= tolerance
    assert distance(moments.scatter, scatter) <= tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (np.float16, FLOAT32),
        (np.float32, FLOAT32),
        (np.float64, rounding(width=100)),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_moments_are_those_of_two_passes(dtype, tolerance, batch_size):
    x = activations(0, 100, 9, spread=20.0, dtype=dtype)
    assert_is_of(accumulated(x, batch_size), x, tolerance)


@pytest.mark.parametrize("batch_size", [1, 64, 4096])
def test_a_small_spread_around_a_large_mean_survives(batch_size):
    x = np.random.default_rng(0).normal(100, 0.05, (4096, 1)).astype(np.float32)
    variance = x.astype(np.float64).var()
    assert abs(accumulated(x, batch_size).variance[0] / variance - 1) <= FLOAT32
    assert abs(variance / 0.05**2 - 1) < 0.1


def test_a_small_spread_is_lost_by_summing_squares():
    x = np.random.default_rng(0).normal(100, 0.05, (4096, 1)).astype(np.float32)
    total, squares = np.float32(0), np.float32(0)
    for value in x[:, 0]:
        total, squares = total + value, squares + value * value
    naive = squares / len(x) - (total / len(x)) ** 2
    assert abs(naive / 0.05**2 - 1) > 0.5


@given(
    seed=st.integers(0, 99),
    samples=st.integers(2, 200),
    width=st.integers(1, 12),
    cuts=st.lists(st.integers(1, 199), max_size=6),
    mean=st.sampled_from([0.0, 1.0, 100.0]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_float32_moments_do_not_depend_on_batching_or_order(
    seed, samples, width, cuts, mean, spread
):
    x = activations(seed, samples, width, mean=mean, spread=spread)
    shuffled = np.random.default_rng(seed).permutation(x)
    accumulator = Accumulator((width,))
    for batch in np.split(shuffled, sorted(cuts)):
        accumulator.add(batch)
    assert_is_of(accumulator.moments(), x, FLOAT32)


@given(seed=st.integers(0, 99), first=st.integers(1, 60), second=st.integers(1, 60))
def test_merged_moments_are_those_of_all_vectors(seed, first, second):
    x = activations(seed, first + second, 8, dtype=np.float64)
    merged = Moments.of(x[:first]) + Moments.of(x[first:])
    assert_is_of(merged, x, rounding(width=120))
    assert np.array_equal(merged.scatter, merged.scatter.T)


def without_between(a, b):
    return Moments((a + b).count, (a + b).mean, a.scatter + b.scatter)


def with_plain_mean(a, b):
    return Moments((a + b).count, (a.mean + b.mean) / 2, (a + b).scatter)


def with_uncentred_scatter(a, b):
    both = a + b
    return Moments(both.count, both.mean, both.gram * both.count)


def with_lost_count(a, b):
    return Moments(a.count, (a + b).mean, (a + b).scatter)


@pytest.mark.parametrize(
    "merge", [without_between, with_plain_mean, with_uncentred_scatter, with_lost_count]
)
def test_a_wrong_merge_is_noticed(merge):
    x = activations(0, 60, 8, dtype=np.float64)
    with pytest.raises(AssertionError):
        assert_is_of(merge(Moments.of(x[:20]), Moments.of(x[20:])), x, FLOAT32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_leading_axes_hold_moments_of_their_own(dtype):
    x = activations(0, 50, 3 * 2 * 5, dtype=dtype).reshape(50, 3, 2, 5)
    moments = accumulated(x, 8)
    for head in np.ndindex(3, 2):
        alone = Moments(moments.count, moments.mean[head], moments.scatter[head])
        assert_is_of(alone, x[:, *head], FLOAT32)
    swapped = Moments(moments.count, moments.mean[0, 1], moments.scatter[0, 0])
    with pytest.raises(AssertionError):
        assert_is_of(swapped, x[:, 0, 1], FLOAT32)


def test_derived_quantities_follow_their_formulas():
    x = activations(0, 40, 6, dtype=np.float64)
    moments = Moments.of(x)
    tolerance = rounding(width=40)
    assert moments.width == 6
    assert distance(moments.covariance, np.cov(x.T, bias=True)) <= tolerance
    assert distance(moments.variance, x.var(axis=0)) <= tolerance
    assert distance(moments.gram, x.T @ x / 40) <= tolerance
    assert distance(moments.gram, moments.covariance) > tolerance


def test_a_layout_in_memory_changes_nothing():
    x = activations(0, 40, 6)
    scatter = Moments.of(x).scatter
    assert np.array_equal(Moments.of(np.asfortranarray(x)).scatter, scatter)
    assert np.array_equal(Moments.of(np.repeat(x, 2, axis=1)[:, ::2]).scatter, scatter)


def test_a_constant_channel_has_exactly_no_variance():
    x = activations(0, 1000, 3)
    x[:, 1] = 0.1
    assert accumulated(x, 1000).variance[1] == 0.0
    assert accumulated(x, 7).variance[1] <= (rounding(width=64) * 0.1) ** 2


def test_the_input_is_left_alone_and_nothing_of_it_is_kept():
    x = activations(0, 40, 6)
    before = x.copy()
    moments = Moments.of(x)
    scatter = moments.scatter.copy()
    assert np.array_equal(x, before)
    x[:] = 0
    assert np.array_equal(moments.scatter, scatter)


def test_a_record_owns_its_arrays():
    mean, scatter = np.zeros(2), np.eye(2)
    moments = Moments(1, mean, scatter)
    mean[0] = scatter[0, 0] = 7.0
    assert moments.mean[0] == 0.0
    assert moments.scatter[0, 0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        moments.scatter[0, 0] = 7.0
    with pytest.raises(AttributeError):
        moments.count = 2


def test_read_only_copies_only_what_others_can_write_to():
    owned = read_only(np.zeros(3))
    assert read_only(owned) is owned
    assert read_only(owned[:2]) is not owned


def test_an_accumulator_goes_on_after_giving_moments():
    x = activations(0, 40, 6, dtype=np.float64)
    accumulator = Accumulator((6,))
    accumulator.add(x[:15])
    early = accumulator.moments()
    accumulator.add(x[15:])
    assert_is_of(early, x[:15], rounding(width=40))
    assert_is_of(accumulator.moments(), x, rounding(width=40))


@pytest.mark.parametrize("shape", [(8,), (2, 4)])
def test_no_vectors_change_nothing(shape):
    x = activations(0, 10, 8).reshape(10, *shape)
    full, empty = Moments.of(x), Moments.empty(shape)
    assert empty.count == 0
    for merged in (full + empty, empty + full, full + Moments.of(x[:0])):
        assert merged.count == full.count
        assert np.array_equal(merged.mean, full.mean)
        assert np.array_equal(merged.scatter, full.scatter)
    assert (empty + empty).count == 0


@pytest.mark.parametrize("name", ["covariance", "variance", "gram"])
def test_no_vectors_have_no_covariance(name):
    with pytest.raises(DataError, match="hold no samples; calibrate"):
        getattr(Moments.empty((4,)), name)


def test_moments_of_different_models_are_not_merged():
    with pytest.raises(DataError, match=r"shape \(1,\) and \(3,\) cannot be merged"):
        Moments.empty((1,)) + Moments.empty((3,))


def test_a_batch_of_another_shape_is_our_bug():
    with pytest.raises(ValueError, match="batch of shape"):
        Accumulator((3,)).add(np.zeros((5, 2, 3)))


@pytest.mark.parametrize(
    "values", [(np.nan, 0), (np.inf, 0), (-np.inf, 0), (np.inf, -np.inf), (1e30, -1e30)]
)
def test_numbers_that_are_not_finite_are_refused_and_not_counted(values):
    x = activations(0, 40, 6)
    accumulator = Accumulator((6,))
    accumulator.add(x)
    bad = x.copy()
    bad[[3, 5], 2] = values
    with pytest.raises(DataError, match="NaN or infinity"):
        accumulator.add(bad)
    assert_is_of(accumulator.moments(), x, FLOAT32)
