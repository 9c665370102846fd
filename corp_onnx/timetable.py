"""Races as a JSON document and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from corp_onnx.conditions import BUSY, Conditions
from corp_onnx.latency import NOISY, Race
from corp_onnx.present import Json, table_of

LABELS = ("model", "target", "precision", "batch")
"""What tells one engine from another; those that vary get a column."""

SHOWN_OPERATORS = 12
"""Rows of the table of operators; the JSON has all of them."""

MEMORY = {"peak_bytes": "peak memory", "device_bytes": "on devices"}
"""Columns of the table of memory."""

Label = Mapping[str, Any]
"""An engine by `LABELS`."""


def label(model: str, target: str, precision: str | None, batch: int) -> Label:
    """What tells an engine from others; None where nobody said."""
    return dict(zip(LABELS, (model, target, precision, batch), strict=True))


def race_json(
    labels: Sequence[Sequence[Label]], races: Sequence[Race], conditions: Conditions | None
) -> Json:
    """Every run, and how much faster than the first engine of its race each other one is.

    Of times that were measured elsewhere there are no conditions.
    """
    runs: list[Json] = []
    speedups: list[Json] = []
    for engines, race in zip(labels, races, strict=True):
        for label, latency in zip(engines, race.latencies, strict=True):
            throughput = 1000.0 * label["batch"] / latency.median_ms
            runs.append({**label, **asdict(latency), "samples_per_s": throughput})
        for label, speedup in list(zip(engines, race.speedups, strict=True))[1:]:
            speedups.append({**label, "over": engines[0]["model"], **asdict(speedup)})
    return {
        "runs": runs,
        "speedups": speedups,
        "conditions": conditions and asdict(conditions),
        "warnings": [] if conditions is None else [*_busy(conditions), *_noise(races)],
    }


def race_table(document: Mapping[str, Any]) -> RenderableType:
    """What ``bench`` prints: a row for every engine, and what made the times doubtful."""
    shown = [name for name in LABELS[1:] if len({run[name] for run in document["runs"]}) > 1]
    device = any(run["device_ms"] is not None for run in document["runs"])
    times = ["median", "5 % to 95 %", *(["on device"] if device else []), "per second"]
    table = table_of("model", *shown, *times, "speed-up", "95 % interval")
    speedups = iter(document["speedups"])
    races = len(document["runs"]) - len(document["speedups"])
    for place, run in enumerate(document["runs"]):
        first = place % (len(document["runs"]) // races) == 0
        entry = None if first else next(speedups)
        on_device = "" if run["device_ms"] is None else f"{run['device_ms']:.2f} ms"
        table.add_row(
            run["model"],
            *(str(run[name]) for name in shown),
            f"{run['median_ms']:.2f} ms",
            f"{run['p5_ms']:.2f} to {run['p95_ms']:.2f} ms",
            *([on_device] if device else []),
            f"{run['samples_per_s']:.1f}",
            f"{entry['ratio']:.2f}x" if entry else "",
            f"{entry['low']:.2f} to {entry['high']:.2f}" if entry else "",
        )
    warnings = [Text(f"warning: {warning}") for warning in document["warnings"]]
    memory = [_memory_table(document["memory"])] if document.get("memory") else []
    profiles = [_profile_table(document["profiles"])] if document.get("profiles") else []
    return Group(table, *memory, *profiles, *warnings)


def _memory_table(entries: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Memory of a process with each engine alone; on devices only where one of them is used."""
    kinds = ["peak_bytes"]
    kinds += ["device_bytes"] if any(entry["device_bytes"] for entry in entries) else []
    table = table_of("engine", *(MEMORY[kind] for kind in kinds))
    for entry in entries:
        shown = (_megabytes(entry[kind]) for kind in kinds)
        table.add_row(" ".join(str(entry[name]) for name in LABELS), *shown)
    return table


def _megabytes(size: int | None) -> str:
    return "not told" if size is None else f"{size / 1e6:.0f} MB"


def _profile_table(profiles: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Where the time of every engine goes, the dearest operators of any of them first."""
    columns = [" ".join(str(profile[name]) for name in LABELS[:3]) for profile in profiles]
    table = table_of("operator, ms of one inference", *columns)
    dearest: dict[str, float] = {}
    for profile in profiles:
        for operator, spent in profile["operators_ms"].items():
            dearest[operator] = max(dearest.get(operator, 0.0), spent)
    for operator in sorted(dearest, key=dearest.__getitem__, reverse=True)[:SHOWN_OPERATORS]:
        spent = [profile["operators_ms"].get(operator) for profile in profiles]
        table.add_row(operator, *("" if each is None else f"{each:.2f}" for each in spent))
    return table


def _busy(conditions: Conditions) -> list[str]:
    if conditions.busy <= BUSY:
        return []
    return [
        f"other processes kept {conditions.busy:.0%} of the processor busy before the timing; "
        "times are longer than they would be, ratios less certain"
    ]


def _noise(races: Sequence[Race]) -> list[str]:
    return [
        f"the first engine's times spread over {race.spread:.0%} of their median (more than "
        f"{NOISY:.0%}): the machine was busy or changed its clock; time again with more --runs"
        for race in races
        if race.spread > NOISY
    ]
