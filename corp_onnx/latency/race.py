"""Time engines turn by turn, so that drift and other load hit all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
from jaxtyping import Float64

from corp_onnx.graph.inputs import InputSpec
from corp_onnx.graph.sizes import Sizes

WARMUP = 5
MOST_WARMUPS = 10
SETTLED = 0.05
RUNS = 50
RESAMPLES = 2000

NOISY = 0.3
"""Spread of an engine's times that is reported."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of one engine over ``iterations`` runs, in milliseconds.

    Attributes:
        median_ms: From arrays of the host to arrays of the host.
        p95_ms: Of the same.
        iterations: Runs that counted.
        p5_ms: Of the same.
        device_ms: Median on the device alone; None where the engine does not tell.
    """

    median_ms: float
    p95_ms: float
    iterations: int
    p5_ms: float
    device_ms: float | None = None

    @property
    def spread(self) -> float:
        """From the 5th to the 95th percentile, over the median."""
        return (self.p95_ms - self.p5_ms) / self.median_ms if self.median_ms else 0.0


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
    """What a race showed, in the order of the engines.

    Attributes:
        latencies: Of every engine.
        speedups: Of every engine over the first.
        warmup: Turns that did not count; None of times that were measured elsewhere.
        settled: Of every engine, whether its times were seen to have settled in those; likewise.
    """

    latencies: tuple[Latency, ...]
    speedups: tuple[Speedup, ...]
    warmup: int | None
    settled: tuple[bool | None, ...]


Run = Callable[[], object]
DeviceTime = Callable[[], float | None]


def race(
    engines: Sequence[Run],
    *,
    devices: Sequence[DeviceTime] = (),
    warmup: int = WARMUP,
    runs: int = RUNS,
    seed: int = 0,
) -> Race:
    """Run all engines in turn, in an order drawn anew for every turn.

    Turns are thrown away until the times of every engine have settled: the medians of the last
    half of ``warmup`` turns and of as many before differ by 5 % at most. After ten times ``warmup``
    it begins all the same.

    Args:
        engines: What to time; each call is one inference.
        devices: Of every engine, the time of its last run on the device alone.
        warmup: Turns that do not count, at the least.
        runs: Turns that count.
        seed: Decides the order within turns and the bootstrap.
    """
    rng = np.random.default_rng(seed)

    def turn() -> list[float]:
        times_ms = [0.0] * len(engines)
        for lane in rng.permutation(len(engines)):
            start = perf_counter_ns()
            engines[lane]()
            times_ms[lane] = (perf_counter_ns() - start) / 1e6
        return times_ms

    warm: list[list[float]] = []
    settled = (False,) * len(engines)
    while len(warm) < warmup or not (all(settled) or len(warm) >= MOST_WARMUPS * warmup):
        warm.append(turn())
        settled = _settled(warm, warmup)
    on_device: list[list[float | None]] = []
    counted = []
    for _ in range(runs):
        counted.append(turn())
        on_device.append([time() for time in devices])
    latencies, speedups = _summaries(np.array(counted), on_device, rng)
    return Race(latencies, speedups, len(warm), settled)


def unpaired(
    times_ms: Sequence[Float64[np.ndarray, " n"]],
    on_device_ms: Sequence[Float64[np.ndarray, " n"]],
    *,
    seed: int = 0,
) -> Race:
    """What times show that were not measured in turn: ratios are those of medians.

    Args:
        times_ms: Of every engine.
        on_device_ms: Likewise, on the device alone.
        seed: Of the bootstrap, which draws from the times of both engines.
    """
    rng = np.random.default_rng(seed)
    latencies = tuple(map(_latency, times_ms, on_device_ms))
    medians = [_medians(times, rng) for times in times_ms]
    intervals = [np.percentile(medians[0] / drawn, [2.5, 97.5]) for drawn in medians]
    first = latencies[0]
    speedups = (
        Speedup(first.median_ms / latency.median_ms, float(low), float(high))
        for latency, (low, high) in zip(latencies, intervals, strict=True)
    )
    return Race(latencies, tuple(speedups), None, (None,) * len(latencies))


def _settled(turns: Sequence[Sequence[float]], warmup: int) -> tuple[bool, ...]:
    """Of every engine, whether its last turns took as long as those before."""
    half = max(1, warmup // 2)
    if len(turns) < 2 * half:
        return (False,) * len(turns[0])
    before = np.median(turns[-2 * half : -half], axis=0)
    last = np.median(turns[-half:], axis=0)
    return tuple((np.abs(last - before) <= SETTLED * before).tolist())


def _summaries(
    times_ms: Float64[np.ndarray, "n engines"],
    on_device: Sequence[Sequence[float | None]],
    rng: np.random.Generator,
) -> tuple[tuple[Latency, ...], tuple[Speedup, ...]]:
    columns = times_ms.T
    of_device: list[Sequence[float | None]] = list(zip(*on_device, strict=True))
    devices = of_device or [()] * len(columns)
    latencies = tuple(_latency(*each) for each in zip(columns, devices, strict=True))
    speedups = tuple(_speedup(columns[0] / column, rng) for column in columns)
    return latencies, speedups


def _latency(times_ms: Float64[np.ndarray, " n"], device: Iterable[float | None]) -> Latency:
    low, middle, high = (float(found) for found in np.percentile(times_ms, [5, 50, 95]))
    told = [time for time in device if time is not None]
    on_device = float(np.median(told)) if told else None
    return Latency(middle, high, len(times_ms), low, on_device)


def _speedup(ratios: Float64[np.ndarray, " n"], rng: np.random.Generator) -> Speedup:
    low, high = np.percentile(_medians(ratios, rng), [2.5, 97.5])
    return Speedup(float(np.median(ratios)), float(low), float(high))


def _medians(
    values: Float64[np.ndarray, " n"], rng: np.random.Generator
) -> Float64[np.ndarray, " r"]:
    """Of as many values, drawn anew again and again."""
    return np.array([np.median(rng.choice(values, len(values))) for _ in range(RESAMPLES)])


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
