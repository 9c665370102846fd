"""How large the values of tensors become on real inputs, without holding the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from corp_onnx.emit import Emitter
from corp_onnx.errors import DataError
from corp_onnx.extracts import exposed
from corp_onnx.graph import Model
from corp_onnx.session import Runtime, open_session
from corp_onnx.statistics import Batch

BINS = 2048
"""Of the histogram from which a range is chosen."""

CANDIDATES = 96
"""Ranges that are tried, from all of the values down to a small part."""

LEVELS = 127
"""Whole numbers on either side of zero that eight bits have, if zero is to stay zero."""


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


def clips(
    model: Model,
    tensors: Sequence[str],
    batches: Sequence[Batch],
    runtime: Runtime | None = None,
) -> dict[str, float]:
    """The magnitude of every tensor that eight bits should reach up to.

    Values beyond it are cut off; it is the one of least expected squared error, see `best_clip`.
    """
    largest = peaks(model, tensors, batches, runtime)
    counts = {name: np.zeros(BINS) for name in tensors}
    session = open_session(exposed(model, tensors), runtime)
    for batch in batches:
        for name, values in session.run(batch, list(tensors)).items():
            bins = np.histogram(np.abs(values), BINS, (0.0, largest[name] or 1.0))[0]
            counts[name] += bins
    return {name: best_clip(counts[name], largest[name]) for name in tensors}


def best_clip(counts: Float64[np.ndarray, " n"], largest: float) -> float:
    """The range ``c`` of least squared error when values are rounded to 127 steps up to it.

    A value ``v`` below ``c`` is off by ``(c / 127)² / 12`` on average, one above by ``(v - c)²``.

    >>> best_clip(np.ones(BINS), 4.0)  # as many of every size: none is cut off
    4.0
    """
    edges = np.linspace(0.0, largest, len(counts) + 1)
    centres = (edges[1:] + edges[:-1]) / 2.0
    candidates = largest * np.linspace(1.0, 0.05, CANDIDATES)
    lost = [counts @ np.square(np.maximum(centres - clip, 0.0)) for clip in candidates]
    within = [counts[centres <= clip].sum() for clip in candidates]
    errors = np.array(lost) + np.array(within) * np.square(candidates / LEVELS) / 12.0
    return float(candidates[int(errors.argmin())])


def _with_peaks(model: Model, tensors: Sequence[str]) -> tuple[Model, Mapping[str, str]]:
    """The model with one number for each tensor as its outputs, and their names."""
    graph = model.graph.copy()
    by_name = graph.tensors()
    emit = Emitter(graph, "peak", set(by_name) | {node.name for node in graph.nodes})
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
