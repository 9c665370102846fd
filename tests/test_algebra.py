"""Linear algebra by LAPACK, and the same in any namespace of arrays."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest

from corp_onnx.device import beside, to_host
from corp_onnx.errors import IllConditioned
from corp_onnx.solve import algebra
from corp_onnx.solve.algebra import (
    MAX_CONDITION,
    block,
    column_products,
    inner,
    inverse_definite,
    mean_variance,
    pseudo_inverse,
    require_definite,
    ridged,
    row_products,
    rows,
    solve_definite,
    spread_out,
)
from tests.tolerances import distance, rounding

WIDTH, CONDITION = 9, 1e4
TOLERANCE = rounding(width=WIDTH**2, condition=CONDITION)
SOME, OTHERS = np.array([4, 0, 7]), np.array([1, 2, 8, 3])
PRESENT = np.isin(np.arange(WIDTH), SOME)


def definite(low=1 / CONDITION):
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))
    return (axes * np.geomspace(1.0, low, WIDTH)) @ axes.T


def indefinite():
    system = definite()
    return system - 2 * np.linalg.eigvalsh(system)[0] * np.eye(WIDTH)


def matrices():
    rng = np.random.default_rng(1)
    return rng.standard_normal((WIDTH, 5)), rng.standard_normal((WIDTH, 5))


def _between_zeros(first, second, third):
    whole = np.zeros((WIDTH, 5))
    whole[0], whole[4], whole[7] = first, second, third
    return whole


FUNCTIONS = {
    "inner": lambda a, b, s: np.array(inner(a, b)),
    "row_products": lambda a, b, s: row_products(a, b),
    "column_products": lambda a, b, s: column_products(a, b),
    "rows": lambda a, b, s: rows(a, SOME),
    "block": lambda a, b, s: block(s, SOME, OTHERS),
    "spread_out": lambda a, b, s: spread_out(rows(a, SOME), PRESENT),
    "ridged": lambda a, b, s: ridged(s, 0.5),
    "solve_definite": lambda a, b, s: solve_definite(ridged(s, 0.0), a)[0],
    "inverse_definite": lambda a, b, s: inverse_definite(s),
    "pseudo_inverse": lambda a, b, s: pseudo_inverse(s, negligible=1e-2),
}
OBVIOUS = {
    "inner": lambda a, b, s: (a * b).sum(),
    "row_products": lambda a, b, s: (a * b).sum(axis=1),
    "column_products": lambda a, b, s: (a * b).sum(axis=0),
    "rows": lambda a, b, s: np.stack([a[4], a[0], a[7]]),
    "block": lambda a, b, s: np.array([[s[i, j] for j in OTHERS] for i in SOME]),
    "spread_out": lambda a, b, s: _between_zeros(a[4], a[0], a[7]),
    "ridged": lambda a, b, s: s + 0.5 * np.eye(WIDTH),
    "solve_definite": lambda a, b, s: np.linalg.solve(s, a),
    "inverse_definite": lambda a, b, s: np.linalg.solve(s, np.eye(WIDTH)),
    "pseudo_inverse": lambda a, b, s: np.linalg.pinv(s, rcond=1e-2),
}


def computed(name, device):
    return to_host(FUNCTIONS[name](*map(device.asarray, (*matrices(), definite()))))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_the_obvious_one_in_every_namespace(name, any_device):
    expected = np.asarray(OBVIOUS[name](*matrices(), definite()))
    assert distance(computed(name, any_device), expected) <= TOLERANCE
    _, other = matrices()
    moved = definite() + 0.1 * np.outer(np.arange(WIDTH), np.arange(WIDTH))
    twin = np.asarray(OBVIOUS[name](other, other, moved))
    assert distance(computed(name, any_device), twin) > 1e-3


def test_the_condition_is_that_of_the_1_norm(any_device):
    system = definite()
    exact = np.linalg.cond(system, 1)
    _, found = solve_definite(any_device.asarray(system.copy()), any_device.asarray(matrices()[0]))
    least = 1 / 3 if any_device.is_host else 1 - TOLERANCE  # LAPACK estimates, from below
    assert least <= found / exact <= 1 + TOLERANCE
    assert np.linalg.cond(system, 2) < 0.9 * exact  # the wrong twin


@pytest.mark.parametrize(
    ("system", "words"),
    [
        (indefinite(), "is singular"),
        (np.zeros((WIDTH, WIDTH)), "is singular"),
        (definite(0.5 / MAX_CONDITION), "has condition"),
    ],
    ids=["indefinite", "zero", "ill-conditioned"],
)
def test_what_has_no_good_answer_is_refused(system, words, any_device):
    arrays = any_device.asarray(system.copy()), any_device.asarray(matrices()[0])
    with pytest.raises(IllConditioned, match=words):
        solve_definite(*arrays)


def test_an_inverse_of_what_has_no_factor_is_refused(any_device):
    with pytest.raises(IllConditioned, match="raise --ridge"):
        inverse_definite(any_device.asarray(indefinite()))


@pytest.mark.parametrize("given", ["triangle", "nan"])
def test_a_factor_that_is_none_is_noticed(monkeypatch, given):
    """A device may give one without a word for what is not definite."""

    def silent(system):
        made = np.tril(to_host(system)) if given == "triangle" else np.full((WIDTH, WIDTH), np.nan)
        return array_api_strict.asarray(made)

    system = array_api_strict.asarray(indefinite())
    monkeypatch.setattr(array_api_strict.linalg, "cholesky", silent)
    with pytest.raises(IllConditioned, match="is singular"):
        solve_definite(system, beside(matrices()[0], system))
    monkeypatch.setattr(algebra, "require_definite", lambda system: None)  # the wrong twin
    answer, _ = solve_definite(system, beside(matrices()[0], system))
    assert np.isfinite(to_host(answer)).all()


@pytest.mark.parametrize("low", [1.0, 1e-4, 1e-11])
def test_a_true_factor_is_never_refused(low, any_device):
    if not any_device.is_host:
        require_definite(any_device.asarray(definite(low)))


def test_a_system_that_is_ridged_is_another_array(any_device):
    system = any_device.asarray(definite())
    solve_definite(ridged(system, 0.0), any_device.asarray(matrices()[0]))
    assert np.array_equal(to_host(system), definite())


@pytest.mark.parametrize(
    ("variances", "mean"),
    [
        ([1.0, 2.0, 3.0], 2.0),
        ([0.0, 0.0, 3.0], 1.0),
        ([1.0, 1.0, 1e3], 1002 / 3),
        ([1.0, 1.0, 1e6], 10002 / 3),
        ([1.0, 1.0, 1e12], 1e5),
        ([0.0, 0.0, 0.0], 0.0),
    ],
)
@pytest.mark.parametrize("namespace", [np, array_api_strict])
def test_no_channel_counts_for_more_in_a_mean_than_ten_thousand_times_the_median(
    variances, mean, namespace
):
    covariance = namespace.asarray(np.diag(variances))
    assert mean_variance(covariance) == pytest.approx(mean)
