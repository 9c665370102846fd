"""What a command shows: progress and logs on standard error, its answer on standard output."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib import metadata
from io import TextIOWrapper
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from corp_onnx.commands import Answer, Progress
from corp_onnx.errors import PlanError
from corp_onnx.report import page

INTERRUPTED = 130


def _tell(version: bool) -> None:
    if version:
        print(f"corp-onnx {metadata.version('corp_onnx')}")
        raise typer.Exit


def about(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_tell, is_eager=True),
    ] = False,
) -> None:
    """Cut an exported ONNX transformer to half its width, and repair it in closed form."""


def show(command: Callable[[Progress], Answer], *, as_json: bool, log_level: str) -> int:
    """Carry a command out, and return its exit status."""
    screen = Console(stderr=True)
    _log_to(screen, log_level)
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} {task.fields[unit]}"),
        TimeElapsedColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )
    try:
        with bar:
            answer = command(_reporter(bar))
    except KeyboardInterrupt:
        return complain("interrupted; no file is half-written", INTERRUPTED)
    if as_json:
        print(page.as_json(answer.document))
    else:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # an encoding may lack signs, as on Windows
        width = None if sys.stdout.isatty() else 120
        Console(width=width, markup=False, emoji=False).print(answer.table)
    return answer.status


def run(command: Callable[[Progress], Answer], as_json: bool, log_level: str) -> None:
    """Carry a command out, and end with its exit status."""
    raise typer.Exit(show(command, as_json=as_json, log_level=log_level))


def complain(error: object, status: int) -> int:
    """Say what is wrong, and give the status back."""
    if isinstance(error, OSError) and error.filename is not None:
        error = f"{error.filename} cannot be read or written: {error.strerror}"
    print(f"corp-onnx: {error}", file=sys.stderr)
    return status


def _reporter(bar: Bar) -> Progress:
    """Counts every unit of work on a line of its own."""
    lines: dict[str, TaskID] = {}

    def report(done: int, unit: str = "samples") -> None:
        if unit not in lines:
            what = {"samples": "calibrating", "blocks": "fitting"}.get(unit, unit)
            lines[unit] = bar.add_task(what, total=None, unit=unit)
        bar.update(lines[unit], advance=done)

    return report


def _log_to(screen: Console, level: str) -> None:
    if level.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise PlanError(f"--log-level {level!r} is none of debug, info, warning and error")
    handler = RichHandler(console=screen, show_path=False, show_time=False)
    logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[handler], force=True)
