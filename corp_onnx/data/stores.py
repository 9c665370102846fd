"""What a store of samples is, and the pictures in a folder as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped
from PIL import Image

from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.errors import DataError
from corp_onnx.graph.inputs import InputSpec

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


Layout = tuple[InputSpec, ...]
"""What one sample holds, input by input. Samples of one layout can be stacked into a batch."""


@runtime_checkable
class Store(Protocol):
    """Samples that are read by number, as they are, before they are fitted to a model."""

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The class of every sample, where the source knows it."""

    def __len__(self) -> int:
        """The number of samples."""

    def layout(self, index: int) -> Layout:
        """Names, dtypes and shapes of one sample, found without reading it."""

    def place(self, index: int) -> int:
        """A sample's number in the source, which may hold more than the store."""

    def name(self, index: int) -> str:
        """What to call one sample in a message."""

    def read(self, indices: Int[np.ndarray, " n"]) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        """The samples with these numbers, which must share one layout, stacked."""


@runtime_checkable
class RowArray(Protocol):
    """What is asked of an array of samples, be it on disk or in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes; the first is the number of samples."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of its numbers."""

    def __getitem__(self, rows: Any, /) -> Any:  # noqa: ANN401 (NumPy's own signature)
        """The rows with these numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Pictures in a folder, opened when they are asked for."""

    files: tuple[Path, ...]
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.files)

    def layout(self, index: int) -> Layout:
        """What the preprocessing makes of any picture."""
        wanted = self.preprocessing
        shape = (None, wanted.channels, *wanted.size)
        return (InputSpec(wanted.input, np.dtype(np.float32), shape),)

    def place(self, index: int) -> int:
        """Its own number: all pictures are in the store."""
        return index

    def name(self, index: int) -> str:
        """A picture's file."""
        return str(self.files[index])

    def read(self, indices: Int[np.ndarray, " n"]) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        """The pictures, resized, cropped and normalised."""
        pictures = [self.preprocessing.apply(self.open(index)) for index in indices.tolist()]
        return {self.preprocessing.input: np.stack(pictures)}

    def open(self, index: int) -> Image.Image:
        """One picture as it is in its file.

        Raises:
            DataError: If the file cannot be read as an image.
        """
        return _picture(self.files[index])


def open_images(folder: Path, preprocessing: Preprocessing) -> Images:
    """All pictures below a folder, in the order of their paths.

    The label of a picture is the name of the subfolder it is in, directly or deeper; there are
    labels only if every picture is in a subfolder. Hidden files are passed over.

    Raises:
        DataError: If there are no pictures.
    """
    below = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    found = [path for path in below if not any(part.startswith(".") for part in path.parts)]
    if not found:
        kinds = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise DataError(f"{folder} has no images in it or below it; put some there ({kinds})")
    labelled = all(len(path.parts) > 1 for path in found)
    labels = tuple(path.parts[0] for path in found) if labelled else None
    return Images(tuple(folder / path for path in found), labels, preprocessing)


def layout_of(where: str, arrays: Mapping[str, RowArray]) -> tuple[Layout, int]:
    """The layout that arrays of one batch share, and how many samples they hold.

    Raises:
        DataError: If an array has no axis for samples, or they disagree on how many there are.
    """
    for name, array in arrays.items():
        if not array.shape:
            raise DataError(
                f"{where}: {name!r} is a single number; its first axis must count the samples"
            )
    counts = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        raise DataError(
            f"{where}: the arrays hold different numbers of samples ({listed}); "
            "the first axis must be equally long in all of them"
        )
    layout = tuple(
        InputSpec(name, array.dtype, (None, *array.shape[1:]))
        for name, array in sorted(arrays.items())
    )
    return layout, next(iter(counts.values()), 0)


def _picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = f"{path} cannot be read as an image ({error}); repair it or take it away"
        raise DataError(message) from error
