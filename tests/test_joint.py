"""Joint moments: do not depend on batching, and know every error exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corp_onnx.calibration.moments import Moments
from corp_onnx.solve.joint import Joint, merged
from tests.tolerances import distance, rounding

FEATURES, TARGETS, SAMPLES = 5, 3, 90
TOLERANCE = rounding(width=SAMPLES * FEATURES, condition=1e2)
FIELDS = ("mean", "target_mean", "within", "cross", "spread")


def samples(seed=0):
    rng = np.random.default_rng(seed)
    f = 3.0 + rng.standard_normal((SAMPLES, FEATURES)) @ rng.standard_normal((FEATURES, FEATURES))
    t = f @ rng.standard_normal((FEATURES, TARGETS)) + rng.standard_normal((SAMPLES, TARGETS)) + 1
    return f, t


def joint_of(f, t):
    return Joint.of(Moments.of(np.hstack([f, t])), f.shape[1])


def assert_same(one, other):
    assert one.count == other.count
    for field in FIELDS:
        assert distance(getattr(one, field), getattr(other, field)) <= TOLERANCE, field


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, SAMPLES - 1), max_size=4, unique=True), st.integers(0, 9))
def test_batches_do_not_matter(cuts, seed):
    f, t = samples(seed)
    cuts = sorted(cuts)
    parts = zip(np.split(f, cuts), np.split(t, cuts), strict=True)
    assert_same(merged([joint_of(*part) for part in parts]), joint_of(f, t))


@pytest.mark.parametrize("times", [1, 4])
def test_a_share_counts_like_repeated_samples(times):
    f, t = samples()
    few = slice(0, 10)
    again = [np.concatenate([x, *[x[few]] * times]) for x in (f, t)]
    share = 10 * times / len(again[0])
    mixed = joint_of(f, t).mixed(joint_of(f[few], t[few]), share)
    assert mixed.count == SAMPLES
    for field in FIELDS:
        assert distance(getattr(mixed, field), getattr(joint_of(*again), field)) <= TOLERANCE, field
        assert distance(getattr(mixed, field), getattr(joint_of(f, t), field)) > 1e-3, field


def test_means_that_differ_are_not_averaged_away():
    """The wrong twin of merging: covariances averaged without what lies between the means."""
    f, t = samples()
    order = np.argsort(f[:, 0])
    halves = [joint_of(f[half], t[half]) for half in np.split(order, 2)]
    whole = joint_of(f, t)
    assert distance((halves[0].within + halves[1].within) / 2, whole.within) > 0.1
    assert_same(merged(halves), whole)


def test_the_error_is_that_of_the_samples():
    f, t = samples()
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((FEATURES, TARGETS)), rng.standard_normal(TARGETS)
    joint = joint_of(f, t)
    measured = ((t - f @ weight - bias) ** 2).sum(axis=1).mean()
    assert abs(joint.error(weight, bias) / measured - 1) <= TOLERANCE
    assert abs(joint.error(weight, 0 * bias) / measured - 1) > 1e-3
    assert joint.error(weight, joint.bias(weight)) < joint.error(weight, bias)


def test_a_layers_own_output_is_fitted_by_itself():
    f, _ = samples()
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((FEATURES, TARGETS)), rng.standard_normal(TARGETS)
    own = Joint.own(Moments.of(f), weight, bias)
    assert_same(own, joint_of(f, f @ weight + bias))
    assert own.error(weight, bias) <= TOLERANCE * own.total


@pytest.mark.parametrize("how", ["picked", "mapped"])
def test_fewer_features(how):
    f, t = samples()
    kept = np.array([4, 0, 2])
    narrow = np.eye(FEATURES)[:, kept] if how == "picked" else np.full((FEATURES, 2), 0.5)
    joint = joint_of(f, t)
    made = joint.picked(kept) if how == "picked" else joint.mapped(narrow)
    assert_same(made, joint_of(f @ narrow, t))
    assert joint.total == made.total
