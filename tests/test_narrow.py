"""Blocks of best: how selection, truncation and refit come together."""

from __future__ import annotations

import numpy as np
import pytest

from corp_onnx.calibration.moments import Accumulator, Moments
from corp_onnx.solve.joint import Joint
from corp_onnx.solve.lowrank import NEGLIGIBLE
from corp_onnx.solve.narrow import (
    Branch,
    narrow_mlp,
    narrow_output,
    narrow_query_key,
)
from corp_onnx.solve.values import Heads, narrow_values
from tests.tolerances import distance, rounding

WIDTH, OUT, SAMPLES, RIDGE = 8, 5, 300, 1e-3
HEADS = Heads(np.array([[0, 2, 4, 6], [1, 3, 5, 7]]), np.array([0, 1]))
SHARED = Heads(HEADS.places, np.array([0, 0]))
TOLERANCE = rounding(width=SAMPLES * WIDTH, condition=1e4)
GAIN = np.array([0.5, -2.0, 1.0, 1e-2, 3.0])


def features(seed=0):
    rng = np.random.default_rng(seed)
    mixing = np.eye(WIDTH) + 0.4 * rng.standard_normal((WIDTH, WIDTH))
    return rng.standard_normal((SAMPLES, WIDTH)) @ mixing + 1.0


def weight_and_bias():
    rng = np.random.default_rng(5)
    return rng.standard_normal((WIDTH, OUT)), rng.standard_normal(OUT)


def branch(gain=1.0):
    return Branch("block", weight_and_bias()[0], np.broadcast_to(gain, OUT).astype(float))


def parts_of(f, gain=1.0, extra=0.0, parts=2):
    """The target is what the dense layer adds to the stream, and something more."""
    weight, bias = weight_and_bias()
    t = gain * (f @ weight + bias) + extra
    pieces = zip(np.split(f, parts), np.split(t, parts), strict=True)
    return [Joint.of(Moments.of(np.hstack(piece)), WIDTH) for piece in pieces], t


def share_left(t, made):
    return ((t - made) ** 2).sum() / ((t - t.mean(axis=0)) ** 2).sum()


def behind_values(fold, f, heads, gain):
    narrow = [f[:, heads.places[h]] @ fold.value[heads.value_heads[h]] for h in range(2)]
    y = sum(x @ rows for x, rows in zip(narrow, fold.weight, strict=True)) + fold.bias
    return gain * y


@pytest.mark.parametrize("gain", [1.0, GAIN], ids=["plain", "LayerScale"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_error_of_an_mlp_is_what_its_fold_leaves(gain, parts):
    f = features()
    joints, t = parts_of(f, gain, parts=parts)
    fold = narrow_mlp(joints, branch(gain), 4, ridges=[RIDGE])
    made = gain * (f[:, fold.kept] @ fold.weight + fold.bias)
    assert abs(fold.evidence.error / share_left(t, made) - 1) <= 1e-9
    assert 0 < fold.evidence.error < 1
    assert (fold.evidence.unseen is None) == (parts == 1)
    dropped = gain * (f[:, fold.kept] @ fold.weight)  # wrong twins
    forgotten = f[:, fold.kept] @ fold.weight + fold.bias
    assert share_left(t, dropped) > 1.1 * fold.evidence.error
    assert np.isscalar(gain) or share_left(t, forgotten) > 1.1 * fold.evidence.error


def test_a_gain_decides_what_stays():
    f = features()
    alone = np.array([0.0, 0.0, 1.0, 0.0, 0.0]) + 1e-5
    plain, scaled = (
        narrow_mlp(parts_of(f, gain, parts=1)[0], branch(gain), 3, ridges=[RIDGE])
        for gain in (1.0, alone)
    )
    assert plain.kept.tolist() != scaled.kept.tolist()


def test_channels_that_are_given_are_kept():
    kept = np.array([1, 2, 6])
    fold = narrow_mlp(parts_of(features())[0], branch(), 3, ridges=[RIDGE], kept=kept)
    assert fold.kept.tolist() == [1, 2, 6]


def test_a_ridge_keeps_heads_from_standing_in_for_each_other():
    joints, _ = parts_of(features(), parts=1)
    errors = [
        narrow_values(joints, branch(), HEADS, 2, ridges=[ridge]).evidence.error
        for ridge in (0.0, RIDGE, 1e3)
    ]
    assert errors[0] < errors[1] < errors[2] / 1.1


def test_one_channel_much_larger_than_the_others_does_not_drown_them():
    """Scaled by as much as its row of the weight is divided by, nothing has changed."""
    rng = np.random.default_rng(0)
    width, kept = 96, np.arange(48)
    f = rng.standard_normal((400, 60)) @ rng.standard_normal((60, width))
    weight = rng.standard_normal((width, OUT))
    errors = []
    for scale in (1.0, 1e4):
        factors = np.where(np.arange(width) == 3, scale, 1.0)
        joint = Joint.of(Moments.of(np.hstack([f * factors, f @ weight])), width)
        one = Branch("block", weight / factors[:, None], np.ones(OUT))
        fold = narrow_mlp([joint], one, len(kept), ridges=[1e-5], kept=kept)
        errors.append(fold.evidence.error)
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("ridge", [RIDGE, 1.0])
@pytest.mark.parametrize("gain", [1.0, GAIN], ids=["plain", "LayerScale"])
@pytest.mark.parametrize("heads", [HEADS, SHARED], ids=["heads", "shared"])
def test_where_all_stays_nothing_changes_whatever_the_ridge(heads, gain, ridge):
    f = features()
    joints, t = parts_of(f, gain)
    weight, bias = weight_and_bias()
    mlp = narrow_mlp(joints, branch(gain), WIDTH, ridges=[ridge])
    output = narrow_output(joints, branch(gain))
    for fold in (mlp, output):
        assert distance(fold.weight, weight) <= TOLERANCE
        assert distance(fold.bias, bias) <= TOLERANCE
    values = narrow_values(joints, branch(gain), heads, 4, ridges=[ridge])
    assert share_left(t, behind_values(values, f, heads, gain)) <= TOLERANCE**2
    assert values.evidence.error <= TOLERANCE


@pytest.mark.parametrize("gain", [1.0, GAIN], ids=["plain", "LayerScale"])
@pytest.mark.parametrize("heads", [HEADS, SHARED], ids=["heads", "shared"])
def test_the_error_of_values_is_what_their_fold_leaves(heads, gain):
    f = features()
    joints, t = parts_of(f, gain)
    fold = narrow_values(joints, branch(gain), heads, 2, ridges=[RIDGE])
    assert fold.value.shape == (heads.groups, 4, 2)
    left = share_left(t, behind_values(fold, f, heads, gain))
    assert abs(fold.evidence.error / left - 1) <= 1e-9
    wrong = Heads(heads.places[::-1], heads.value_heads)
    assert share_left(t, behind_values(fold, f, wrong, gain)) > 2 * left


def test_other_heads_say_what_one_head_lost():
    f = features()
    f[:, HEADS.places[1]] = f[:, HEADS.places[0]] + 0.01 * features(1)[:, :4]
    joints, _ = parts_of(f, parts=1)
    fold = narrow_values(joints, branch(), HEADS, 2, ridges=[1e-9])
    assert fold.evidence.error < 0.5 * fold.evidence.unexplained


def test_values_of_low_rank_cost_nothing():
    f = features()
    for places in HEADS.places:
        f[:, places] = f[:, places[:2]] @ np.random.default_rng(2).standard_normal((2, 4))
    joints, _ = parts_of(f)
    assert narrow_values(joints, branch(), HEADS, 2, ridges=[RIDGE]).evidence.error <= 1e-12
    assert narrow_values(joints, branch(), HEADS, 1, ridges=[RIDGE]).evidence.error > 1e-3


def test_an_error_from_before_is_undone_by_what_is_kept():
    f = features()
    extra = f @ np.random.default_rng(3).standard_normal((WIDTH, OUT))
    joints, _ = parts_of(f, extra=extra)
    alone = narrow_output(joints[:1], branch())
    fitted = narrow_output(joints, branch())
    assert alone.evidence.error > 0.1
    assert fitted.evidence.unseen < 1e-3


def test_heads_that_share_a_key_head_share_its_map():
    rng = np.random.default_rng(0)
    query, key = Moments.of(rng.standard_normal((50, 4, 6))), rng.standard_normal((50, 2, 6))
    key -= key.mean(axis=0)
    heads = np.array([0, 0, 1, 1])
    fold = narrow_query_key("block", query, Moments.of(key), heads, 3)
    assert (fold.query.shape, fold.key.shape) == ((4, 6, 3), (2, 6, 3))
    assert np.array_equal(fold.query[0], fold.query[1])
    assert not np.array_equal(fold.query[1], fold.query[2])
    other = narrow_query_key("block", query, Moments.of(key), np.array([0, 1, 0, 1]), 3)
    assert other.evidence.error != fold.evidence.error


@pytest.mark.parametrize("parts", [1, 2])
def test_values_of_full_width_keep_what_never_varied_in_the_samples(parts):
    f = features()
    f[:, HEADS.places[0][1]] = 2.0
    f[:, HEADS.places[1]] = f[:, HEADS.places[1][:1]]
    weight, bias = weight_and_bias()
    joints, _ = parts_of(f, parts=parts)
    fold = narrow_values(joints, branch(), HEADS, 4, ridges=[RIDGE])
    other = features(1)
    wanted = other @ weight + bias
    assert distance(behind_values(fold, other, HEADS, 1.0), wanted) <= TOLERANCE
    varying = np.linalg.pinv(np.cov(f.T), hermitian=True, rcond=NEGLIGIBLE) @ np.cov(f.T)
    assert distance(other @ varying @ weight + bias, wanted) > 0.1  # the wrong twin


def test_values_that_span_less_than_a_head_are_no_singular_system():
    """In float32 the missing directions are rounding, which differs from part to part."""
    f = features()
    for places in HEADS.places:
        f[:, places] = f[:, places[:3]] @ np.random.default_rng(2).standard_normal((3, 4))
    weight, bias = weight_and_bias()
    joints = []
    for part in np.split(f, 2):
        total = Accumulator((WIDTH + OUT,))
        total.add(np.hstack([part, part @ weight + bias]).astype(np.float32))
        joints.append(Joint.of(total.moments(), WIDTH))
    fold = narrow_values(joints, branch(), HEADS, 4, ridges=[RIDGE])
    assert fold.evidence.condition <= 1 / NEGLIGIBLE
    assert share_left(f @ weight + bias, behind_values(fold, f, HEADS, 1.0)) <= 1e-9
