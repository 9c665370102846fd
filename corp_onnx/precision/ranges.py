"""How large the values of tensors become on real inputs, without holding the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from corp_onnx.data.batching import Batch
from corp_onnx.errors import DataError
from corp_onnx.graph.emit import Emitter
from corp_onnx.graph.extracts import exposed
from corp_onnx.graph.model import Model
from corp_onnx.session import Runtime, open_session

Range = tuple[float, float]

LEAST = float(np.finfo(np.float32).tiny)
"""The smallest size of a step: one below it has fewer digits in float32, or none."""

BINS = 4096
"""Of the histogram from which a range is chosen."""

CANDIDATES = 96
"""Ranges that are tried, from all of the values down to a small part."""

LEVELS = 127
"""Whole numbers on either side of zero that eight bits have, if zero is in the middle."""

ALL_LEVELS = 255
"""Steps that eight bits have, wherever zero is."""


def peaks(
    model: Model,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    runtime: Runtime | None = None,
) -> dict[str, float]:
    """The largest finite magnitude of every tensor; the model itself finds it.

    Infinities are left out: masks hold them on purpose, and every type has them.

    Raises:
        DataError: If a tensor holds NaN.
    """
    if not tensors:
        return {}
    reduced, names = _with_peaks(model, tensors)
    session = open_session(reduced, runtime)
    found = dict.fromkeys(tensors, 0.0)
    for batch in batches:
        values = session.run(batch, list(names.values()))
        for tensor, name in names.items():
            peak = float(values[name])
            if np.isnan(peak):
                raise DataError(f"tensor {tensor!r} holds NaN in float32; check model and inputs")
            found[tensor] = max(found[tensor], peak)
    return found


def ranges(
    model: Model,
    tensors: Sequence[str],
    batches: Sequence[Batch],
    runtime: Runtime | None = None,
    *,
    symmetric: bool,
) -> dict[str, Range]:
    """The least and the largest value of every tensor that eight bits should reach.

    Values beyond are cut off; it is the range of least expected squared error, see `best_range`.
    """
    largest = peaks(model, tensors, batches, runtime)
    counts = {name: np.zeros(BINS) for name in tensors}
    session = open_session(exposed(model, tensors), runtime)
    for batch in batches:
        for name, values in session.run(batch, list(tensors)).items():
            reach = max(largest[name], LEAST)
            counts[name] += np.histogram(values, BINS, (-reach, reach))[0]
    return {name: best_range(counts[name], largest[name], symmetric=symmetric) for name in tensors}


def best_range(counts: Float64[np.ndarray, " n"], largest: float, *, symmetric: bool) -> Range:
    """The range of least squared error when values are rounded to the steps within it.

    With ``s`` the size of a step, a value within the range is off by ``s² / 12`` on average, one
    beyond it by the square of its distance. Zero is always in the range.

    Args:
        counts: Of values, in bins of equal width from ``-largest`` to ``largest``.
        largest: The largest magnitude.
        symmetric: Whether zero must be in the middle, with 127 steps on either side; else there are
            255 steps in all.

    >>> best_range(np.ones(BINS), 4.0, symmetric=True)  # as many of every size: none is cut off
    (-4.0, 4.0)
    >>> best_range(np.repeat([0.0, 1.0], BINS // 2), 4.0, symmetric=False)  # none is negative
    (0.0, 4.0)
    """
    edges = np.linspace(-largest, largest, len(counts) + 1)
    centres, used = (edges[1:] + edges[:-1]) / 2.0, np.flatnonzero(counts)
    if len(used) == 0:
        return (-largest, largest)
    shares = np.linspace(1.0, 0.05, CANDIDATES)
    reach = (-largest, largest) if symmetric else (edges[used[0]], edges[used[-1] + 1])
    lows, highs = min(reach[0], 0.0) * shares, max(reach[1], 0.0) * shares
    below = np.array([counts @ np.square(np.maximum(low - centres, 0.0)) for low in lows])
    above = np.array([counts @ np.square(np.maximum(centres - high, 0.0)) for high in highs])
    summed = np.concatenate([[0.0], np.cumsum(counts)])
    up_to_low, up_to_high = (np.interp(ends, edges, summed) for ends in (lows, highs))
    steps = (highs[None, :] - lows[:, None]) / (2 * LEVELS if symmetric else ALL_LEVELS)
    within = (up_to_high[None, :] - up_to_low[:, None]) * np.square(steps) / 12.0
    errors = below[:, None] + above[None, :] + within
    if symmetric:
        place = int(np.diagonal(errors).argmin())
        return (float(lows[place]), float(highs[place]))
    low, high = np.unravel_index(errors.argmin(), errors.shape)
    return (float(lows[low]), float(highs[high]))


def _with_peaks(model: Model, tensors: Sequence[str]) -> tuple[Model, Mapping[str, str]]:
    """The model with one number for each tensor as its outputs, and their names."""
    graph = model.graph.copy()
    by_name = graph.tensors()
    emit = Emitter.of(graph, "peak")
    zero = emit.constant("zero", np.zeros((), np.float32))
    names, outputs = {}, []
    for name in tensors:
        magnitude = emit.node("Abs", [by_name[name]], dtype=np.float32)
        endless = emit.node("IsInf", [magnitude], dtype=np.bool_)
        finite = emit.node("Where", [endless, zero, magnitude], dtype=np.float32)
        peak = emit.node("ReduceMax", [finite], dtype=np.float32, attrs={"keepdims": 0})
        names[name] = peak.name
        outputs.append(peak)
    graph.outputs = outputs
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return model.with_graph(graph), names
