"""The refit against least squares, and how far it trusts the data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corp_onnx.calibration.moments import Moments
from corp_onnx.solve import refit as module
from corp_onnx.solve.joint import Joint, merged
from corp_onnx.solve.refit import NO_REFIT, refit
from tests.oracles import lstsq_fit
from tests.tolerances import distance, rounding

FEATURES, TARGETS = 5, 3
START = np.random.default_rng(9).standard_normal((FEATURES, TARGETS))


def samples(rng, count, weight, noise):
    f = 2.0 + rng.standard_normal((count, FEATURES)) * np.linspace(0.5, 2, FEATURES)
    return f, f @ weight + 0.5 + noise * rng.standard_normal((count, TARGETS))


def joint_of(f, t):
    return Joint.of(Moments.of(np.hstack([f, t])), FEATURES)


def drawn(seed=0, count=200, noise=0.1, weight=None, parts=2):
    rng = np.random.default_rng(seed)
    truth = START + 0.3 * rng.standard_normal(START.shape) if weight is None else weight
    return truth, [samples(rng, count, truth, noise) for _ in range(parts)]


def fitted(parts, start=START):
    return refit(
        [joint_of(*part) for part in parts], lambda joint: joint, lambda joint: lambda ridge: start
    )


def tolerance(count):
    return rounding(width=count * FEATURES, condition=1e3)


@pytest.fixture
def only(monkeypatch):
    """Let there be one ridge and the whole step."""

    def choose(strength):
        monkeypatch.setattr(module, "STRENGTHS", (strength,))
        monkeypatch.setattr(module, "STEPS", (1.0,))

    return choose


@pytest.mark.parametrize("strength", [1e-12, 0.01, 1.0])
def test_the_weight_is_that_of_least_squares(only, strength):
    only(strength)
    _, parts = drawn()
    found = fitted(parts)
    assert found.choice == (strength, 1.0)
    share = len(parts[1][0]) / sum(len(f) for f, _ in parts)
    f, t = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    ridge = share * strength * f.var(axis=0).mean()
    weight, bias = lstsq_fit(f, t, START, ridge)
    assert distance(found.weight, weight) <= tolerance(len(f))
    assert distance(found.bias, bias) <= tolerance(len(f))
    wrong, _ = lstsq_fit(f, t, 0 * START, ridge)
    assert strength < 1e-9 or distance(found.weight, wrong) > 1e-4  # a ridge towards zero
    left = ((t - f @ weight - bias) ** 2).sum() / ((t - t.mean(axis=0)) ** 2).sum()
    assert abs(found.seen / left - 1) <= 1e-9


def test_a_huge_ridge_refits_nothing(only):
    only(1e12)
    found = fitted(drawn()[1])
    assert distance(found.weight, START) <= 1e-9


def test_strength_and_step_are_those_that_do_best_on_what_was_not_seen():
    _, parts = drawn(count=12, noise=1.0)
    errors = {NO_REFIT: 0.0}
    for held, other in (parts, parts[::-1]):
        for strength in module.STRENGTHS:
            ridge = strength * other[0].var(axis=0).mean()
            full, _ = lstsq_fit(*other, START, ridge)
            for step in (0.0, *module.STEPS):
                weight = START + step * (full - START)
                bias = other[1].mean(axis=0) - other[0].mean(axis=0) @ weight
                error = ((held[1] - held[0] @ weight - bias) ** 2).sum() / len(held[0])
                choice = (strength, step) if step else NO_REFIT
                if step or strength == module.STRENGTHS[0]:
                    errors[choice] = errors.get(choice, 0.0) + error
    found = fitted(parts)
    assert found.choice == min(errors, key=errors.__getitem__)
    spread = sum(((t - t.mean(axis=0)) ** 2).sum() / len(t) for _, t in parts)
    assert abs(found.unseen / (errors[found.choice] / spread) - 1) <= 1e-9


def test_a_target_that_never_varies_is_met_by_the_bias():
    f = np.random.default_rng(0).standard_normal((40, FEATURES))
    found = fitted([(f[at::2], np.full((20, TARGETS), 2.0)) for at in (0, 1)])
    assert np.isfinite(found.weight).all()
    assert np.isinf(found.unseen)


def shrunk(ridge):
    """A folded weight that is the further from the truth the larger the ridge, or the smaller."""
    return START * (0.2 - 0.1 * np.log10(ridge)) ** 2


@pytest.mark.parametrize("truth", [1e-1, 1e-3, 1e-8])
def test_the_ridge_of_the_folded_weight_is_that_which_does_best_on_what_was_not_seen(truth):
    _, parts = drawn(weight=shrunk(truth))
    ridges = (1e-3, 1e-1, 1e-8)
    joints = [joint_of(*part) for part in parts]
    found = refit(joints, lambda joint: joint, lambda joint: shrunk, ridges)
    assert found.ridge == truth
    assert np.array_equal(found.start, shrunk(truth))
    others = [refit(joints, lambda joint: joint, lambda joint: shrunk, [ridge]) for ridge in ridges]
    assert found.unseen == min(other.unseen for other in others)
    alone = refit(joints[:1], lambda joint: joint, lambda joint: shrunk, ridges)
    assert alone.ridge == ridges[0]  # nothing to choose by


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**16))
def test_noise_is_not_fitted(seed):
    """What a target has beyond the folded weight is noise: little of it may be followed."""
    _, parts = drawn(seed, count=10, noise=3.0, weight=START)
    found = fitted(parts)
    joints = [joint_of(*part) for part in parts]
    kept = sum(
        held.error(START, other.bias(START)) for held, other in (joints, joints[::-1])
    ) / sum(joint.total for joint in joints)
    assert found.unseen <= kept * (1 + 1e-9)


def test_no_refit_is_a_choice_and_without_a_second_part_the_only_one():
    choices = {fitted(drawn(seed, count=8, noise=5.0, weight=START)[1]).choice for seed in range(8)}
    assert NO_REFIT in choices
    alone = fitted(drawn()[1][:1])
    assert (alone.choice, alone.unseen) == (NO_REFIT, None)
    assert np.array_equal(alone.weight, START)
    assert distance(fitted(drawn()[1]).weight, START) > 0.1  # the wrong twin: two parts do refit


def test_parts_that_leak_are_noticed():
    """Judged on what it was fitted to, noise looks like something to follow."""
    _, (one, other) = drawn(3, count=8, noise=5.0, weight=START)
    leaking = fitted([one, one])
    assert leaking.choice == (min(module.STRENGTHS), 1.0)
    assert leaking.unseen < fitted([one, other]).unseen


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**16), st.floats(0.0, 1e-7))
def test_rounding_is_left_alone(seed, noise):
    """Where the folded weight is right already it comes back to the bit."""
    _, parts = drawn(seed, noise=noise, weight=START)
    found = fitted(parts)
    assert found.choice == NO_REFIT
    assert np.array_equal(found.weight, START)


def test_features_that_never_vary_change_nothing():
    f, t = drawn()[1][0]
    constant = [(np.ones_like(f), t), (np.ones_like(f), t)]
    found = fitted(constant)
    assert distance(found.weight, START) <= tolerance(len(f))
    assert distance(found.bias, t.mean(axis=0) - START.sum(axis=0)) <= tolerance(len(f))


def test_an_error_from_before_is_undone_when_there_are_plenty_of_data():
    """The target moved by a map of the features, as an earlier block's error would."""
    rng = np.random.default_rng(0)
    injected = 0.5 * rng.standard_normal(START.shape)
    _, parts = drawn(count=5000, noise=0.01, weight=START + injected)
    joints = [joint_of(*part) for part in parts]
    left = merged(joints).error(START, merged(joints).bias(START)) / merged(joints).total
    assert left > 0.05
    assert fitted(parts).unseen < 1e-3 * left
