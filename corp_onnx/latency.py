"""Time engines turn by turn, so that drift and other load hit all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
from jaxtyping import Float64

from corp_onnx.data import InputSpec
from corp_onnx.sizes import Sizes

WARMUP = 5
RUNS = 50
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of one engine over ``iterations`` runs, in milliseconds."""

    median_ms: float
    p95_ms: float
    iterations: int


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times faster than the first engine, with a 95 % bootstrap interval.

    ``ratio`` is the median over turns of (time of the first) / (time of this one); both were timed
    in the same turn.
    """

    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Race:
    """What a race showed, in the order of the engines."""

    latencies: tuple[Latency, ...]
    speedups: tuple[Speedup, ...]


def race(
    engines: Sequence[Callable[[], object]],
    *,
    warmup: int = WARMUP,
    runs: int = RUNS,
    seed: int = 0,
) -> Race:
    """Run all engines in turn, in an order drawn anew for every turn.

    Args:
        engines: What to time; each call is one inference.
        warmup: Turns that do not count.
        runs: Turns that count.
        seed: Decides the order within turns and the bootstrap.
    """
    rng = np.random.default_rng(seed)
    times_ms = np.empty((warmup + runs, len(engines)))
    for turn in times_ms:
        for lane in rng.permutation(len(engines)):
            start = perf_counter_ns()
            engines[lane]()
            turn[lane] = (perf_counter_ns() - start) / 1e6
    counted = times_ms[warmup:]
    return Race(
        tuple(_latency(column) for column in counted.T),
        tuple(_speedup(counted[:, 0] / column, rng) for column in counted.T),
    )


def _latency(times_ms: Float64[np.ndarray, " n"]) -> Latency:
    return Latency(float(np.median(times_ms)), float(np.percentile(times_ms, 95)), len(times_ms))


def _speedup(ratios: Float64[np.ndarray, " n"], rng: np.random.Generator) -> Speedup:
    draws = np.median(rng.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Speedup(float(np.median(ratios)), float(low), float(high))


def timing_inputs(
    inputs: Sequence[InputSpec], sizes: Sizes, *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Inputs whose values do not matter: normal numbers, and ones for indices and masks."""
    rng = np.random.default_rng(seed)
    return {
        spec.name: rng.standard_normal(sizes[spec.name]).astype(spec.dtype)
        if spec.dtype.kind == "f"
        else np.ones(sizes[spec.name], dtype=spec.dtype)
        for spec in inputs
    }
