"""Which tokens count: those that a mask lets at least one query attend to."""

from __future__ import annotations

import numpy as np

from corp_onnx.blocks.records import Mask
from corp_onnx.data.batching import Batch

MASKED_BELOW = -1e3
"""A value added to a logit that hides a token: exporters write -10000, -65504, -3.4e38 or -inf."""


def seen_rows(mask: Mask | None, tokens: np.ndarray, tensors: Batch) -> np.ndarray | slice:
    """Which tokens somebody may attend to: a selection of the rows of ``tokens [..., d]``."""
    if mask is None:
        return slice(None)
    values = tensors[mask.tensor]
    rows = int(np.prod(tokens.shape[:-1]))
    seen = visible(mask, values, rows)
    if values.ndim == 3 and seen.size == mask.heads * rows:
        seen = np.any(seen.reshape(-1, mask.heads, seen.shape[1]), axis=1)
    if seen.shape[0] == 1 and rows % seen.size == 0:
        seen = np.broadcast_to(seen, (rows // seen.size, seen.shape[1]))
    if seen.all() or seen.size != rows:
        return slice(None)
    return (seen.T if mask.tokens_first else seen).reshape(-1)


def visible(mask: Mask, values: np.ndarray, rows: int = 0) -> np.ndarray:
    """Per sample and key whether any query may attend to it, from a mask ``[b, …, t]``.

    Counts ``[b]`` are of the first tokens of every sample, of which there are ``rows`` in all.
    """
    if mask.kind == "counts":
        return np.arange(rows // values.size) < values.reshape(-1, 1)
    keeps = values > MASKED_BELOW if mask.kind == "added" else values.astype(bool)
    if mask.kind == "drops":
        keeps = ~keeps
    return np.atleast_2d(np.any(keeps, axis=tuple(range(1, keeps.ndim - 1))))
