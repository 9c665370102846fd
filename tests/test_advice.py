"""Advice on calibration data, from the gap between seen and unseen samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from corp_onnx.report.advice import advice, gaps, uncounted
from corp_onnx.solve.folds import Evidence, MlpFold, OutputFold, QueryKeyFold, Solution


def fold(block: str, error: float, unseen: float | None) -> MlpFold:
    nothing = np.zeros((1, 1))
    return MlpFold(block, np.zeros(1, int), nothing, nothing[0], Evidence(0.5, 1.0, error, unseen))


def solution(*folds) -> Solution:
    return Solution("best", folds, in_sequence=True)


def test_a_wide_gap_is_told_with_the_number_that_would_close_it():
    (told,) = advice(solution(fold("mlp.0", 0.10, 0.13), fold("mlp.1", 0.20, 0.30)), 100)
    # Gaps of 30 % and 50 % with half of the inputs: 20 % on average with all of them.
    assert "about 20% more" in told
    assert "mlp.1 mlp by 25%" in told
    assert "About 400 of equal variety" in told
    (worse,) = advice(solution(fold("mlp.0", 0.10, 0.20), fold("mlp.1", 0.20, 0.40)), 100)
    assert "About 1000 of" in worse


@pytest.mark.parametrize(
    "folds",
    [
        (fold("mlp.0", 0.10, 0.105),),
        (fold("mlp.0", 0.10, 0.09),),
        (fold("mlp.0", 1e-6, 1e-3),),
        (),
    ],
    ids=["narrow", "none", "negligible", "no folds"],
)
def test_no_advice_is_given_where_there_is_no_need(folds):
    assert advice(solution(*folds), 100) == ()


def test_that_nothing_was_fitted_is_told_where_something_might_have_been():
    unfitted = solution(fold("mlp.0", 0.10, None))
    (told,) = advice(unfitted, 6)
    assert told.startswith("6 calibration inputs are too few")
    assert advice(replace(unfitted, in_sequence=False), 6) == ()


def test_gaps_are_by_block_and_axis():
    nothing = np.zeros((1, 1))
    output = OutputFold("attention.0", nothing, nothing[0], Evidence(0.0, 1.0, 0.1, 0.2))
    logits = QueryKeyFold("attention.0", nothing[None], nothing[None], Evidence(0.1, 1.0, 0.1))
    found = gaps(solution(logits, output, fold("mlp.0", 0.2, 0.25)))
    assert found == {"attention.0": pytest.approx(1.0), "mlp.0 mlp": pytest.approx(0.25)}


def test_what_no_count_holds_is_told():
    assert uncounted(()) == ()
    (one,), (several,) = uncounted(["/up/MatMul"]), uncounted(["/up/MatMul", "b", "c"])
    assert "leave out /up/MatMul:" in one
    assert "leave out /up/MatMul and 2 more:" in several
