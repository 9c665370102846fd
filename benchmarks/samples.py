"""Calibration samples of any kind: drawn by seed, halved, and handed out in batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tokenizers import Encoding

from benchmarks.tasks import padded
from corp_onnx.data.batching import Batch
from corp_onnx.data.dataset import Dataset


class Samples(Protocol):
    """Inputs of a model, in a fixed order."""

    @property
    def count(self) -> int:
        """How many there are."""

    def take(self, places: np.ndarray) -> Samples:
        """Those at these places."""

    def batches(self, crops: int, seed: int) -> Iterable[Batch]:
        """All of them; of a picture several crops."""

    def crops(self, asked: int) -> int:
        """How many inputs are really made of every sample."""


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Pictures or arrays."""

    data: Dataset
    batch: int

    @property
    def count(self) -> int:
        """How many there are."""
        return self.data.samples

    def take(self, places: np.ndarray) -> Data:
        """Those at these places."""
        return Data(self.data.take(places), self.batch)

    def batches(self, crops: int, seed: int) -> Iterable[Batch]:
        """All of them; of a picture several crops."""
        return self.data.augmented(crops, seed).batches(self.batch)

    def crops(self, asked: int) -> int:
        """As many as asked for of pictures, 1 of anything else."""
        return self.data.augmented(asked, 0).crops


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Texts as token numbers, which are batched by length."""

    codes: Sequence[Encoding]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.codes)

    def take(self, places: np.ndarray) -> Texts:
        """Those at these places."""
        return Texts([self.codes[place] for place in places])

    def batches(self, crops: int, seed: int) -> Iterable[Batch]:
        """All of them, the shortest first."""
        return padded(sorted(self.codes, key=len))

    def crops(self, asked: int) -> int:
        """A text is read as it is."""
        return 1


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Token numbers ``[n, t]``, every row of equal length."""

    ids: np.ndarray
    batch: int

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.ids)

    def take(self, places: np.ndarray) -> Windows:
        """Those at these places."""
        return Windows(self.ids[places], self.batch)

    def batches(self, crops: int, seed: int) -> list[Batch]:
        """All of them, as inputs of a model."""
        starts = range(0, len(self.ids), self.batch)
        return [{"input_ids": self.ids[start : start + self.batch]} for start in starts]

    def crops(self, asked: int) -> int:
        """A text is read as it is."""
        return 1


def drawn(samples: Samples, count: int, seed: int) -> tuple[Samples, Samples]:
    """So many of them at random, as far as there are so many, and all others."""
    order = np.random.default_rng(seed).permutation(samples.count)
    return samples.take(np.sort(order[:count])), samples.take(np.sort(order[count:]))


def halves(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    """Two disjoint halves."""
    return drawn(samples, samples.count // 2, seed)
