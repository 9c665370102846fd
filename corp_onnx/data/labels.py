"""Labels for checking accuracy; pruning itself never sees one."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from corp_onnx.data.dataset import Dataset
from corp_onnx.errors import DataError


def read_labels(path: Path, data: Dataset) -> list[int]:
    """The class number of every sample of ``data``, in its order.

    A ``.npy`` holds one whole number per sample, an ``.npz`` the same under ``label``, and any
    other file one number per line.

    Raises:
        DataError: If the file cannot be read so, or has too few labels.
    """
    if not path.is_file():
        raise DataError(f"the labels {path} do not exist")
    try:
        labels = _numbers(path)
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} holds no labels ({error}); give whole numbers in a .npy, under 'label' in a "
            ".npz, or one per line of a text file"
        ) from error
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path} holds {labels.dtype} of shape {labels.shape}, not whole numbers")
    places = data.places
    if data.samples and int(places.max()) >= len(labels):
        raise DataError(
            f"{path} holds {len(labels)} labels, but {data.source} has at least "
            f"{int(places.max()) + 1} samples; give one label per sample"
        )
    return [int(label) for label in labels[places]]


def _numbers(path: Path) -> np.ndarray:
    if path.suffix == ".npz":
        with np.load(path) as stored:
            return np.asarray(stored["label"])
    if path.suffix == ".npy":
        return np.asarray(np.load(path))
    lines = path.read_text(encoding="utf-8").split()
    return np.array([int(line) for line in lines], dtype=np.int64)
