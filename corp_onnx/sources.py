"""Stores of samples: arrays on disk, pictures in a folder, random numbers."""

from __future__ import annotations

import logging
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped
from numpy.lib import format as npy
from PIL import Image

from corp_onnx.errors import DataError
from corp_onnx.preprocessing import Preprocessing

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
ZIP_LOCAL_HEADER = struct.Struct("<26xHH")
"""The end of a zip entry's local header: the lengths of its name and of its extra field."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model, or what a source offers for one: name, dtype and shape.

    The first axis of ``shape`` counts samples; None is a dynamic axis.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


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

    def name(self, index: int) -> str:
        """What to call one sample in a message."""

    def read(self, indices: Int[np.ndarray, " n"]) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        """The samples with these numbers, which must share one layout, stacked."""


@runtime_checkable
class _Array(Protocol):
    """What is asked of an array, be it on disk or in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, rows: Any, /) -> Any: ...  # noqa: ANN401 (NumPy's own signature)


@dataclass(frozen=True, slots=True)
class DiskArray:
    """An uncompressed array inside a file; only the rows asked for are read."""

    path: Path
    offset_bytes: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]

    def __getitem__(self, rows: Int[np.ndarray, " n"]) -> Shaped[np.ndarray, "n ..."]:
        # Mapped anew each time: pages of a lasting map would stay in memory once they were read.
        whole = np.memmap(self.path, self.dtype, "r", self.offset_bytes, self.shape, self.order)
        return np.asarray(whole[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    """One array per input, samples along the first axis."""

    arrays: Mapping[str, _Array]
    shared: Layout
    samples: int
    labels: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.samples

    def layout(self, index: int) -> Layout:
        """The same for every sample."""
        return self.shared

    def name(self, index: int) -> str:
        """A sample's row, counted from 0."""
        return f"sample {index}"

    def read(self, indices: Int[np.ndarray, " n"]) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        """Those rows of every array."""
        return {name: array[indices] for name, array in self.arrays.items()}


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

    def name(self, index: int) -> str:
        """A picture's file."""
        return str(self.files[index])

    def read(self, indices: Int[np.ndarray, " n"]) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        """The pictures, resized, cropped and normalised."""
        pictures = [self.preprocessing.apply(_picture(self.files[index])) for index in indices]
        return {self.preprocessing.input: np.stack(pictures)}


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


def open_noise(specs: Layout, *, samples: int, seed: int) -> Arrays:
    """Random samples: standard normal numbers, and zeros and ones for integers.

    Raises:
        DataError: If a shape is not known but for its first axis.
    """
    for spec in specs:
        if None in spec.shape[1:]:
            raise DataError(
                f"random samples need sizes, and the model leaves some of its input {spec.name!r} "
                "open; write a .npz with random arrays of the shape you want"
            )
    rng = np.random.default_rng(seed)
    return _arrays("random", {spec.name: _noise(rng, samples, spec) for spec in specs})


def open_npy(path: Path, name: str) -> Arrays:
    """The rows of a ``.npy`` file as samples of one input.

    Raises:
        DataError: If the file is not a plain array, or has no rows.
    """
    with path.open("rb") as stream:
        array = _disk_array(path, stream, start=0, what=str(path))
    size_bytes = path.stat().st_size
    whole_bytes = array.offset_bytes + array.dtype.itemsize * math.prod(array.shape)
    if size_bytes < whole_bytes:
        raise DataError(
            f"{path} is cut short: it has {size_bytes} of {whole_bytes} bytes; write it again"
        )
    return _arrays(str(path), {name: array})


def open_npz(path: Path) -> Arrays:
    """The rows of a ``.npz`` file; its keys name the inputs.

    Arrays that are not compressed stay on disk; the others have to be held in memory.

    Raises:
        DataError: If it is not an archive of plain arrays, each with the same number of rows.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            arrays = {
                entry.filename.removesuffix(".npy"): _member(path, archive, raw, entry)
                for entry in archive.infolist()
            }
    except zipfile.BadZipFile as error:
        raise DataError(
            f"{path} is not a whole .npz archive ({error}); write it again with np.savez"
        ) from error
    return _arrays(str(path), arrays)


def layout_of(where: str, arrays: Mapping[str, _Array]) -> tuple[Layout, int]:
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


def _arrays(where: str, arrays: Mapping[str, _Array]) -> Arrays:
    layout, samples = layout_of(where, arrays)
    if not samples:
        raise DataError(f"{where} has no samples in it; its arrays need at least one row")
    return Arrays(arrays, layout, samples)


def _member(path: Path, archive: zipfile.ZipFile, raw: IO[bytes], entry: zipfile.ZipInfo) -> _Array:
    """One array of an archive: left on disk where its bytes lie there as they are."""
    what = f"{entry.filename.removesuffix('.npy')!r} in {path}"
    raw.seek(entry.header_offset)
    name_bytes, extra_bytes = ZIP_LOCAL_HEADER.unpack(raw.read(ZIP_LOCAL_HEADER.size))
    start = entry.header_offset + ZIP_LOCAL_HEADER.size + name_bytes + extra_bytes
    with archive.open(entry) as stream:
        array = _disk_array(path, stream, start=start, what=what)
    if entry.compress_type == zipfile.ZIP_STORED and 0 not in array.shape:
        return array
    _log.info("%s is compressed and is held in memory; np.savez leaves it on disk", what)
    with archive.open(entry) as stream:
        return npy.read_array(stream, allow_pickle=False)


def _disk_array(path: Path, stream: IO[bytes], *, start: int, what: str) -> DiskArray:
    """Where an array's numbers lie, from its header, which begins ``start`` bytes into the file."""
    try:
        version = npy.read_magic(stream)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = header(stream)
    except ValueError as error:
        raise DataError(f"{what} is not a NumPy array ({error}); write it with np.save") from error
    if dtype.hasobject:
        raise DataError(
            f"{what} holds pickled Python objects, which are not loaded because that would run "
            "code; save plain numbers of one shape (rows of unequal length must be padded)"
        )
    return DiskArray(path, start + stream.tell(), dtype, shape, "F" if fortran else "C")


def _picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        message = f"{path} cannot be read as an image ({error}); repair it or take it away"
        raise DataError(message) from error


def _noise(
    rng: np.random.Generator, samples: int, spec: InputSpec
) -> Shaped[np.ndarray, "{samples} ..."]:
    shape = (samples, *(size for size in spec.shape[1:] if size is not None))
    if np.issubdtype(spec.dtype, np.floating):
        return rng.standard_normal(shape, np.float32).astype(spec.dtype)
    return rng.integers(0, 2, shape).astype(spec.dtype)
