"""How much of the cut in multiply-adds arrives as speed, on ONNX Runtime CPU.

Dense and cut model run turn by turn, in an order drawn anew for every turn. ``share`` is the
speed-up over the ratio of multiply-adds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks import exports
from benchmarks.halves import IMAGE, SEED, halved
from benchmarks.outcome import Outcome, Place, Row
from corp_onnx.latency import WARMUP, race
from corp_onnx.session import Runtime, Session, open_session
from corp_onnx.solve import Recipe
from corp_onnx.verify import Check

log = logging.getLogger(__name__)

BATCHES = (1, 8)
JUDGED = ("DeiT-S", 8)
LEAST_SHARE = 0.85
RUNS = 25


def measure(place: Place) -> Outcome:
    """Race every size at every batch."""
    sizes = ("DeiT-T",) if place.quick else tuple(exports.DEIT)
    runs = 5 if place.quick else RUNS
    rows = [row for size in sizes for row in _races(place, size, runs)]
    checks = tuple(_check(row) for row in rows if (row["model"], row["batch"]) == JUDGED)
    settings = {"shares_removed": "mlp 0.5, qk 0.5", "warmup": WARMUP, "runs": runs}
    return Outcome({"ONNX Runtime CPU, all cores": rows}, checks, settings)


def _races(place: Place, size: str, runs: int) -> Iterator[Row]:
    path = exports.deit(place, size)
    surgery = halved(path, Recipe("corp"))
    resting = Runtime(spinning=False)
    sessions = (open_session(path, resting), open_session(surgery.model, resting))
    macs = surgery.dense.total / surgery.pruned.total
    for batch in BATCHES:
        log.info("%s, batch %d", size, batch)
        rng = np.random.default_rng(SEED)
        images = rng.standard_normal((batch, 3, 224, 224), dtype=np.float32)
        found = race([_inference(session, images) for session in sessions], runs=runs)
        dense, cut = found.latencies
        gain = found.speedups[1]
        yield {
            "model": size,
            "batch": batch,
            "dense_ms": dense.median_ms,
            "dense_p95_ms": dense.p95_ms,
            "cut_ms": cut.median_ms,
            "cut_p95_ms": cut.p95_ms,
            "speedup": gain.ratio,
            "low": gain.low,
            "high": gain.high,
            "macs_ratio": macs,
            "share": gain.ratio / macs,
        }


def _inference(session: Session, images: np.ndarray) -> Callable[[], object]:
    return lambda: session.run({IMAGE: images})


def _check(row: Row) -> Check:
    name = f"{row['model']} at batch {row['batch']} reaches {LEAST_SHARE:.0%} of the MAC ratio"
    found = f"{row['speedup']:.2f} times faster, {row['share']:.0%} of {row['macs_ratio']:.2f}"
    return Check(name, row["share"] >= LEAST_SHARE, found)
