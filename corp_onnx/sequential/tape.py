"""Tensors of every batch at the borders of segments, kept on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from corp_onnx.errors import OutputError


class Tape:
    """What flows across borders, batch by batch: memory does not grow with the samples."""

    __slots__ = ("_count", "_folder", "_places")

    def __init__(self, folder: Path) -> None:
        """Start empty, in a folder of its own."""
        folder.mkdir()
        self._folder = folder
        self._count = 0
        self._places: dict[str, Path] = {}

    def write(self, batch: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Keep tensors of one batch.

        Raises:
            OutputError: If the disk is full.
        """
        for name, tensor in tensors.items():
            if name not in self._places:
                self._places[name] = self._folder / str(self._count)
                self._count += 1
                self._places[name].mkdir()
            try:
                np.save(self._places[name] / f"{batch}.npy", tensor)
            except OSError as error:
                raise OutputError(
                    f"cannot keep activations in {self._folder}: {error.strerror or error}; name a "
                    "folder on a larger disk with the environment variable TMPDIR, or calibrate on "
                    "fewer samples"
                ) from error

    def read(self, batch: int, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Tensors of one batch; all that are kept, unless they are named."""
        names = self._places if names is None else names
        return {name: np.load(self._places[name] / f"{batch}.npy") for name in names}

    def forget(self, needed: Iterable[str]) -> None:
        """Drop every tensor that is not needed any more."""
        for name in self._places.keys() - set(needed):
            shutil.rmtree(self._places.pop(name))
