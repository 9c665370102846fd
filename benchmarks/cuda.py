"""How much of the cut in multiply-adds arrives as speed on an NVIDIA GPU, in float16.

As in ``latency`` what is computed does not matter. Of every engine two times are told: from arrays
of the host to arrays of the host, and without these copies. The latter holds for models whose
inputs come from the GPU, and shows what the kernels gain; small batches keep no such GPU busy, and
there the time is that of launching kernels, of which a narrower model has as many.

All models are drawn: shapes count, and so nothing is fetched. ``DeiT-H/4`` is a quarter of DeiT-H,
8 of its 32 blocks, which are all alike: the ratio of times is that of the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from benchmarks import exports
from benchmarks.latency import CLEANED, TOKENS, Bench
from benchmarks.machine import alone
from benchmarks.outcome import Outcome, Place, Row
from corp_onnx.data.batching import Batch
from corp_onnx.deploy.records import Engine, Precision
from corp_onnx.graph.model import load
from corp_onnx.latency import conditions
from corp_onnx.latency.race import Race, race, timing_inputs
from corp_onnx.latency.stopwatch import Stopwatch
from corp_onnx.verify.checks import Check

log = logging.getLogger(__name__)

TARGET = "ort-cuda"
PRECISIONS: tuple[Precision, ...] = ("fp16", "fp32")

DRAWN: Mapping[str, str] = {
    "DINOv2 ViT-S": "dinov2_s",
    "MiniLM-L6": "minilm_l6_drawn",
    "DeiT-H/4": "deit_h",
}
MODELS = (*exports.DEIT, *DRAWN)

BATCHES = (1, 8, 32, 128)
WARMUP, RUNS = 3, 20

PUBLISHED, OF, AT = 1.64, "DeiT-H/4", 128
"""Speed-up of DeiT-H with half of its MLP and query-key width (arXiv 2602.05243), and where the
same is looked for."""


def measure(place: Place) -> Outcome:
    """Race one model at every batch."""
    name, bench = place.model, prepared(place)
    with alone():
        rows = list(_rows(name, bench, BATCHES[: 1 if place.quick else None]))
        settings = {"runs": RUNS, "machine": str(conditions.read())}
    return Outcome({"latency": rows}, tuple(_checks(rows)), settings)


def prepared(place: Place) -> Bench:
    """The model, dense and cut, in every precision."""
    network = DRAWN.get(place.model)
    path = exports.drawn(place, network, "ts17") if network else exports.deit(place, place.model)
    return Bench.of(load(path), {TARGET: PRECISIONS})


def _rows(name: str, bench: Bench, batches: Sequence[int]) -> Iterator[Row]:
    """Engines are opened once: they take all sizes."""
    labels, lanes = zip(*bench.lanes(TARGET), strict=True)
    with ExitStack() as opened:
        first = watch_of(bench, batches[0], TOKENS[0])
        engines = [opened.enter_context(lane.opened(first))[0] for lane in lanes]
        for batch in batches:
            for tokens in TOKENS if bench.text else (None,):
                log.info("%s, batch %d, tokens %s", name, batch, tokens)
                sizes = watch_of(bench, batch, tokens).sizes_of(lanes[0].model.graph)
                found = _raced(engines, timing_inputs(engines[0].inputs, sizes))
                common = {"model": name, "batch": batch, "tokens": tokens}
                yield from ({**common, **row} for row in _told(labels, found))


def watch_of(bench: Bench, batch: int, tokens: int | None) -> Stopwatch:
    """For inputs of these sizes."""
    return Stopwatch(batch, bench.sizes(batch, tokens if bench.text else None))


def _raced(engines: Sequence[Engine], feeds: Batch) -> Race:
    return race(
        [partial(engine.run, feeds) for engine in engines],
        devices=[partial(getattr, engine, "device_ms") for engine in engines],
        warmup=WARMUP,
        runs=RUNS,
    )


def _told(labels: Sequence[Row], found: Race) -> Iterator[Row]:
    """Every time, and how much shorter it is than that of the cleaned dense model."""
    on_device = [latency.device_ms for latency in found.latencies]
    dense = {
        label["precision"]: device_ms
        for label, device_ms in zip(labels, on_device, strict=True)
        if label["cut"] == CLEANED
    }
    for label, latency, speedup in zip(labels, found.latencies, found.speedups, strict=True):
        assert latency.device_ms is not None, f"{TARGET} tells it"
        ratio = dense[label["precision"]] / latency.device_ms
        yield {
            **label,
            "median_ms": latency.median_ms,
            f"over {PRECISIONS[0]} dense": speedup.ratio,
            "low": speedup.low,
            "high": speedup.high,
            "device_ms": latency.device_ms,
            "device speed-up": ratio,
            "share": ratio / label["macs_ratio"],
        }


def _checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Whether the published speed-up is reached."""
    for row in rows:
        asked = (row["model"], row["batch"], row["precision"], row["cut"])
        if asked == (OF, AT, PRECISIONS[0], "both"):
            found = f"{row['device speed-up']:.2f} times, of {row['macs_ratio']:.2f} possible"
            yield Check(
                f"{OF}, both, batch {AT}: {PUBLISHED} times as fast",
                row["device speed-up"] >= PUBLISHED,
                found,
            )
