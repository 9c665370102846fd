"""Peak memory of calibrating, measured in a process of its own: ``python -m benchmarks.peak``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import calibrate
from corp_onnx.data.dataset import open_data
from corp_onnx.graph.model import load
from corp_onnx.latency.footprint import own_peak_bytes
from corp_onnx.session import open_session


def peak_bytes(model: Path, data: Path, samples: int) -> int:
    """The largest resident memory of a fresh process that calibrates on the first samples."""
    command = [sys.executable, "-m", "benchmarks.peak", str(model), str(data), str(samples)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _calibrate(path: Path, data: Path, samples: int) -> None:
    model = load(path)
    inputs = open_session(path).inputs
    used = open_data(str(data), inputs).take(np.arange(samples))
    calibrate(model, find_blocks(model), used)


if __name__ == "__main__":
    _calibrate(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    print(own_peak_bytes())
