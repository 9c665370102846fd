"""The points of a sweep, as a JSON document and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from corp_onnx.allocation.budget import Budget
from corp_onnx.latency.race import Race
from corp_onnx.pipeline import Pruned
from corp_onnx.report.page import Json, table_of


def sweep_json(
    dense: Path, outputs: Mapping[Path, Budget], found: Mapping[Path, Pruned], times: Race
) -> Json:
    """What ``sweep --json`` prints: a point per budget, and the smallest model that passed."""
    points: list[Json] = []
    for place, (output, result) in enumerate(found.items(), 1):
        budget = outputs[output]
        comparison = result.verification.comparison
        dense_counts, pruned_counts = result.surgery.dense, result.surgery.pruned
        points.append(
            {
                budget.unit: budget.kept,
                "macs_kept": pruned_counts.total / dense_counts.total,
                "params_kept": pruned_counts.params / dense_counts.params,
                "relative_error": comparison.relative_error,
                "top1_agreement": comparison.top1_agreement,
                "cosine": comparison.cosine,
                "median_ms": times.latencies[place].median_ms,
                "speedup": asdict(times.speedups[place]),
                "widths": {f"{cut.block}.{cut.axis}": cut.to for cut in result.plan.cuts},
                "failed": [check.name for check in result.verification.checks if not check.passed],
                "passed": result.verification.passed,
                "output": str(output),
            }
        )
    passed = [point for point in points if point["passed"]]
    unit = next(iter(outputs.values())).unit
    smallest = min(passed, key=lambda point: float(point[f"{unit}_kept"]), default=None)
    return {
        "model": str(dense),
        "dense_ms": times.latencies[0].median_ms,
        "points": points,
        "unreachable": [budget.kept for output, budget in outputs.items() if output not in found],
        "chosen": smallest and smallest["output"],
    }


def sweep_table(document: Mapping[str, Any], folder: Path) -> RenderableType:
    """What ``sweep`` prints."""
    table = table_of("kept", "MACs", "parameters", "error", "agreement", "ms", "faster", "verdict")
    for point in document["points"]:
        unit = "macs" if "macs" in point else "params"
        table.add_row(
            f"{unit} {point[unit]:g}",
            f"{point['macs_kept']:.1%}",
            f"{point['params_kept']:.1%}",
            f"{point['relative_error']:.4f}",
            f"{point['top1_agreement']:.3f}",
            f"{point['median_ms']:.2f}",
            f"{point['speedup']['ratio']:.2f}x",
            "passed" if point["passed"] else f"failed: {', '.join(point['failed'])}",
        )
    chosen = document["chosen"]
    said = f"the smallest that passed: {chosen}" if chosen else "none of them passed"
    return Group(
        table,
        Text(f"dense {document['dense_ms']:.2f} ms; {said}\nsweep.json, sweep.png in {folder}"),
    )
