"""Measure, print, and keep the result: ``python -m benchmarks NAME...``."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import (
    alike,
    calibration,
    demo,
    exactness,
    inspection,
    language,
    latency,
    machine,
    macs,
    quality,
    rotary,
)
from benchmarks.outcome import Benchmark, Outcome, Place, Row
from corp_onnx.errors import CorpError

DONE, FAILED, UNUSABLE = 0, 1, 2

TORCH = ("torch", "timm", "transformers", "onnxscript")
BENCHMARKS: Mapping[str, Benchmark] = {
    "demo": Benchmark(demo.measure, "the bundled model, cut and repaired by every method"),
    "exactness": Benchmark(
        exactness.measure, "ratio 0 and changes of basis give back the dense function", TORCH
    ),
    "exports": Benchmark(
        alike.measure, "four exports of one encoder, pruned, are one function", TORCH
    ),
    "inspect": Benchmark(
        inspection.measure, "how long `inspect` takes on graphs of many nodes", (*TORCH, "gguf")
    ),
    "quality": Benchmark(
        quality.measure, "error and accuracy of cut models, by method", ("tokenizers", "pillow")
    ),
    "language": Benchmark(
        language.measure, "perplexity of a language model with narrower MLPs", (*TORCH, "gguf")
    ),
    "rotary": Benchmark(
        rotary.measure, "what cutting rotated queries and keys would cost", (*TORCH, "gguf")
    ),
    "calibration": Benchmark(
        calibration.measure, "time and memory of calibrating, and of a new ratio after it"
    ),
    "latency": Benchmark(
        latency.measure, "speed-up against the MAC ratio on ONNX Runtime CPU", TORCH
    ),
    "macs": Benchmark(macs.measure, "multiply-adds of DeiT, dense and cut, by hand count", TORCH),
}

ALL = "all"

SCREEN = Console(width=None if sys.stdout.isatty() else 160)
log = logging.getLogger("benchmarks")


def main(argv: Sequence[str]) -> int:
    """Run the benchmarks that are named; 0 if all their checks hold."""
    parser = _parser()
    asked = parser.parse_args(argv)
    names = list(BENCHMARKS) if asked.names == [ALL] else asked.names
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}")
    if not names:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:12} {benchmark.about}")
        return DONE
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    place = Place(asked.assets, asked.exports, asked.quick)
    try:
        return max([_run(name, place, asked.out, argv) for name in names])
    except CorpError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return UNUSABLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*BENCHMARKS, ALL)))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="for results")
    parser.add_argument("--assets", type=Path, default=Path(".assets"), help="models and data")
    parser.add_argument(
        "--exports",
        type=Path,
        default=Path(".assets/exports"),
        help="kept exports; made if missing",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few samples, to see that it works; writes nothing"
    )
    return parser


def _run(name: str, place: Place, out: Path, argv: Sequence[str]) -> int:
    """Measure one thing, print it, write it down."""
    benchmark = BENCHMARKS[name]
    circumstances = _circumstances(name, benchmark, argv)
    start = perf_counter()
    outcome = benchmark.measure(place)
    document = circumstances | {
        "seconds": perf_counter() - start,
        "settings": dict(outcome.settings),
        "checks": [asdict(check) for check in outcome.checks],
        "passed": outcome.passed,
        "tables": dict(outcome.tables),
    }
    _show(outcome)
    if not place.quick:
        path = out / f"{document['date']}-{name}-{machine.slug(machine.cpu())}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        SCREEN.print(f"written to {path}")
    return DONE if outcome.passed else FAILED


def _circumstances(name: str, benchmark: Benchmark, argv: Sequence[str]) -> dict[str, Any]:
    """What, where, when and with which versions."""
    return {
        "benchmark": name,
        "about": benchmark.about,
        "command": shlex.join(["python", "-m", "benchmarks", *map(_portable, argv)]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": machine.device(),
        "os": machine.system(),
        "versions": machine.versions(benchmark.packages),
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


def _table(rows: list[Row]) -> Table:
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
