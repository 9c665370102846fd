"""Pictures of results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corp_onnx.files import whole

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
    speed.set_ylabel("times as fast", color="#b0522d")
    speed.set_ylim(bottom=0)
    with whole(path) as draft:
        figure.savefig(draft, dpi=DPI, format="png")


def bars(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Median time of every engine, with its 5th to 95th percentile, batch by batch, as one PNG.

    Raises:
        OutputError: If it cannot be written.
    """
    from matplotlib.figure import Figure

    batches = list(dict.fromkeys(run["batch"] for run in runs))
    rows = len(runs) // len(batches)
    paths = {run["model"]: Path(run["model"]) for run in runs}
    alike = Counter(path.stem for path in paths.values())
    told = {name: path.stem if alike[path.stem] == 1 else name for name, path in paths.items()}
    figure = Figure(figsize=(8.0, 0.8 + len(batches) * (0.5 + 0.32 * rows)), layout="constrained")
    panels = figure.subplots(len(batches), squeeze=False)[:, 0]
    for batch, panel in zip(batches, panels, strict=True):
        here = [run for run in runs if run["batch"] == batch]
        names = [f"{told[run['model']]}, {run['target']} {run['precision']}" for run in here]
        medians = [run["median_ms"] for run in here]
        below = [run["median_ms"] - run["p5_ms"] for run in here]
        above = [run["p95_ms"] - run["median_ms"] for run in here]
        panel.barh(range(len(here)), medians, xerr=(below, above), color="#1f5fa8", ecolor="#888")
        panel.set_yticks(range(len(here)), names)
        panel.invert_yaxis()
        panel.set_xlim(left=0)
        panel.set_title(f"batch {batch}", loc="left", fontsize="medium")
    panels[-1].set_xlabel("milliseconds, 5 % to 95 % of the turns")
    with whole(path) as draft:
        figure.savefig(draft, dpi=DPI, format="png")
