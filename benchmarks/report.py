"""A measurement on the screen and in a file, with where, when and by what it was made."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.outcome import Outcome, Row
from corp_onnx.errors import CorpError

DONE, FAILED, UNUSABLE = 0, 1, 2

RESULTS = Path("benchmarks/results")

SCREEN = Console(width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True, slots=True)
class Heading:
    """What is measured, in words, by which command, with which optional packages."""

    name: str
    about: str
    packages: tuple[str, ...]
    command: tuple[str, ...]


def status_of(work: Callable[[], int]) -> int:
    """The exit status of a command, its progress logged, errors of the user's business in words."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    try:
        return work()
    except CorpError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return UNUSABLE


def report(heading: Heading, measure: Callable[[], Outcome], out: Path | None) -> int:
    """Measure, print, and write down below ``out`` if there is one; 0 if all checks hold."""
    circumstances = _circumstances(heading)
    start = perf_counter()
    outcome = measure()
    document = circumstances | {
        "seconds": perf_counter() - start,
        "settings": dict(outcome.settings),
        "checks": [asdict(check) for check in outcome.checks],
        "passed": outcome.passed,
        "tables": dict(outcome.tables),
    }
    _show(outcome)
    if out is not None:
        path = out / f"{document['date']}-{heading.name}-{machine.slug(machine.name())}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        SCREEN.print(f"written to {path}")
    return DONE if outcome.passed else FAILED


def _circumstances(heading: Heading) -> dict[str, Any]:
    """What, where, when and with which versions."""
    return {
        "benchmark": heading.name,
        "about": heading.about,
        "command": shlex.join(["python", "-m", *map(_portable, heading.command)]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": machine.device(),
        "os": machine.system(),
        "versions": machine.versions(heading.packages),
        **machine.commit(),
    }


def _portable(argument: str) -> str:
    """An argument without the folders of this machine.

    >>> _portable("--assets=/data/assets"), _portable("/data/assets")
    ('--assets=assets', 'assets')
    """
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def _show(outcome: Outcome) -> None:
    for title, rows in outcome.tables.items():
        SCREEN.print(f"\n{title}", style="bold", highlight=False)
        SCREEN.print(_table(rows))
    SCREEN.print()
    for check in outcome.checks:
        verdict = "passed" if check.passed else "FAILED"
        SCREEN.print(f"{verdict}  {check.name}: {check.found}", markup=False, highlight=False)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, value in rows[0].items():
        table.add_column(column, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
