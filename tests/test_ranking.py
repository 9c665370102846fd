"""Rankings follow their formulas, choices are the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corp_onnx.calibration.moments import Moments
from corp_onnx.errors import PlanError
from corp_onnx.solve.ranking import (
    RANKINGS,
    channel_energy,
    column_norms,
    highest,
    row_norms,
    score,
)
from tests.tolerances import distance, rounding


def hidden(seed=0, samples=50, width=6):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((samples, width)) * rng.uniform(0.1, 3, width) + rng.uniform(
        -2, 2, width
    )


def test_energy_is_the_mean_square():
    z = hidden()
    energy = channel_energy(Moments.of(z))
    assert distance(energy, (z**2).mean(axis=0)) <= rounding(width=50)
    assert distance(energy, z.var(axis=0)) > 0.01  # the wrong twin: centred


def test_energy_alone_ignores_the_weights():
    energies = channel_energy(Moments.of(hidden()))
    assert np.array_equal(score("energy", energies, [np.arange(6.0)]), energies)


@pytest.mark.parametrize("weights", [2, 3])
def test_energy_norm_takes_every_weight_that_carries_the_channel(weights):
    rng = np.random.default_rng(1)
    z = hidden()
    columns = [rng.standard_normal((4, 6)).astype(np.float32) for _ in range(weights - 1)]
    down = rng.standard_normal((6, 5)).astype(np.float32)
    norms = [*map(column_norms, columns), row_norms(down)]
    expected = [
        (z[:, j] ** 2).mean()
        * np.prod([np.sqrt((w[:, j].astype(float) ** 2).sum()) for w in columns])
        * np.sqrt((down[j].astype(float) ** 2).sum())
        for j in range(6)
    ]
    energies = channel_energy(Moments.of(z))
    actual = score("energy-norm", energies, norms)
    assert distance(actual, np.array(expected)) <= rounding(width=50)
    assert distance(score("energy-norm", energies, norms[1:]), np.array(expected)) > 0.01


def test_scores_of_heads_stay_apart():
    energies = np.arange(6.0).reshape(2, 3)
    norms = [np.ones((2, 3)), np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])]
    expected = np.array([[0.0, 1.0, 2.0], [3.0, 8.0, 15.0]])
    assert np.array_equal(score("energy-norm", energies, norms), expected)


def test_an_unknown_ranking_is_refused_with_the_known_ones():
    with pytest.raises(PlanError, match=f"'size'; choose one of {', '.join(RANKINGS)}"):
        score("size", np.ones(3))


@given(
    scores=st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, 5.0]), min_size=1, max_size=12),
    data=st.data(),
)
def test_the_highest_are_kept_and_ties_go_to_the_lower_index(scores, data):
    keep = data.draw(st.integers(0, len(scores)))
    expected = sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:keep])
    assert highest(np.array(scores), keep).tolist() == expected


def test_every_head_chooses_for_itself():
    scores = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    assert highest(scores, 2).tolist() == [[0, 2], [1, 2]]
