"""Pictures of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corp_onnx.graph import whole

DPI = 120


def curve(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out error and speed-up over the share of MACs that is left, as one PNG.

    Raises:
        OutputError: If it cannot be written.
    """
    # Drawing takes a second to import, which every other command would wait for.
    from matplotlib.figure import Figure

    left = [100 * point["macs_kept"] for point in points]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    error = figure.subplots()
    error.plot(left, [point["relative_error"] for point in points], "o-", color="#1f5fa8")
    error.set_xlabel("multiply-adds left, %")
    error.set_ylabel("held-out relative error", color="#1f5fa8")
    error.set_ylim(bottom=0)
    error.grid(alpha=0.3)
    error.invert_xaxis()
    speed = error.twinx()
    speed.plot(left, [point["speedup"]["ratio"] for point in points], "s--", color="#b0522d")
    speed.set_ylabel("times as fast, batch of 1", color="#b0522d")
    speed.set_ylim(bottom=0)
    with whole(path) as draft:
        figure.savefig(draft, dpi=DPI, format="png")
