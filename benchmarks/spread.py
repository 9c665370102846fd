"""Runs with several draws of the calibration samples as one row: mean and spread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.outcome import Row


def summary(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """One row for all rows that agree in ``keys``: of every figure the mean and the deviation.

    >>> runs = [{"cut": "QK", "seed": 0, "error": 1.0}, {"cut": "QK", "seed": 1, "error": 3.0}]
    >>> summary(runs, ["cut"])
    [{'cut': 'QK', 'seeds': 2, 'error': 2.0, 'error ±': 1.0}]
    """
    figures = {name for row in rows for name, value in row.items() if isinstance(value, float)}
    figures -= {*keys, "seed"}
    found = []
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        alike = [row for row in rows if tuple(row[name] for name in keys) == key]
        merged: Row = dict(zip(keys, key, strict=True)) | {"seeds": len(alike)}
        for name in alike[0]:
            if name not in {*keys, "seed"}:
                values = [row.get(name) for row in alike]
                merged |= _mean(name, values) if name in figures else {name: _common(values)}
        found.append(merged)
    return found


def ratios(rows: Iterable[Row], one: Row, other: Row, figure: str = "error") -> list[float]:
    """A figure of one kind of run over that of another, seed by seed."""
    rows = list(rows)
    by_seed = [
        {
            row["seed"]: row[figure]
            for row in rows
            if row[figure] is not None and kind.items() <= row.items()
        }
        for kind in (one, other)
    ]
    return [by_seed[0][seed] / by_seed[1][seed] for seed in by_seed[0] if seed in by_seed[1]]


def _mean(name: str, values: Sequence[object]) -> Row:
    """Of the runs that have the figure; None where none has."""
    known = np.array([value for value in values if isinstance(value, float)])
    mean, deviation = (float(known.mean()), float(known.std())) if len(known) else (None, None)
    return {name: mean} if name == "MACs" else {name: mean, f"{name} ±": deviation}


def _common(values: Sequence[object]) -> object:
    """What all runs say; None where they differ."""
    return values[0] if all(value == values[0] for value in values) else None
