"""Truncation is the best there is: no map of the same rank does better on the same objective."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corp_onnx.calibration.moments import Moments
from corp_onnx.solve.bilinear import recover_query_key
from corp_onnx.solve.lowrank import shared, truncate_query_key, truncate_value_output
from tests.oracles import vectors
from tests.tolerances import distance, rounding

WIDTH, KEPT, TOKENS, CONDITION = 6, 3, 50, 1e2
TOLERANCE = rounding(width=TOKENS * WIDTH, condition=CONDITION**2)
RANDOM_MAPS = 200


def heads(number, seed):
    rng = np.random.default_rng(seed)
    spectrum = np.geomspace(1.0, 1 / CONDITION, WIDTH)
    return np.stack([vectors(rng, spectrum, samples=TOKENS) for _ in range(number)], axis=1)


def grams(x):
    return np.einsum("nhi,nhj->hij", x, x) / len(x)


def logits_error(q, k, form):
    """``E (q kᵀ - q F kᵀ)²`` of one head over all pairs, as a share, from the logits themselves."""
    dense = q @ k.T
    return ((dense - q @ form @ k.T) ** 2).sum() / (dense**2).sum()


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**16))
def test_logits_are_never_worse_than_by_any_other_map_of_this_rank(seed):
    q, k = heads(1, seed), heads(1, seed + 1)
    found = truncate_query_key(grams(q), grams(k), KEPT)
    (a,), (b,) = found.maps
    error = logits_error(q[:, 0], k[:, 0], a @ b.T)
    assert abs(error - found.curve[KEPT]) <= TOLERANCE
    rng = np.random.default_rng(seed)
    for _ in range(RANDOM_MAPS):
        left = np.linalg.qr(rng.standard_normal((WIDTH, KEPT)))[0]
        # the best form behind a random choice of query directions
        seen = q[:, 0] @ left
        right = np.linalg.lstsq(seen, q[:, 0], rcond=None)[0]
        assert error <= logits_error(q[:, 0], k[:, 0], left @ right) + TOLERANCE
    kept = rng.permutation(WIDTH)[None, :KEPT]
    repaired = recover_query_key(Moments.of(q), Moments.of(k), kept, repair="corp", ridge=0.0)
    assert error <= repaired.error + TOLERANCE


@pytest.mark.parametrize("twin", ["swapped", "transposed", "neighbour", "root forgotten"])
def test_wrong_maps_of_logits_are_noticed(twin):
    q, k = heads(2, 0), heads(2, 1)
    found = truncate_query_key(grams(q), grams(k), KEPT)
    a, b = (np.array(one) for one in found.maps)
    wrong = {
        "swapped": (b, a),
        "transposed": (a[::, ::-1], b),
        "neighbour": (a, b[::-1]),
        "root forgotten": (a / np.linalg.norm(a, axis=1, keepdims=True), b),
    }[twin]
    form = wrong[0][0] @ wrong[1][0].T
    assert logits_error(q[:, 0], k[:, 0], form) > found.curve[KEPT] + 1e-2


def test_the_curve_of_logits_counts_all_heads():
    q, k = heads(3, 0), heads(3, 1)
    found = truncate_query_key(grams(q), grams(k), KEPT)
    dense = np.einsum("nhe,mhe->hnm", q, k)
    a, b = found.maps
    narrow = np.einsum("nhe,her,hfr,mhf->hnm", q, a, b, k, optimize=True)
    measured = ((dense - narrow) ** 2).sum() / (dense**2).sum()
    assert abs(found.curve[KEPT] - measured) <= TOLERANCE
    assert found.curve[0] == 1.0
    assert found.curve[-1] == 0.0
    assert (np.diff(found.curve) <= 0).all()


def test_all_directions_give_back_the_logits():
    q, k = heads(2, 0), heads(2, 1)
    a, b = truncate_query_key(grams(q), grams(k), WIDTH).maps
    for head in range(2):
        assert distance(a[head] @ b[head].T, np.eye(WIDTH)) <= TOLERANCE


@pytest.mark.parametrize("rank", [0, 1, KEPT])
def test_singular_grams_cost_nothing_beyond_their_rank(rank):
    rng = np.random.default_rng(0)
    q = (rng.standard_normal((TOKENS, rank)) @ rng.standard_normal((rank, WIDTH)))[:, None]
    k = heads(1, 1)
    found = truncate_query_key(grams(q), grams(k), KEPT)
    (a,), (b,) = found.maps
    dense = q[:, 0] @ k[:, 0].T
    assert np.abs(dense - q[:, 0] @ a @ b.T @ k[:, 0].T).max() <= 1e-6 * (np.abs(dense).max() or 1)
    assert found.curve[KEPT] <= TOLERANCE
    if rank:
        (a,), (b,) = truncate_query_key(grams(q), grams(k), rank - 1 or 1).maps
        assert rank == 1 or np.abs(dense - q[:, 0] @ a @ b.T @ k[:, 0].T).max() > 1e-2


def test_query_heads_of_one_key_head_are_truncated_together():
    q, k = heads(2, 0), heads(1, 1)
    found = truncate_query_key(grams(q).sum(axis=0, keepdims=True), grams(k), KEPT)
    (a,), (b,) = found.maps
    both = np.concatenate([q[:, 0], q[:, 1]])
    assert abs(logits_error(both, k[:, 0], a @ b.T) - found.curve[KEPT]) <= TOLERANCE
    (a,), (b,) = truncate_query_key(grams(q)[:1], grams(k), KEPT).maps  # the wrong twin: of one
    assert logits_error(both, k[:, 0], a @ b.T) > found.curve[KEPT] + 1e-3


# Values


def value_error(o, weight, narrow):
    """What is left of ``o W`` after the best layer behind ``o P``, by least squares."""
    dense = o @ weight
    fitted = np.linalg.lstsq(o @ narrow, dense, rcond=None)[0]
    return ((dense - o @ narrow @ fitted) ** 2).sum() / (dense**2).sum()


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**16), st.sampled_from([2, 4, 9]))
def test_values_are_never_worse_than_by_any_other_map(seed, outputs):
    rng = np.random.default_rng(seed)
    o = heads(1, seed) - heads(1, seed).mean(axis=0)
    weight = rng.standard_normal((WIDTH, outputs))
    found = truncate_value_output(grams(o), weight[None], KEPT)
    error = value_error(o[:, 0], weight, found.maps[0][0])
    assert abs(error - found.curve[KEPT]) <= TOLERANCE
    for _ in range(RANDOM_MAPS):
        other = rng.standard_normal((WIDTH, KEPT))
        assert error <= value_error(o[:, 0], weight, other) + TOLERANCE
    for kept in (np.arange(KEPT), np.arange(KEPT, WIDTH)):
        assert error <= value_error(o[:, 0], weight, np.eye(WIDTH)[:, kept]) + TOLERANCE


def test_maps_that_do_not_look_at_the_weight_are_noticed():
    o = heads(1, 0) - heads(1, 0).mean(axis=0)
    weight = np.random.default_rng(0).standard_normal((WIDTH, 4))
    best = truncate_value_output(grams(o), weight[None], KEPT)
    blind = truncate_value_output(grams(o), np.eye(WIDTH)[None], KEPT)
    assert value_error(o[:, 0], weight, blind.maps[0][0]) > best.curve[KEPT] + 1e-3


def test_heads_that_share_a_value_head_are_pooled():
    covariances = grams(heads(4, 0))
    found = shared(covariances, np.array([0, 1, 0, 0]), 2)
    assert distance(found[0], covariances[[0, 2, 3]].mean(axis=0)) <= TOLERANCE
    assert np.array_equal(found[1], covariances[1])
