"""Logit recovery against a Kronecker solve and against logits computed in full."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corp_onnx.calibration.moments import Moments
from corp_onnx.errors import DataError, IllConditioned
from corp_onnx.solve.bilinear import recover_query_key, solve_bilinear
from tests.oracles import kronecker_bilinear, squared_error, vectors
from tests.tolerances import distance, rounding

WIDTH = 8
TOKENS = 60


def rng(seed=0):
    return np.random.default_rng(seed)


def heads(number, spectrum, *, seed=0):
    """Projected vectors ``[n, h, e]`` whose heads have the given spectrum."""
    draw = rng(seed)
    return np.stack([vectors(draw, spectrum, samples=TOKENS) for _ in range(number)], axis=1)


def coordinates(number, *, width=WIDTH, keep=4, seed=5):
    draw = rng(seed)
    return np.stack([np.sort(draw.permutation(width)[:keep]) for _ in range(number)])


def with_constant(x):
    x[:, :, 1] = 2.0
    return x


def layer(name):
    """Queries, keys, kept coordinates and ridge of a row of the table."""
    falling = np.geomspace(1.0, 1e-2, WIDTH)
    deficient = np.where(np.arange(WIDTH) < 3, 1.0, 0.0)
    match name:
        case "well conditioned":
            return heads(3, falling), heads(3, falling, seed=1), coordinates(3), 0.0
        case "with ridge":
            return heads(3, falling), heads(3, falling, seed=1), coordinates(3), 1e-2
        case "rank deficient":
            return heads(3, deficient), heads(3, falling, seed=1), coordinates(3), 1e-4
        case "one coordinate":
            kept = coordinates(3, keep=1)
            return heads(3, falling), heads(3, falling, seed=1), kept, 0.0
        case "wide":
            wide = np.geomspace(1.0, 1e-2, 40)
            kept = coordinates(1, width=40, keep=24)
            return heads(1, wide), heads(1, wide, seed=1), kept, 1e-6
        case "constant coordinate":
            queries, keys = heads(3, falling), heads(3, falling, seed=1)
            return with_constant(queries), with_constant(keys), coordinates(3), 1e-4
        case "shared keys":
            return heads(6, falling), heads(2, falling, seed=1), coordinates(2), 1e-4
    raise AssertionError(name)


TABLE = [
    "well conditioned",
    "with ridge",
    "rank deficient",
    "one coordinate",
    "wide",
    "constant coordinate",
    "shared keys",
]


def systems(name):
    """Left, right, target and absolute ridge of every head, from raw tokens."""
    queries, keys, kept, ridge = layer(name)
    sharers = queries.shape[1] // keys.shape[1]
    for head, stay in enumerate(kept):
        q = np.concatenate([queries[:, head * sharers + i] for i in range(sharers)])
        k = keys[:, head]
        go = np.setdiff1d(np.arange(q.shape[1]), stay)
        left, right = q[:, stay].T @ q[:, stay] / len(q), k[:, stay].T @ k[:, stay] / len(k)
        target = (q[:, stay].T @ q[:, go] / len(q)) @ (k[:, go].T @ k[:, stay] / len(k))
        yield left, right, target, ridge * np.trace(left) * np.trace(right) / len(stay) ** 2


def recovered(name, repair="corp"):
    queries, keys, kept, ridge = layer(name)
    return recover_query_key(
        Moments.of(queries), Moments.of(keys), kept, repair=repair, ridge=ridge
    )


def forms(maps, name):
    """``A Bᵀ`` of every key head, on its kept coordinates."""
    _, keys, kept, _ = layer(name)
    sharers = len(maps.query) // keys.shape[1]
    for head, stay in enumerate(kept):
        yield maps.query[head * sharers][stay] @ maps.key[head][stay].T


def assert_is_the_kronecker_solution(maps, name):
    for form, (left, right, target, ridge) in zip(forms(maps, name), systems(name), strict=True):
        expected = np.eye(len(left)) + kronecker_bilinear(left, right, target, ridge)
        tolerance = rounding(width=TOKENS + len(left) ** 2, condition=maps.condition)
        assert distance(form, expected) <= tolerance


def logits(queries, keys):
    """Logits of all pairs of tokens, ``[h, n, n]``, key heads repeated for their group."""
    repeated = np.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)
    return np.einsum("nhe,mhe->hnm", queries, repeated)


def assert_shares_are_measured(maps, name):
    queries, keys, kept, _ = layer(name)
    dense = logits(queries, keys)
    narrow = logits(
        np.einsum("nhe,her->nhr", queries, maps.query), np.einsum("nge,ger->ngr", keys, maps.key)
    )
    gone = keys.copy()
    for head, stay in enumerate(kept):
        gone[:, head, stay] = 0.0
    tolerance = rounding(width=TOKENS, condition=maps.condition)
    error = squared_error(narrow, dense, centre=False)
    unexplained = ((narrow - dense) ** 2).sum() / (logits(queries, gone) ** 2).sum()
    assert abs(maps.error - error) <= tolerance
    assert abs(maps.unexplained - unexplained) <= tolerance * (1 + unexplained / error)


@pytest.mark.parametrize("name", TABLE)
def test_maps_solve_the_kronecker_system(name):
    assert_is_the_kronecker_solution(recovered(name), name)


@pytest.mark.parametrize("repair", ["corp", "mean", "none"])
@pytest.mark.parametrize("name", TABLE)
def test_the_predicted_error_is_the_measured_one(name, repair):
    assert_shares_are_measured(recovered(name, repair), name)


def symmetrised(maps, name):
    """The maps of a symmetrised ``M``."""
    _, _, kept, _ = layer(name)
    query, key = np.zeros_like(maps.query), np.zeros_like(maps.key)
    for head, form in enumerate(forms(maps, name)):
        query[head][kept[head]] = (form + form.T) / 2
        key[head][kept[head]] = np.eye(len(form))
    return replace(maps, query=query, key=key)


MUTANTS = {
    "M symmetrised": symmetrised,
    "query and key maps swapped": lambda m, _: replace(m, query=m.key, key=m.query),
    "two heads swapped": lambda m, _: replace(m, query=m.query[[1, 0, 2]]),
    "a map dropped": lambda m, _: replace(m, key=np.sign(np.abs(m.key))),
    "the identity forgotten": lambda m, _: replace(m, query=m.query - m.key),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_maps_are_noticed(mutant):
    name = "well conditioned"
    wrong = MUTANTS[mutant](recovered(name), name)
    with pytest.raises(AssertionError):
        assert_is_the_kronecker_solution(wrong, name)
    with pytest.raises(AssertionError):
        assert_shares_are_measured(wrong, name)


def test_maps_that_forget_the_ridge_are_noticed():
    queries, keys, kept, _ = layer("with ridge")
    wrong = recover_query_key(Moments.of(queries), Moments.of(keys), kept, repair="corp", ridge=0.0)
    with pytest.raises(AssertionError):
        assert_is_the_kronecker_solution(wrong, "with ridge")


def test_centred_grams_are_noticed():
    queries, keys, kept, ridge = layer("well conditioned")
    wrong = recover_query_key(
        Moments.of(queries - queries.mean(axis=0)),
        Moments.of(keys - keys.mean(axis=0)),
        kept,
        repair="corp",
        ridge=ridge,
    )
    with pytest.raises(AssertionError):
        assert_is_the_kronecker_solution(wrong, "well conditioned")


def test_query_heads_that_read_the_same_key_head_share_a_map():
    maps = recovered("shared keys")
    assert maps.query.shape == (6, WIDTH, 4)
    assert maps.key.shape == (2, WIDTH, 4)
    for head in range(6):
        assert np.array_equal(maps.query[head], maps.query[head // 3 * 3])
    assert not np.array_equal(maps.query[0], maps.query[3])
    interleaved = replace(maps, query=maps.query[[0, 3, 0, 3, 0, 3]])
    with pytest.raises(AssertionError):
        assert_shares_are_measured(interleaved, "shared keys")


@pytest.mark.parametrize("repair", ["corp", "mean", "none"])
@pytest.mark.parametrize("name", TABLE)
def test_only_kept_coordinates_are_read(name, repair):
    maps = recovered(name, repair)
    _, keys, kept, _ = layer(name)
    for head, stay in enumerate(kept):
        gone = np.setdiff1d(np.arange(keys.shape[2]), stay)
        assert not maps.key[head][gone].any()
        assert not maps.query[head * (len(maps.query) // len(kept))][gone].any()


@pytest.mark.parametrize("repair", ["mean", "none"])
def test_repairs_without_prediction_select(repair):
    maps = recovered("with ridge", repair)
    _, _, kept, _ = layer("with ridge")
    for head, stay in enumerate(kept):
        assert np.array_equal(maps.query[head], np.eye(WIDTH)[:, stay])
        assert np.array_equal(maps.key[head], np.eye(WIDTH)[:, stay])
    assert maps.condition == 1.0
    assert maps.unexplained == 1.0


@pytest.mark.parametrize("name", TABLE)
def test_the_repair_is_better_than_none(name):
    assert recovered(name).error < recovered(name, "none").error


@pytest.mark.parametrize("repair", ["corp", "mean", "none"])
def test_keeping_every_coordinate_is_the_identity_bit_for_bit(repair):
    queries, keys, _, _ = layer("rank deficient")
    everything = np.tile(np.arange(WIDTH), (3, 1))
    maps = recover_query_key(
        Moments.of(queries), Moments.of(keys), everything, repair=repair, ridge=0.0
    )
    identity = np.tile(np.eye(WIDTH), (3, 1, 1))
    assert np.array_equal(maps.query, identity)
    assert np.array_equal(maps.key, identity)
    assert (maps.condition, maps.unexplained, maps.error) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("repair", ["corp", "none"])
def test_keeping_no_coordinate_loses_every_logit(repair):
    queries, keys, _, _ = layer("well conditioned")
    nothing = np.zeros((3, 0), int)
    maps = recover_query_key(
        Moments.of(queries), Moments.of(keys), nothing, repair=repair, ridge=0.0
    )
    assert maps.query.shape == (3, WIDTH, 0)
    assert maps.error == 1.0


@settings(deadline=None)
@given(seed=st.integers(0, 999), keep=st.integers(1, 6), dtype=st.sampled_from([np.float32, float]))
def test_removed_coordinates_linear_in_kept_ones_are_recovered_exactly(seed, keep, dtype):
    draw = rng(seed)
    spectrum = np.geomspace(1.0, 0.3, keep)
    mixed = []
    for _ in range(2):
        kept = vectors(draw, spectrum, samples=TOKENS, mean=0.3)
        mixed.append(np.hstack([kept, kept @ draw.standard_normal((keep, 4))])[:, None])
    query, key = (Moments.of(values.astype(dtype)) for values in mixed)
    maps = recover_query_key(query, key, np.arange(keep)[None], repair="corp", ridge=0.0)
    lost = maps.error * (logits(*mixed) ** 2).mean()
    largest = np.prod([(values**2).sum(axis=-1).mean() for values in mixed])  # no logit cancelled
    tolerance = rounding(width=TOKENS, condition=maps.condition, dtype=dtype)
    assert lost <= tolerance * largest


def test_the_order_of_kept_coordinates_changes_no_logit():
    queries, keys, kept, ridge = layer("with ridge")
    plain, turned = (
        recover_query_key(Moments.of(queries), Moments.of(keys), which, repair="corp", ridge=ridge)
        for which in (kept, kept[:, ::-1])
    )
    tolerance = rounding(width=WIDTH**2, condition=plain.condition)
    products = [m.query @ m.key.swapaxes(-1, -2) for m in (plain, turned)]
    assert distance(products[1], products[0]) <= tolerance


def test_the_ridge_is_relative_to_both_sides():
    queries, keys, kept, ridge = layer("with ridge")
    scaled = recover_query_key(
        Moments.of(queries * 1e3), Moments.of(keys * 10), kept, repair="corp", ridge=ridge
    )
    assert_is_the_kronecker_solution(scaled, "with ridge")


@pytest.mark.parametrize("name", ["well conditioned", "with ridge", "rank deficient"])
def test_the_condition_is_that_of_the_kronecker_system(name):
    exact = [
        np.linalg.cond(np.kron(right, left) + ridge * np.eye(target.size))
        for left, right, target, ridge in systems(name)
    ]
    found = recovered(name).condition
    assert abs(found / max(exact) - 1) <= rounding(width=WIDTH**2, condition=max(exact))


def test_a_singular_system_is_refused_with_a_remedy():
    queries, keys, kept, _ = layer("constant coordinate")
    queries[:, 1, kept[1, 0]] = 0.0
    with pytest.raises(IllConditioned, match=r"4 kept coordinates .* raise --ridge"):
        recover_query_key(Moments.of(queries), Moments.of(keys), kept, repair="corp", ridge=0.0)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_a_dead_head_is_kept_as_it_is(ridge):
    queries, keys, kept, _ = layer("well conditioned")
    queries[:, 1] = 0.0
    maps = recover_query_key(
        Moments.of(queries), Moments.of(keys), kept, repair="corp", ridge=ridge
    )
    assert np.array_equal(maps.query[1] @ maps.key[1].T, np.diag(np.isin(np.arange(8), kept[1])))


def test_heads_that_are_all_dead_lose_nothing():
    dead = Moments.of(np.zeros((TOKENS, 2, WIDTH)))
    maps = recover_query_key(dead, dead, coordinates(2), repair="corp", ridge=1e-3)
    assert (maps.condition, maps.unexplained, maps.error) == (1.0, 0.0, 0.0)


def test_negative_eigenvalues_of_rounding_count_as_zero():
    left = np.diag([1.0, -1e-17])
    answer = solve_bilinear(left, np.eye(2), np.eye(2), ridge=1e-6)
    assert answer.condition == (1 + 1e-6) / 1e-6
    with pytest.raises(IllConditioned, match="condition inf"):
        solve_bilinear(left, np.eye(2), np.eye(2), ridge=0.0)


def test_no_samples_are_refused():
    empty = Moments.empty((2, WIDTH))
    with pytest.raises(DataError, match="no samples"):
        recover_query_key(empty, empty, coordinates(2), repair="none", ridge=0.0)


def test_query_heads_that_cannot_be_grouped_are_our_bug():
    three, two = (Moments.of(np.ones((4, number, WIDTH))) for number in (3, 2))
    with pytest.raises(AssertionError, match="as many query heads"):
        recover_query_key(three, two, coordinates(2), repair="none", ridge=0.0)
