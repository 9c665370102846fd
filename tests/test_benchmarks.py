"""Every benchmark of the methods runs on the bundled model, and says what its files say."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import ablation, budgets, effort, quality, quantisers, sizes
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.ablation import fixed_choice
from benchmarks.outcome import Place
from benchmarks.samples import drawn, halves
from benchmarks.spread import ratios, summary
from benchmarks.subjects import subjects
from corp_onnx.calibration.moments import Moments
from corp_onnx.solve.joint import Joint
from corp_onnx.solve.refit import refit

OF_METHODS = {
    "quality": quality,
    "budgets": budgets,
    "ablation": ablation,
    "sizes": sizes,
    "effort": effort,
    "quantisers": quantisers,
}


class Numbers:
    """Samples that are numbers."""

    def __init__(self, places):
        self.places = places

    @property
    def count(self):
        return len(self.places)

    def take(self, places):
        return Numbers(self.places[places])


def test_draws_are_disjoint_from_what_is_left_and_follow_the_seed():
    numbers = Numbers(np.arange(20) * 10)
    first, others = drawn(numbers, 12, seed=3)
    again, _ = drawn(numbers, 12, seed=3)
    other, _ = drawn(numbers, 12, seed=4)
    assert sorted([*first.places, *others.places]) == numbers.places.tolist()
    assert first.places.tolist() == again.places.tolist() != other.places.tolist()
    assert [half.count for half in halves(first, seed=0)] == [6, 6]


def test_a_summary_keeps_apart_what_differs_and_leaves_gaps_as_gaps():
    rows = [
        {"method": "corp", "seed": 0, "error": 1.0, "seen": None},
        {"method": "corp", "seed": 1, "error": 3.0, "seen": None},
        {"method": "best", "seed": 0, "error": 0.5, "seen": 0.25},
    ]
    corp, best = summary(rows, ["method"])
    assert corp == {
        **{"method": "corp", "seeds": 2, "error": 2.0, "error ±": 1.0},
        **{"seen": None, "seen ±": None},
    }
    assert best["seen"] == 0.25
    assert best.keys() == corp.keys()
    assert ratios(rows, {"method": "best"}, {"method": "corp"}) == [0.5]


def test_a_fixed_choice_is_taken_though_another_does_better():
    x = np.random.default_rng(0).standard_normal((200, 3))
    y = 2.0 * x[:, :1]
    parts = [Joint.of(Moments.of(np.hstack([x, y])[at::2]), 3) for at in (0, 1)]
    start = np.zeros((3, 1))
    free = refit(parts, lambda joint: joint, lambda joint: lambda ridge: start)
    with fixed_choice((1.0, 0.5)):
        fixed = refit(parts, lambda joint: joint, lambda joint: lambda ridge: start)
    assert fixed.choice == (1.0, 0.5) != free.choice
    assert (
        refit(parts, lambda joint: joint, lambda joint: lambda ridge: start).choice == free.choice
    )


def test_a_model_that_a_benchmark_does_not_measure_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["effort", "--only", "minilm-l6"])
    assert "--only minilm-l6: effort measures fashion, dinov2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["macs", "--only", "fashion"])


def test_a_later_draw_is_measured_by_itself(tmp_path):
    """The one that a run of several draws would have had there."""

    def inputs(**asked):
        place = Place(tmp_path, tmp_path, quick=True, only="fashion", **asked)
        found = subjects(place, ["fashion"], {}, 1)
        return {
            of.seed: np.concatenate([x for (x,) in map(dict.values, of.samples.batches(64, 0))])
            for _, of in found
        }

    several, later = inputs(seeds=2), inputs(seeds=1, first=1)
    assert later.keys() == {1}
    np.testing.assert_array_equal(later[1], several[1])
    assert not np.array_equal(later[1], several[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_METHODS)
def test_it_runs_on_the_bundled_model(name, tmp_path):
    (only,) = (model for model in BENCHMARKS[name].models if model.startswith("fashion"))
    place = Place(tmp_path, tmp_path, quick=True, only=only, seeds=1)
    outcome = OF_METHODS[name].measure(place)
    assert all(rows for rows in outcome.tables.values())
    assert all(check.passed for check in outcome.checks), outcome.checks
