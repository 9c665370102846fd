"""What ``corp-onnx demo`` shows: the bundled model, cut and repaired by every method."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

from benchmarks.outcome import Outcome, Place
from corp_onnx.demo import Demo
from corp_onnx.verify import Check


def measure(place: Place) -> Outcome:
    """Run the demonstration; every repair must leave less error than the one before it."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Demo(Path(folder))(lambda samples: None).document["rows"]
    errors = [row["relative_error"] for row in rows[1:]]
    found = ", ".join(f"{row['method']} {row['relative_error']:.4f}" for row in rows[1:])
    falling = all(better < worse for worse, better in pairwise(errors))
    check = Check("none, mean, corp: each repairs more", falling, found)
    return Outcome({"Fashion ViT, half of MLP and query-key width": rows}, (check,), {})
