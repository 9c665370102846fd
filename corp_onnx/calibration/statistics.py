"""What flows through each axis, gathered once and kept in a file for every later question."""

from __future__ import annotations

import itertools
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy.lib import format as npy

from corp_onnx.calibration.moments import Moments
from corp_onnx.data.batching import Batch
from corp_onnx.errors import DataError
from corp_onnx.files import whole

FORMAT = 2


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Moments of every site of a dense model, over ``samples`` calibration samples.

    Sites are named ``<block>.hidden`` (an MLP's hidden vector), ``<block>.query`` and
    ``<block>.key`` (operands as they enter the logits product, one set of moments per head),
    ``<block>.centred_key`` (keys less their mean over the sequence), and ``<block>.context`` (mixed
    values as they enter the output projection).
    """

    sites: Mapping[str, Moments]
    energies: Mapping[str, Float64[np.ndarray, "h e"]]
    """Per attention block the mean of ``q_j² k_j²`` over tokens, the paper's query-key energy."""
    tokens: Mapping[str, int]
    """How many tokens each energy is the mean of."""
    samples: int
    source: str
    sha256: str
    """Of the model that the statistics were taken of."""
    seen: tuple[Batch, ...] = ()
    """A few of the calibration batches, to hold promises against what is measured."""
    held_out: tuple[Batch, ...] = ()
    """Batches that no statistic has seen, to verify with."""
    crops: float = 1.0
    """How many of the samples were made of one picture, on average."""

    def require_of(self, sha256: str) -> None:
        """See whether they are of the model of this fingerprint.

        Raises:
            DataError: If they are of another.
        """
        if self.sha256 != sha256:
            raise DataError(
                f"the statistics ({self.source}) were taken of another model; calibrate this one"
            )

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics of both sets of samples together.

        Raises:
            DataError: If they were taken of different models.
        """
        if not other.samples:
            return self
        if self.sha256 != other.sha256 or self.sites.keys() != other.sites.keys():
            raise DataError(
                f"the statistics of {self.source} and {other.source} were taken of different "
                "models; calibrate both on the same file"
            )
        tokens = {name: count + other.tokens[name] for name, count in self.tokens.items()}
        energies = {
            name: (energy * self.tokens[name] + other.energies[name] * other.tokens[name])
            / tokens[name]
            for name, energy in self.energies.items()
        }
        return Statistics(
            {name: moments + other.sites[name] for name, moments in self.sites.items()},
            energies,
            tokens,
            self.samples + other.samples,
            self.source if self.source == other.source else f"{self.source}, {other.source}",
            self.sha256,
            _mixed(self.seen, other.seen),
            _mixed(self.held_out, other.held_out),
            max(self.crops, other.crops),
        )

    def save(self, path: Path) -> None:
        """Write the statistics whole or not at all.

        Raises:
            OutputError: If they cannot be written.
        """
        arrays: dict[str, np.ndarray] = {}
        for name, moments in self.sites.items():
            arrays[f"mean/{name}"] = moments.mean
            arrays[f"scatter/{name}"] = _pack(moments.scatter)
        arrays |= {f"energy/{name}": energy for name, energy in self.energies.items()}
        arrays |= _flatten("seen", self.seen) | _flatten("held_out", self.held_out)
        about = {
            "format": FORMAT,
            "counts": {name: moments.count for name, moments in self.sites.items()},
            "tokens": dict(self.tokens),
            "samples": self.samples,
            "source": self.source,
            "sha256": self.sha256,
            "crops": self.crops,
        }
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        with whole(path) as draft, draft.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: Path) -> Statistics:
        """Read statistics that `save` wrote.

        Raises:
            DataError: If the file is missing or holds something else.
        """
        if not path.is_file():
            raise DataError(f"{path} does not exist; make it with `corp-onnx calibrate`")
        try:
            with zipfile.ZipFile(path) as archive:
                arrays = {
                    name.removesuffix(".npy"): _array(archive, name) for name in archive.namelist()
                }
            about = json.loads(arrays.pop("about").tobytes())
            if about["format"] != FORMAT:
                raise DataError(
                    f"{path} was written in format {about['format']}, this version reads {FORMAT}; "
                    "calibrate again"
                )
            return _assembled(about, arrays)
        except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, TypeError, EOFError) as error:
            raise DataError(
                f"{path} holds no calibration statistics, or only a part ({error}); make it again "
                "with `corp-onnx calibrate`"
            ) from error


def _assembled(about: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Statistics:
    """What `save` took apart."""
    return Statistics(
        {
            name: Moments(count, mean, _unpack(arrays[f"scatter/{name}"], mean.shape))
            for name, count in about["counts"].items()
            for mean in [arrays[f"mean/{name}"]]
        },
        {name: arrays[f"energy/{name}"] for name in about["tokens"]},
        about["tokens"],
        about["samples"],
        about["source"],
        about["sha256"],
        _unflatten("seen", arrays),
        _unflatten("held_out", arrays),
        about.get("crops", 1),
    )


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as stream:
        return npy.read_array(stream, allow_pickle=False)


def _mixed(*parts: tuple[Batch, ...]) -> tuple[Batch, ...]:
    """Batches of all in turn, no more than the longest has."""
    turns = itertools.zip_longest(*parts)
    mixed = [batch for turn in turns for batch in turn if batch is not None]
    return tuple(mixed[: max(map(len, parts))])


def merged(parts: Iterable[Statistics]) -> Statistics:
    """All parts together; there is at least one.

    Raises:
        DataError: If one of them is there twice, or they are of different models.
    """
    samples: list[tuple[tuple[Batch, ...], tuple[Batch, ...]]] = []
    means: set[bytes] = set()
    together: Statistics | None = None
    for part in parts:
        mean = b"".join(moments.mean.tobytes() for moments in part.sites.values())
        if mean in means:
            raise DataError(
                f"statistics of {part.source} are given twice; samples count once, so give every "
                "file once"
            )
        means.add(mean)
        samples.append((part.seen, part.held_out))
        together = part if together is None else together + part
    assert together is not None, "there is one"
    seen, held_out = (_mixed(*batches) for batches in zip(*samples, strict=True))
    return replace(together, seen=seen, held_out=held_out)


def _pack(scatter: Float64[np.ndarray, "*h d d"]) -> Float64[np.ndarray, "*h t"]:
    """The upper triangle, which is all of a symmetric matrix."""
    rows, columns = np.triu_indices(scatter.shape[-1])
    return scatter[..., rows, columns]


def _unpack(
    packed: Float64[np.ndarray, "*h t"], shape: tuple[int, ...]
) -> Float64[np.ndarray, "*h d d"]:
    """The whole matrices of a mean of this shape."""
    rows, columns = np.triu_indices(shape[-1])
    scatter = np.empty((*shape, shape[-1]))
    scatter[..., rows, columns] = packed
    scatter[..., columns, rows] = packed
    scatter.setflags(write=False)
    return scatter


def _flatten(role: str, batches: tuple[Batch, ...]) -> dict[str, np.ndarray]:
    return {
        f"{role}/{index}/{name}": array
        for index, batch in enumerate(batches)
        for name, array in batch.items()
    }


def _unflatten(role: str, arrays: Mapping[str, np.ndarray]) -> tuple[Batch, ...]:
    batches: dict[int, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        kind, _, rest = key.partition("/")
        if kind == role:
            index, _, name = rest.partition("/")
            batches.setdefault(int(index), {})[name] = array
    return tuple(batches[index] for index in sorted(batches))
