"""Arrays as a store of samples: on disk in NumPy's formats, or of random numbers."""

from __future__ import annotations

import logging
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from jaxtyping import Int, Shaped
from numpy.lib import format as npy

from corp_onnx.data.stores import Layout, RowArray, layout_of
from corp_onnx.errors import DataError
from corp_onnx.graph.inputs import InputSpec
from corp_onnx.graph.sizes import Sizes

NO_DATA = (
    "random numbers are no calibration data: their channels have none of the correlations that the "
    "repair is computed from, so the statistics describe no input the model will ever see; give "
    "real inputs, or --allow-random if only the mechanics are of interest"
)

_log = logging.getLogger(__name__)

ZIP_LOCAL_HEADER = struct.Struct("<26xHH")
"""The end of a zip entry's local header: the lengths of its name and of its extra field."""


@dataclass(frozen=True, slots=True)
class DiskArray:
    """An uncompressed array inside a file; only the rows asked for are read."""

    path: Path
    offset_bytes: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]

    def __getitem__(self, rows: Int[np.ndarray, " n"]) -> Shaped[np.ndarray, "n ..."]:
        if 0 in self.shape:  # nothing to map, as in the past of a decoder's first step
            return np.empty((len(rows), *self.shape[1:]), self.dtype)
        # Mapped anew each time: pages of a lasting map would stay in memory once they were read.
        whole = np.memmap(self.path, self.dtype, "r", self.offset_bytes, self.shape, self.order)
        return np.asarray(whole[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    """One array per input, samples along the first axis."""

    arrays: Mapping[str, RowArray]
    shared: Layout
    samples: int
    labels: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.samples

    def layout(self, index: int) -> Layout:
        """The same for every sample."""
        return self.shared

    def place(self, index: int) -> int:
        """Its own number: all rows are in the store."""
        return index

    def name(self, index: int) -> str:
        """A sample's row, counted from 0."""
        return f"sample {index}"

    def read(self, indices: Int[np.ndarray, " n"]) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        """Those rows of every array."""
        return {name: array[indices] for name, array in self.arrays.items()}


def open_npy(path: Path, name: str) -> Arrays:
    """The rows of a ``.npy`` file as samples of one input.

    Raises:
        DataError: If the file is not a plain array, or has no rows.
    """
    with path.open("rb") as stream:
        shape, order, dtype = _header(stream, what=str(path), size_bytes=path.stat().st_size)
        array = DiskArray(path, stream.tell(), dtype, shape, order)
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
    except (zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole .npz archive ({error}); write it again with np.savez"
        ) from error
    return _arrays(str(path), arrays)


def open_noise(specs: Layout, *, samples: int, seed: int, sizes: Sizes) -> Arrays:
    """Random samples: standard normal numbers, and zeros and ones for integers.

    Args:
        specs: The inputs of the model.
        samples: How many.
        seed: Of the numbers.
        sizes: Dimensions of inputs, for those that the model leaves open.

    Raises:
        DataError: If a shape is not known but for its first axis.
    """
    known = [replace(spec, shape=sizes.get(spec.name, spec.shape)) for spec in specs]
    for spec in known:
        if None in spec.shape[1:]:
            raise DataError(
                f"random samples need sizes, and the model leaves some of its input {spec.name!r} "
                "open; say which with --shapes, or write a .npz with random arrays"
            )
    rng = np.random.default_rng(seed)
    return _arrays("random", {spec.name: _noise(rng, samples, spec) for spec in known})


def _arrays(where: str, arrays: Mapping[str, RowArray]) -> Arrays:
    layout, samples = layout_of(where, arrays)
    if not samples:
        raise DataError(f"{where} has no samples in it; its arrays need at least one row")
    return Arrays(arrays, layout, samples)


def _member(
    path: Path, archive: zipfile.ZipFile, raw: IO[bytes], entry: zipfile.ZipInfo
) -> RowArray:
    """One array of an archive: left on disk where its bytes lie there as they are."""
    what = f"{entry.filename.removesuffix('.npy')!r} in {path}"
    with archive.open(entry) as stream:
        shape, order, dtype = _header(stream, what=what, size_bytes=entry.file_size)
        header_bytes = stream.tell()
    if entry.compress_type == zipfile.ZIP_STORED:
        offset_bytes = _start_bytes(raw, entry) + header_bytes
        return DiskArray(path, offset_bytes, dtype, shape, order)
    _log.info("%s is compressed and is held in memory; np.savez leaves it on disk", what)
    with archive.open(entry) as stream:
        return npy.read_array(stream, allow_pickle=False)


def _start_bytes(raw: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an archive's entry begin in its file."""
    raw.seek(entry.header_offset)
    name_bytes, extra_bytes = ZIP_LOCAL_HEADER.unpack(raw.read(ZIP_LOCAL_HEADER.size))
    start: int = entry.header_offset + ZIP_LOCAL_HEADER.size + name_bytes + extra_bytes
    return start


def _header(
    stream: IO[bytes] | BufferedIOBase, *, what: str, size_bytes: int
) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype[Any]]:
    """Shape, order and dtype of the array that a stream of so many bytes should hold."""
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except ValueError as error:
        raise DataError(f"{what} is not a NumPy array ({error}); write it with np.save") from error
    if dtype.hasobject:
        raise DataError(
            f"{what} holds pickled Python objects, which are not loaded because that would run "
            "code; save plain numbers of one shape (rows of unequal length must be padded)"
        )
    whole_bytes = stream.tell() + dtype.itemsize * math.prod(shape)
    if size_bytes < whole_bytes:
        raise DataError(
            f"{what} is cut short: it has {size_bytes} of {whole_bytes} bytes; write it again"
        )
    return shape, "F" if fortran else "C", dtype


def _noise(
    rng: np.random.Generator, samples: int, spec: InputSpec
) -> Shaped[np.ndarray, "{samples} ..."]:
    shape = (samples, *(size for size in spec.shape[1:] if size is not None))
    if np.issubdtype(spec.dtype, np.floating):
        return rng.standard_normal(shape, np.float32).astype(spec.dtype)
    return rng.integers(0, 2, shape).astype(spec.dtype)
