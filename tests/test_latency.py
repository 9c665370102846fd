"""Timing turn by turn, without asking how fast this machine is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corp_onnx.graph.inputs import InputSpec
from corp_onnx.latency.race import Latency, race, timing_inputs, unpaired


class Clock:
    """Time that only passes when an engine runs."""

    def __init__(self, monkeypatch):
        self.now_ns = 0
        self.order = []
        monkeypatch.setattr("corp_onnx.latency.race.perf_counter_ns", lambda: self.now_ns)

    def engine(self, name, times_ms):
        times = iter(times_ms)

        def run():
            self.order.append(name)
            self.now_ns += round(next(times) * 1e6)

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def turns(order, engines):
    return [order[at : at + engines] for at in range(0, len(order), engines)]


def test_every_turn_runs_every_engine_once_in_an_order_of_its_own(clock):
    race([clock.engine(name, [1.0] * 40) for name in "abc"], warmup=10, runs=30)
    found = turns(clock.order, 3)
    assert len(found) == 40
    assert {"".join(sorted(turn)) for turn in found} == {"abc"}
    assert len(Counter(map(tuple, found))) == 6


def test_the_seed_decides_the_order(clock):
    orders = []
    for seed in (1, 1, 2):
        clock.order = []
        race([clock.engine(name, [1.0] * 20) for name in "ab"], warmup=0, runs=20, seed=seed)
        orders.append(clock.order)
    assert orders[0] == orders[1] != orders[2]


def test_warm_up_does_not_count(clock):
    times = [1000.0] * 5 + [2.0] * 20
    result = race([clock.engine("a", times)], warmup=5, runs=20)
    assert result.latencies == (Latency(2.0, 2.0, 20, 2.0),)


def test_warm_up_goes_on_until_times_settle(clock):
    times = [1000.0, 500.0, 250.0, 120.0, 60.0, 30.0, 15.0, 8.0] + [2.0] * 30
    result = race([clock.engine("a", times)], warmup=4, runs=20)
    assert result.warmup > 8
    assert result.latencies[0].p95_ms == 2.0


def test_warm_up_of_an_engine_that_never_settles_ends(clock):
    result = race([clock.engine("a", 2.0 ** np.arange(40))], warmup=3, runs=5)
    assert result.warmup == 30


def test_time_on_the_device_is_the_median_of_what_the_engine_tells(clock):
    told = iter([9.0, 1.0, 2.0, 30.0])
    lanes = [clock.engine(name, [5.0] * 3) for name in "ab"]
    devices = [lambda: next(told), lambda: None]
    result = race(lanes, devices=devices, warmup=0, runs=3)
    assert [latency.device_ms for latency in result.latencies] == [2.0, None]


def test_the_spread_of_every_engine_is_told(clock):
    lanes = [clock.engine("calm", [4.0] * 40), clock.engine("wild", [1.0, 7.0] * 20)]
    found = race(lanes, warmup=0, runs=40).latencies
    assert [latency.spread for latency in found] == [0.0, pytest.approx(1.5)]


def test_an_engine_that_takes_no_time_has_no_spread():
    assert Latency(0.0, 0.0, 9, 0.0).spread == 0.0


def test_which_engine_has_settled_is_told(clock):
    """The twin: one that rises for ever keeps both in the warm-up, and is not taken for both."""
    lanes = [clock.engine("calm", [4.0] * 40), clock.engine("wild", 2.0 ** np.arange(40))]
    found = race(lanes, warmup=3, runs=5)
    assert (found.warmup, found.settled) == (30, (True, False))


def test_engines_that_were_not_warmed_up_have_not_settled(clock):
    lanes = [clock.engine(name, [4.0] * 9) for name in "ab"]
    assert race(lanes, warmup=0, runs=5).settled == (False, False)
    (settled,) = race(lanes[:1], warmup=1, runs=2).settled
    assert settled


def test_of_times_from_elsewhere_nobody_knows_whether_they_settled():
    times = [np.array([4.0, 5.0]), np.array([2.0, 2.5])]
    found = unpaired(times, times)
    assert (found.warmup, found.settled) == (None, (None, None))


def test_median_and_95th_percentile_are_in_milliseconds(clock):
    times = np.arange(1.0, 22.0)
    result = race([clock.engine("a", times)], warmup=0, runs=21)
    assert result.latencies == (Latency(11.0, 20.0, 21, 2.0),)


def test_an_engine_twice_as_fast_has_ratio_two_whatever_the_load(clock):
    """Load that comes and goes hits both engines of a turn, and cancels."""
    load = np.tile([1.0, 1.0, 7.0, 30.0], 10)
    result = race([clock.engine("a", 2 * load), clock.engine("b", load)], warmup=0, runs=40)
    assert [speedup.ratio for speedup in result.speedups] == [1.0, 2.0]
    assert (result.speedups[1].low, result.speedups[1].high) == (2.0, 2.0)


def test_ratios_are_over_the_first_engine(clock):
    times = {"a": 6.0, "b": 3.0, "c": 12.0}
    result = race([clock.engine(n, [t] * 9) for n, t in times.items()], warmup=0, runs=9)
    assert [speedup.ratio for speedup in result.speedups] == [1.0, 2.0, 0.5]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=30), st.integers(0, 5))
def test_the_interval_holds_the_ratio(times, seed):
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        engines = [clock.engine("a", [1.0] * len(times)), clock.engine("b", times)]
        result = race(engines, warmup=0, runs=len(times), seed=seed)
    speedup = result.speedups[1]
    ratios = 1 / np.array([round(t * 1e6) / 1e6 for t in times])
    assert speedup.ratio == pytest.approx(np.median(ratios))
    assert speedup.low <= speedup.ratio <= speedup.high
    assert ratios.min() * (1 - 1e-9) <= speedup.low
    assert speedup.high <= ratios.max() * (1 + 1e-9)


def test_more_runs_narrow_the_interval(clock):
    rng = np.random.default_rng(0)

    def interval(runs):
        engines = [
            clock.engine("a", [2.0] * runs),
            clock.engine("b", rng.uniform(0.5, 1.5, runs)),
        ]
        speedup = race(engines, warmup=0, runs=runs).speedups[1]
        return speedup.high - speedup.low

    assert interval(1000) < interval(10) / 2


# Inputs


def test_inputs_for_timing_have_the_sizes_and_types_of_the_model():
    specs = (
        InputSpec("pixels", np.dtype(np.float16), (None, 3)),
        InputSpec("ids", np.dtype(np.int64), (None, None)),
        InputSpec("mask", np.dtype(np.bool_), (None, None)),
    )
    made = timing_inputs(specs, {"pixels": (2, 3), "ids": (2, 5), "mask": (2, 5)})
    assert {name: (array.dtype.name, array.shape) for name, array in made.items()} == {
        "pixels": ("float16", (2, 3)),
        "ids": ("int64", (2, 5)),
        "mask": ("bool", (2, 5)),
    }
    assert made["ids"].all()
    assert made["mask"].all()
    assert np.unique(made["pixels"]).size > 1


def test_inputs_for_timing_follow_the_seed():
    spec = (InputSpec("x", np.dtype(np.float32), (None, 4)),)
    first, again, other = (timing_inputs(spec, {"x": (2, 4)}, seed=seed)["x"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
