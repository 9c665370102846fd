"""Time and memory of a whole ``corp-onnx prune --method best``, against plainly running the model.

Both are processes of their own on the same pictures and the same file (DINOv2 ViT-S with its
decoder), from the start of Python to its end.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks import tasks
from benchmarks.outcome import Outcome, Place, Row
from corp_onnx import example
from corp_onnx.errors import DataError
from corp_onnx.verify.checks import Check

log = logging.getLogger(__name__)

MODELS = ("fashion", "dinov2")
PICTURES, TURNS = 256, 3
OPTIONS = ("", "--crops 1", "--macs 0.6")
"""Of ``prune``, beside data and method; by default crops fill small sets up. A budget takes a
calibration and probes more, which the limit is not for."""

MOST_TIMES = 6.0
MOST_BYTES = 3e9
CHECKED = "dinov2"


def measure(place: Place) -> Outcome:
    """One plain run (the median of a few), and one pruning with each of `OPTIONS`."""
    rows: list[Row] = []
    pictures, turns = (16, 1) if place.quick else (PICTURES, TURNS)
    for name in [place.only] if place.only else [CHECKED]:
        with tempfile.TemporaryDirectory(prefix="benchmark.") as folder:
            model, data = _fashion() if name == "fashion" else _dinov2(place, Path(folder))
            rows += _runs(name, model, data, pictures, turns)
    checked = [row for row in rows if row["model"] == CHECKED and "--macs" not in row["options"]]
    checks = [check for row in checked for check in _checks(row)]
    return Outcome({"whole runs": rows}, tuple(checks), {"pictures": pictures, "turns": turns})


def _runs(name: str, model: Path, data: Path, pictures: int, turns: int) -> list[Row]:
    plainly = ["benchmarks.plain", str(model), str(data), str(pictures)]
    plain = [_timed(plainly) for _ in range(turns)]
    seconds = float(np.median([run[0] for run in plain]))
    log.info("plain: %s", plain)
    rows = []
    for options in OPTIONS:
        output = Path(tempfile.gettempdir()) / f"benchmark.{os.getpid()}.onnx"
        try:
            command = ["corp_onnx.cli", "prune", str(model), "-o", str(output)]
            asked = ["--data", str(data), "--method", "best", "--samples", str(pictures)]
            took, peak = _timed([*command, *asked, *options.split()])
        finally:
            output.unlink(missing_ok=True)
        rows.append(
            {"model": name, "options": options, "pictures": pictures, "plain_s": seconds}
            | {"plain_turns_s": [round(run[0], 3) for run in plain], "prune_s": took}
            | {"times": took / seconds, "peak_bytes": peak}
            | {"plain_peak_bytes": max(run[1] for run in plain)}
        )
        log.info("%s", rows[-1])
    return rows


def _timed(module: list[str]) -> tuple[float, int]:
    """Seconds and peak memory of a process that runs a module of Python.

    The peak is of that process alone, as `os.wait4` tells it, and at least what this one holds.

    Raises:
        DataError: If it fails for other reasons than a verdict on the model.
    """
    start = perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-m", *module], stdout=subprocess.DEVNULL, stderr=said
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = perf_counter() - start
        said.seek(0)
        if child.returncode not in {0, FAILED_VERDICT}:
            raise DataError(f"{' '.join(module)} failed: {said.read().decode()[-1000:]}")
    return seconds, usage.ru_maxrss * 1024


FAILED_VERDICT = 1
"""`corp-onnx prune` when the smaller model does not pass: all the work was done."""


def _dinov2(place: Place, folder: Path) -> tuple[Path, Path]:
    """The file, with what it takes to read pictures beside it."""
    model = folder / "vit_s_focus.onnx"
    model.symlink_to(place.asset("vit_s_focus.onnx").resolve())
    tasks.IMAGENET.save_beside(model)
    return model, place.asset("photos")


def _fashion() -> tuple[Path, Path]:
    return example.MODEL, example.CALIBRATION


def _checks(row: Row) -> list[Check]:
    name = " ".join(f"{row['model']}, {row['pictures']} pictures {row['options']}".split())
    peak = row["peak_bytes"]
    return [
        Check(
            f"{name}: pruning takes at most {MOST_TIMES:g} times as long as running",
            row["times"] <= MOST_TIMES,
            f"{row['times']:.2f} times",
        ),
        Check(
            f"{name}: at most {MOST_BYTES / 1e9:g} GB", peak <= MOST_BYTES, f"{peak / 1e9:.2f} GB"
        ),
    ]
