"""Which samples are calibrated on, which are held out, and how many are made of one picture."""

from __future__ import annotations

import logging

import numpy as np

from corp_onnx.data.dataset import Dataset

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.2
MOST_HELD_OUT = 32
FILLED, MOST_CROPS = 256, 4
"""Fewer pictures are filled up to so many inputs by crops, of each at most so many."""


def held_out(data: Dataset) -> int:
    """How many samples are kept from calibration, to verify with; none if there are too few."""
    fixed = data.fixed_batch or 1
    samples = data.samples if data.fixed_batch is None else data.filling().samples
    wanted = min(MOST_HELD_OUT, round(HELD_OUT_SHARE * samples))
    count = max(fixed, wanted - wanted % fixed)
    return 0 if samples < count + fixed else count


def held_apart(data: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Some samples to verify with, and all others."""
    count = held_out(data)
    if not count:
        log.warning("there are too few samples to hold any out; verifying with those calibrated on")
        return data, data
    order = data.shuffled(seed)
    return data.take(np.sort(order[:count])), data.take(np.sort(order[count:]))


def drawn(data: Dataset, most: int, seed: int) -> Dataset:
    """A random choice of samples, in the order of the data."""
    fixed = data.fixed_batch or 1
    return data.take(np.sort(data.shuffled(seed)[: max(most - most % fixed, fixed)]))


def enriched(data: Dataset, crops: int | None, seed: int, *, of: int = 1) -> Dataset:
    """Pictures with random crops of theirs: so many inputs of each, or as many as fill a small set.

    Args:
        data: What is calibrated on; samples that are no pictures stay as they are.
        crops: Inputs of every picture; None adds crops until there are ``FILLED`` inputs.
        seed: Of the crops.
        of: How many such parts there are in all.
    """
    if crops is not None:
        return data.augmented(crops, seed)
    return data.augmented(MOST_CROPS, seed, most=FILLED // of)
