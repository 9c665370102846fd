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
    found = []
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        alike = [row for row in rows if tuple(row[name] for name in keys) == key]
        merged: Row = dict(zip(keys, key, strict=True)) | {"seeds": len(alike)}
        for name in alike[0]:
            if name not in {*keys, "seed"}:
                merged |= _mean(name, [row.get(name) for row in alike])
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
    if all(isinstance(value, float) for value in values):
        figures = np.array(values, np.float64)
        spread = {} if name == "MACs" else {f"{name} ±": float(figures.std())}
        return {name: float(figures.mean())} | spread
    return {name: values[0] if len(set(map(str, values))) == 1 else None}
