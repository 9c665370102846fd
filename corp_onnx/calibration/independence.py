"""Whether what a model gives for a sample depends on the samples beside it."""

from __future__ import annotations

import logging

import numpy as np

from corp_onnx.data.batching import Batch, samples_in
from corp_onnx.graph.model import Model
from corp_onnx.session import Runtime, open_session

log = logging.getLogger(__name__)

ROUNDING = 1e-3
"""Relative squared error that other kernels for another batch size may make, in any precision."""


def warn_of_mixing(model: Model, batch: Batch, runtime: Runtime | None = None) -> None:
    """Say so if the samples of a batch know of each other: how they are batched matters then.

    So it is where attention runs along the first axis, because tokens come first or there is no
    batch at all. Outputs of which no part belongs to one sample say nothing.
    """
    samples = samples_in(batch)
    if samples < 2:
        return
    some = samples // 2
    session = open_session(model, runtime)
    together = session.run(batch)
    alone = session.run({name: array[:some] for name, array in batch.items()})
    for name, whole in together.items():
        error = _error(whole, alone[name], some / samples)
        if error > ROUNDING:
            if _error(whole, session.run(batch)[name], 1.0) > ROUNDING:
                return  # it draws random numbers
            log.warning(
                "output %r of %d samples changes by %.1e (relative squared error) when %d of them "
                "are run without the others: they are not independent along the first axis, which "
                "must count samples; export the model with a batch in front of its tokens",
                *(name, samples, error, some),
            )
            return


def _error(whole: np.ndarray, part: np.ndarray, share: float) -> float:
    """How far the part is from that share of the whole; 0 where they cannot be compared."""
    comparable = whole.ndim > 0 and whole.shape[1:] == part.shape[1:]
    if not comparable or len(part) != len(whole) * share or whole.dtype.kind in "biu":
        return 0.0
    y, z = whole[: len(part)].astype(np.float64), part.astype(np.float64)
    energy = np.square(y).sum()
    return float(np.square(y - z).sum() / energy) if energy and np.isfinite(energy) else 0.0
