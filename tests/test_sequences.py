"""Which axis counts within a sequence, and what centring leaves of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.sequences import centred, sequence_axis
from corp_onnx.graph.model import from_proto
from tests.builders import TINY
from tests.tolerances import distance, rounding

BATCH, TOKENS, HEADS, WIDTH = 3, 5, 2, 4
TOLERANCE = rounding(width=BATCH * TOKENS, condition=10)


def oracle(x, seen, *, tokens_first=False):
    """``x [b, t, h, e]``, sample by sample."""
    x, seen = (np.swapaxes(a, 0, 1) if tokens_first else a for a in (x, seen))
    out = np.array(x)
    for sample, mask in zip(out, seen, strict=True):
        if mask.any():
            sample[mask] -= sample[mask].mean(axis=0)
    out, seen = (np.swapaxes(a, 0, 1) if tokens_first else a for a in (out, seen))
    return out[seen]


def tokens(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((BATCH, TOKENS, HEADS, WIDTH)) + 5 * rng.standard_normal(
        (BATCH, 1, 1, 1)
    )
    return x, rng.random((BATCH, TOKENS)) > 0.4


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.booleans())
def test_padding_counts_in_no_mean(seed, tokens_first):
    x, seen = tokens(seed)
    axis = 0 if tokens_first else 1
    shape = seen.shape
    flat = x.reshape(-1, HEADS, WIDTH)
    mask = seen.reshape(-1)
    found = centred(flat[mask], mask, shape, axis)
    assert distance(found, oracle(x, seen, tokens_first=tokens_first)) <= TOLERANCE
    other = np.where(seen[..., None, None], x, 1e3).reshape(-1, HEADS, WIDTH)
    assert np.array_equal(centred(other[mask], mask, shape, axis), found)


@pytest.mark.parametrize("axis", [0, 1])
def test_without_padding_it_is_the_mean_along_the_axis(axis):
    x, _ = tokens()
    found = centred(x.reshape(-1, HEADS, WIDTH), slice(None), (BATCH, TOKENS), axis)
    assert distance(found, (x - x.mean(axis=axis, keepdims=True)).reshape(found.shape)) <= TOLERANCE
    every = np.ones(BATCH * TOKENS, bool)
    masked = centred(x.reshape(-1, HEADS, WIDTH), every, (BATCH, TOKENS), axis)
    assert distance(masked, found) <= TOLERANCE


def test_other_axes_and_pooled_means_are_noticed():
    x, seen = tokens()
    flat, mask = x.reshape(-1, HEADS, WIDTH)[seen.reshape(-1)], seen.reshape(-1)
    right = oracle(x, seen)
    for axis in (0, None):
        assert distance(centred(flat, mask, seen.shape, axis), right) > 0.1
    assert distance(flat, right) > 0.1


def test_without_an_axis_all_is_one_sequence_and_nothing_stays_nothing():
    x, _ = tokens()
    flat = x.reshape(-1, HEADS, WIDTH)
    found = centred(flat, slice(None), (BATCH, TOKENS), None)
    assert np.abs(found.mean(axis=0)).max() <= TOLERANCE
    assert centred(flat[:0], slice(0), (0, TOKENS), None).shape == (0, HEADS, WIDTH)


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("separate", 1),
        ("packed_split", 1),
        ("tokens_first", 0),
        ("transposed_keys", 1),
        ("single_head", 1),
        ("batch_heads", 1),
        ("cross_attention", 1),
    ],
)
def test_the_axis_is_found_however_heads_are_split(name, axis):
    (block,) = find_blocks(from_proto(TINY[name](0).proto)).blocks
    assert sequence_axis(block.key) == axis


def test_keys_less_their_mean_change_no_probability():
    x, _ = tokens()
    query = np.random.default_rng(1).standard_normal((BATCH, HEADS, TOKENS, WIDTH))

    def probabilities(keys):
        logits = np.einsum("bhqe,bthe->bhqt", query, keys)
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    def at(axis):
        flat = centred(x.reshape(-1, HEADS, WIDTH), slice(None), (BATCH, TOKENS), axis)
        return probabilities(flat.reshape(x.shape))

    assert distance(at(1), probabilities(x)) <= 1e-12
    assert distance(at(0), probabilities(x)) > 0.1
