"""Races as a JSON document and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from corp_onnx.latency.conditions import BUSY, Conditions
from corp_onnx.latency.race import NOISY, Race
from corp_onnx.report.page import Json, table_of

LABELS = ("model", "target", "precision", "batch")
"""What tells one engine from another; those that vary get a column."""

SHOWN_OPERATORS = 12
"""Rows of the table of operators; the JSON has all of them."""

MEMORY = {"peak_bytes": "peak memory", "device_bytes": "on devices"}
"""Columns of the table of memory."""

Label = Mapping[str, Any]
"""An engine by `LABELS`."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What an engine ran with, as far as its target tells.

    Attributes:
        threads: Of the processor, as asked for; 0 leaves them to the runtime.
        versions: Of everything that has a part in how fast it is, by name.
    """

    threads: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def label(model: str, target: str, precision: str | None, batch: int) -> Label:
    """What tells an engine from others; None where nobody said."""
    return dict(zip(LABELS, (model, target, precision, batch), strict=True))


def race_json(
    labels: Sequence[Sequence[Label]],
    races: Sequence[Race],
    *,
    setups: Sequence[Setup],
    before: Conditions | None = None,
    after: Conditions | None = None,
) -> Json:
    """Every run, and how much faster than the first engine of its race each other one is.

    Args:
        labels: Of the engines of every race.
        races: What they showed.
        setups: Of the engines of any race.
        before: The machine before the first race; None of times that were measured elsewhere.
        after: The machine at the end of the last; likewise.
    """
    runs: list[Json] = []
    speedups: list[Json] = []
    for number, (engines, race) in enumerate(zip(labels, races, strict=True)):
        runs += _runs(number, engines, race, setups)
        speedups += _speedups(number, engines, race)
    return {
        "runs": runs,
        "speedups": speedups,
        "conditions": before and asdict(before),
        "conditions_after": after and asdict(after),
        "warnings": [] if before is None else [*_busy(before), *_noise(labels, races)],
    }


def _runs(
    number: int, engines: Sequence[Label], race: Race, setups: Sequence[Setup]
) -> Iterator[Json]:
    for label, latency, settled, setup in zip(
        engines, race.latencies, race.settled, setups, strict=True
    ):
        yield {
            **label,
            **asdict(latency),
            "samples_per_s": 1000.0 * label["batch"] / latency.median_ms,
            "race": number,
            "warmup": race.warmup,
            "settled": settled,
            **asdict(setup),
        }


def _speedups(number: int, engines: Sequence[Label], race: Race) -> Iterator[Json]:
    """Of all but the first, which they are held against."""
    first = engines[0]
    over = {
        "over": first["model"],
        "over_target": first["target"],
        "over_precision": first["precision"],
    }
    for label, speedup in list(zip(engines, race.speedups, strict=True))[1:]:
        yield {**label, **over, **asdict(speedup), "race": number}


def race_table(document: Mapping[str, Any]) -> RenderableType:
    """What ``bench`` prints: a row for every engine, and what made the times doubtful."""
    shown = [name for name in LABELS[1:] if len({run[name] for run in document["runs"]}) > 1]
    device = any(run["device_ms"] is not None for run in document["runs"])
    times = ["median", "5 % to 95 %", *(["on device"] if device else []), "per second"]
    table = table_of("model", *shown, *times, "speed-up", "95 % interval")
    for run, entry in _paired(document):
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


def _paired(document: Mapping[str, Any]) -> Iterator[tuple[Json, Json | None]]:
    """Every run with its speed-up; the first of a race has none."""
    speedups, last = iter(document["speedups"]), None
    for run in document["runs"]:
        yield run, next(speedups) if run["race"] == last else None
        last = run["race"]


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
    if conditions.busy is None or conditions.busy <= BUSY:
        return []
    return [
        f"other processes kept {conditions.busy:.0%} of the processor busy before the timing; "
        "times are longer than they would be, ratios less certain"
    ]


def _noise(labels: Sequence[Sequence[Label]], races: Sequence[Race]) -> list[str]:
    """Every engine whose times are far apart: that of any of them makes ratios doubtful."""
    return [
        f"the times of {_named(label)} spread over {latency.spread:.0%} of their median (more than "
        f"{NOISY:.0%}): the machine was busy or changed its clock; time again with more --runs"
        for engines, race in zip(labels, races, strict=True)
        for label, latency in zip(engines, race.latencies, strict=True)
        if latency.spread > NOISY
    ]


def _named(label: Label) -> str:
    return "{model} on {target} in {precision} at batch {batch}".format(**label)
