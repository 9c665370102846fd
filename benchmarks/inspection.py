"""How long ``corp-onnx inspect`` takes, as a process of its own, from start to printed document.

SmolLM2-135M (30 blocks) in both exports, the larger of 7,548 nodes; DINOv2 ViT-S as somebody else
exported it; and a deep ViT of 2,000 nodes. Each process is started several times. The least
processor time, of user and system together, is judged: it is what the process takes where nobody
else computes, for it has one thread.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import onnx

from benchmarks import exports
from benchmarks.outcome import Outcome, Place, Row
from corp_onnx.verify.checks import Check

log = logging.getLogger(__name__)

TURNS = 3
MOST_SECONDS = {2_250: 3.0, 7_600: 20.0}
"""By number of nodes."""


def measure(place: Place) -> Outcome:
    """Inspect every model several times."""
    models = {
        "ViT of 28 blocks, ts17": exports.drawn(place, "vit_deep", "ts17"),
        "DINOv2 ViT-S, ts14": place.asset("vit_s_focus.onnx"),
    }
    if not place.quick:
        models["SmolLM2-135M, dynamo18"] = exports.drawn(place, "smollm2", "dynamo18")
        models["SmolLM2-135M, ts17"] = exports.drawn(place, "smollm2_masked", "ts17")
    rows = [_row(name, path) for name, path in models.items()]
    return Outcome({"corp-onnx inspect": rows}, tuple(map(_check, rows)), {"turns": TURNS})


def _row(name: str, path: Path) -> Row:
    log.info("inspecting %s", name)
    turns = [_seconds(path) for _ in range(TURNS)]
    busy, wall, blocks = min(turns)
    return {
        "model": name,
        "nodes": len(onnx.load(path, load_external_data=False).graph.node),
        "megabytes": path.stat().st_size / 1e6,
        "blocks": blocks,
        "processor_seconds": busy,
        "seconds": wall,
    }


def _seconds(path: Path) -> tuple[float, float, int]:
    """Processor and wall time of one process, and how many blocks were found."""
    before, start = os.times(), perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "corp_onnx.cli", "inspect", str(path), "--json"]
    ended = subprocess.run(command, check=True, capture_output=True, env=environment)
    wall, after = perf_counter() - start, os.times()
    busy = sum(after[2:4]) - sum(before[2:4])
    return busy, wall, len(json.loads(ended.stdout)["blocks"])


def _check(row: Row) -> Check:
    most = next(seconds for nodes, seconds in MOST_SECONDS.items() if row["nodes"] <= nodes)
    busy = row["processor_seconds"]
    name = f"{row['nodes']} nodes of {row['model']} take under {most:g} s of processor time"
    return Check(name, busy < most, f"{busy:.1f} s")
