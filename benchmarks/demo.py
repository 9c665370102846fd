"""What ``corp-onnx demo`` shows: the bundled model, cut and repaired by every method."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.outcome import Outcome, Place
from corp_onnx.demo import Demo
from corp_onnx.verify import Check


def measure(place: Place) -> Outcome:
    """Run the demonstration; the repair must halve what the cut costs, in error and in accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Demo(Path(folder))(lambda samples: None).document["rows"]
    by_method = {row["method"]: row for row in rows}
    dense, bare, repaired = (by_method[name] for name in ("dense", "none", "corp"))
    halved = repaired["relative_error"] < 0.5 * bare["relative_error"]
    kept = dense["top1"] - repaired["top1"] < 0.5 * (dense["top1"] - bare["top1"])
    found = ", ".join(
        f"{row['method']} {row['top1']:.1%}, error {row['relative_error']:.4f}" for row in rows
    )
    check = Check("repaired, half the error and half the loss of accuracy", halved and kept, found)
    return Outcome({"Fashion ViT, half of MLP and query-key width": rows}, (check,), {})
