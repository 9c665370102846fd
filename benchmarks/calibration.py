"""What calibrating costs beside plainly running the model, and what a new ratio costs after it.

Calibrating leaves out what comes after the last block, such as the decoder of DINOv2 ViT-S (a fifth
of its multiply-adds): it is also held against the encoder alone.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from benchmarks import tasks
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.peak import peak_bytes
from benchmarks.tasks import IMAGENET
from corp_onnx.blocks import Axis, find_blocks
from corp_onnx.calibration.calibrate import calibrate, gather
from corp_onnx.data.batching import Batch
from corp_onnx.data.dataset import open_data
from corp_onnx.graph.model import Model, load
from corp_onnx.pipeline import prune
from corp_onnx.session import open_session
from corp_onnx.verify.checks import Check
from corp_onnx.verify.comparison import comparable

log = logging.getLogger(__name__)

TURNS = 3
TIMED_SAMPLES = 64
PEAK_SAMPLES = (64, 512)
KEPT_SAMPLES = 160
"""Enough that as many are held out as ever are; all of these are run again for a new ratio."""

SHORTER_SIDE = 256
SHARES: tuple[dict[Axis, float], ...] = ({"mlp": 0.5, "qk": 0.5}, {"mlp": 0.3, "qk": 0.3})

MOST_TIMES = 2.0
MOST_GROWTH = 1.05
MOST_SECONDS = 20.0


def measure(place: Place) -> Outcome:
    """Time, memory, and the way from statistics to a cut model, all of DINOv2 ViT-S."""
    samples = (16, 32) if place.quick else PEAK_SAMPLES
    model = place.asset("vit_s_focus.onnx")
    with tempfile.TemporaryDirectory() as folder:
        crops = Path(folder) / "crops.npy"
        _save_crops(place, crops, max(samples))
        times = _times(place, model, crops)
        peaks = _peaks(model, crops, samples)
        new_ratios = _new_ratios(model, crops, min(KEPT_SAMPLES, max(samples)))
    tables = {
        "seconds of calibrating against plain running": times,
        "peak memory of calibrating DINOv2 ViT-S": peaks,
        "seconds of a new ratio from kept statistics, DINOv2 ViT-S": new_ratios,
    }
    settings = {
        "turns": TURNS,
        "statistics_of": KEPT_SAMPLES,
        "crops": f"random {IMAGENET.size[0]} of {SHORTER_SIDE} pixels",
    }
    return Outcome(tables, _checks(times, peaks, new_ratios), settings)


def _times(place: Place, path: Path, crops: Path) -> list[Row]:
    model, text = load(path), tasks.glosses(place)
    encoder = comparable(model, tasks.FEATURES)
    data = open_data(str(crops), open_session(path).inputs)
    part = data.take(np.arange(min(data.samples, TIMED_SAMPLES)))

    def images() -> Iterable[Batch]:
        return part.batches(tasks.PHOTO_BATCH)

    def texts() -> Iterable[Batch]:
        return text.calibration

    return [
        {"model": "DINOv2 ViT-S with its decoder", "samples": part.samples}
        | _compared(model, images),
        {"model": "DINOv2 ViT-S alone", "samples": part.samples} | _compared(encoder, images),
        {"model": "MiniLM-L3", "samples": text.samples["calibration"]}
        | _compared(load(text.model), texts),
    ]


def _compared(model: Model, batches: Callable[[], Iterable[Batch]]) -> Row:
    """Both ways in turn, loading into ONNX Runtime included."""
    catalog = find_blocks(model)
    seconds = np.empty((TURNS, 2))
    for turn, row in enumerate(seconds):
        log.info("turn %d of %d", turn + 1, TURNS)
        row[0] = _seconds(lambda: _run(model, batches()))
        row[1] = _seconds(lambda: gather(model, catalog, batches()))
    plain, calibrating = np.median(seconds, axis=0)
    return {
        "plain_s": float(plain),
        "calibrate_s": float(calibrating),
        "times": float(calibrating / plain),
        "turns": [[round(float(value), 3) for value in row] for row in seconds],
    }


def _run(model: Model, batches: Iterable[Batch]) -> None:
    session = open_session(model)
    for batch in batches:
        session.run(batch)


def _seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def _peaks(model: Path, crops: Path, samples: tuple[int, ...]) -> list[Row]:
    rows: list[Row] = []
    for count in samples:
        log.info("peak memory with %d samples", count)
        peak = peak_bytes(model, crops, count)
        growth = peak / rows[0]["peak_bytes"] if rows else 1.0
        rows.append({"samples": count, "peak_bytes": peak, "times the first": growth})
    return rows


def _new_ratios(path: Path, crops: Path, samples: int) -> list[Row]:
    """From a file of statistics to a verified file, by stage."""
    model = load(path)
    data = open_data(str(crops), open_session(path).inputs).take(np.arange(samples))
    statistics = crops.with_name("statistics.npz")
    calibrate(model, find_blocks(model), data).save(statistics)
    rows: list[Row] = []
    for shares in SHARES:
        log.info("new ratio %s", shares)
        result = prune(path, crops.with_name("cut.onnx"), statistics, shares_removed=shares)
        total = sum(result.seconds.values())
        rows.append(dict(shares) | dict(result.seconds) | {"total": total})
    return rows


def _save_crops(place: Place, path: Path, count: int) -> None:
    """Random crops of all photographs in turn, as the model takes them: float32, uncompressed."""
    files = sorted(place.asset("photos").rglob("*.png"))
    rng = np.random.default_rng(tasks.SEED)
    shape = (count, IMAGENET.channels, *IMAGENET.size)
    crops = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for index in range(count):
        with Image.open(files[rng.integers(len(files))]) as photo:
            pixels = _crop(photo.convert("RGB"), rng)
        crops[index] = IMAGENET.normalise(pixels.transpose(2, 0, 1)[None])[0]
    crops.flush()


def _crop(photo: Image.Image, rng: np.random.Generator) -> np.ndarray:
    scale = SHORTER_SIDE / min(photo.size)
    small = photo.resize([round(side * scale) for side in photo.size], Image.Resampling.BICUBIC)
    height, width = IMAGENET.size
    left = int(rng.integers(small.width - width + 1))
    top = int(rng.integers(small.height - height + 1))
    return np.asarray(small.crop((left, top, left + width, top + height)))


def _checks(times: list[Row], peaks: list[Row], new_ratios: list[Row]) -> tuple[Check, ...]:
    slowest = max(row["total"] for row in new_ratios)
    growth = peaks[-1]["times the first"]
    return (
        *(
            Check(
                f"{row['model']} calibrates in {MOST_TIMES:g} times the plain run",
                row["times"] <= MOST_TIMES,
                f"{row['times']:.2f} times",
            )
            for row in times
        ),
        Check(
            f"memory does not grow from {peaks[0]['samples']} to {peaks[-1]['samples']} samples",
            growth <= MOST_GROWTH,
            f"{growth:.3f} times, {MOST_GROWTH:g} allowed",
        ),
        Check(
            f"a new ratio takes {MOST_SECONDS:g} s",
            slowest <= MOST_SECONDS,
            f"{slowest:.1f} s at most",
        ),
    )
