"""What ``corp-onnx demo`` shows: the bundled model, cut and repaired by every method."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.outcome import Outcome, Place, Row
from corp_onnx.commands.demo import Demo
from corp_onnx.verify.checks import Check


def measure(place: Place) -> Outcome:
    """Run the demonstration; each better method must halve what the one before it costs."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Demo(Path(folder))(lambda done, unit="samples", /: None).document["rows"]
    by_method = {row["method"]: row for row in rows}
    dense, bare, paper, best = (by_method[name] for name in ("dense", "none", "corp", "best"))
    found = ", ".join(
        f"{row['method']} {row['top1']:.1%}, error {row['relative_error']:.4f}" for row in rows
    )
    checks = (
        Check("corp against no repair: half of error and loss", _halves(dense, bare, paper), found),
        Check("best against corp: half of error and loss", _halves(dense, paper, best), found),
    )
    return Outcome({"Fashion ViT, half of MLP and query-key width": rows}, checks, {})


def _halves(dense: Row, worse: Row, better: Row) -> bool:
    """Whether error and loss of accuracy are at most half of what they were."""
    error = better["relative_error"] <= 0.5 * worse["relative_error"]
    loss = dense["top1"] - better["top1"] <= 0.5 * (dense["top1"] - worse["top1"])
    return bool(error and loss)
