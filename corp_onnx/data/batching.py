"""Batches: which samples are used, and which of them make one: those of one shape."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from corp_onnx.data.stores import Layout

Batch = Mapping[str, np.ndarray]
"""Arrays by input name, samples first."""

_log = logging.getLogger(__name__)


def samples_in(batch: Batch) -> int:
    """How many there are."""
    return len(next(iter(batch.values())))


def first(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """Batches until there are so many samples."""
    for batch in batches:
        if samples <= 0:
            return
        samples -= samples_in(batch)
        yield batch


def batched(
    indices: Sequence[int], layout: Callable[[int], Layout], size: int
) -> list[Int[np.ndarray, " b"]]:
    """Neighbours of one layout, at most ``size`` of them in a batch."""
    runs = [np.array(list(run), np.intp) for _, run in itertools.groupby(indices, key=layout)]
    return [run[at : at + size] for run in runs for at in range(0, len(run), size)]


def filled(
    indices: Sequence[int], layout: Callable[[int], Layout], size: int
) -> list[Int[np.ndarray, " b"]]:
    """Batches of just ``size`` of one layout, neighbours or not; what fills none is left out."""
    first: dict[Layout, int] = {}
    together = sorted(indices, key=lambda index: first.setdefault(layout(index), len(first)))
    return [batch for batch in batched(together, layout, size) if len(batch) == size]


def subset(source: str, available: int, samples: int | None, seed: int) -> Int[np.ndarray, " n"]:
    """Which samples to use, in their order."""
    indices = np.arange(available)
    if samples is not None and samples > available:
        _log.warning("%s has %d samples, not the %d asked for", source, available, samples)
    elif samples is not None:
        indices = np.sort(np.random.default_rng(seed).choice(available, samples, replace=False))
    indices.flags.writeable = False
    return indices
