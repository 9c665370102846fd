"""Batches for a model, from whatever holds its inputs: pictures, arrays, the user's own code."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped

from corp_onnx.data.arrays import NO_DATA, open_noise, open_npy, open_npz
from corp_onnx.data.batching import batched, filled, subset
from corp_onnx.data.crops import Crops
from corp_onnx.data.fitting import (
    fitted,
    how_to_preprocess,
    only_input,
    require_batchable,
    require_fit,
)
from corp_onnx.data.loaders import is_loader, open_loader
from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.data.stores import Images, Layout, Store, open_images
from corp_onnx.errors import DataError
from corp_onnx.graph.inputs import InputSpec
from corp_onnx.graph.sizes import Sizes

__all__ = ["Dataset", "InputSpec", "open_data"]

_log = logging.getLogger(__name__)

RANDOM_SAMPLES = 128
FORMS = (
    "a folder of images, a .npz (its keys are input names), a .npy (one input), script.py:function "
    "(yields dicts of arrays) or module:Class (with get_next)"
)


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Samples that fit a model, in a fixed order, read when they are taken.

    Attributes:
        store: Where the samples are.
        inputs: The model's inputs, which every batch is fitted to.
        indices: The numbers of these samples in the store.
        source: What the user called the data.
        preprocessing: How whole numbers in uint8 become the model's image input.
    """

    store: Store
    inputs: tuple[InputSpec, ...]
    indices: Int[np.ndarray, " n"]
    source: str
    preprocessing: Preprocessing | None = None

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return len(self.indices)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The class of every sample, in order, where the source has classes."""
        labels = self.store.labels
        return None if labels is None else tuple(labels[index] for index in self.indices)

    @property
    def places(self) -> Int[np.ndarray, " n"]:
        """The number of every sample in the source, in order."""
        return np.array([self.store.place(index) for index in self.indices.tolist()], np.intp)

    @property
    def crops(self) -> float:
        """Inputs made of one picture, on average; 1 where each sample is taken as it is."""
        if not isinstance(self.store, Crops) or not self.samples:
            return 1.0
        return self.samples / len(np.unique(self.indices % len(self.store.pictures)))

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the model takes; None if it takes any."""
        return next((spec.shape[0] for spec in self.inputs if spec.shape[0] is not None), None)

    def batches(
        self, batch_size: int, *, after: int = 0
    ) -> Iterator[dict[str, Shaped[np.ndarray, "b ..."]]]:
        """All samples in order, in batches of at most ``batch_size``.

        A batch holds neighbours of equal shape only, so sequences of different length are never
        merged. A model with a fixed batch size gets batches of just that size, of any samples of
        one shape; those that fill none are left out, and logged. Batches that lie within the first
        ``after`` samples of earlier batches of the same size are not read again.

        Raises:
            DataError: If the samples fill no batch of a fixed size, hold values that the model's
                dtype does not, are not finite, or cannot be read.
        """
        if batch_size < 1:
            raise DataError(f"a batch needs at least one sample, not {batch_size}")
        pieces = self._pieces(batch_size)
        left_out = self.samples - sum(map(len, pieces))
        if left_out:
            _log.warning(
                "the model takes batches of exactly %d samples: %d of the %d in %s fill none and "
                "are left out",
                *(self.fixed_batch, left_out, self.samples, self.source),
            )
        ends = np.cumsum([len(piece) for piece in pieces])
        return map(self._read, pieces[int(np.searchsorted(ends, after, side="right")) :])

    def filling(self) -> Dataset:
        """The samples that batches hold: all, unless the model takes batches of one size only."""
        return replace(self, indices=np.concatenate(self._pieces(1)))

    def arrays(self) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        """All samples at once, for small sets.

        Raises:
            DataError: If they differ in shape, or for what `batches` raises.
        """
        if len({self.store.layout(index) for index in self.indices.tolist()}) > 1:
            raise DataError(
                f"the samples of {self.source} differ in shape and make no single array; take "
                "batches, or pad them all alike"
            )
        return self._read(self.indices)

    def take(self, indices: Sequence[int] | Int[np.ndarray, " k"]) -> Dataset:
        """The samples at these places, in the order given."""
        chosen = self.indices[np.asarray(indices, np.intp)]
        chosen.flags.writeable = False
        return replace(self, indices=chosen)

    def shuffled(self, seed: int) -> Int[np.ndarray, " n"]:
        """The places of all samples in random order; batches of a fixed size stay together.

        Samples that fill no such batch are left out.
        """
        rng = np.random.default_rng(seed)
        if self.fixed_batch is None:
            return rng.permutation(self.samples)
        place = {index: place for place, index in enumerate(self.indices.tolist())}
        pieces = self._pieces(1)
        order = [place[each] for number in rng.permutation(len(pieces)) for each in pieces[number]]
        return np.array(order, np.intp)

    def split(self, share: float, seed: int) -> tuple[Dataset, Dataset]:
        """Two random parts with no sample in common, each in this order.

        Args:
            share: Of the samples, or batches of a fixed size, for the first part; each gets one.
            seed: Of the draw.

        Raises:
            DataError: If the share is not between 0 and 1, or there are too few samples for that.
        """
        batch, order = self.fixed_batch or 1, self.shuffled(seed)
        if not 0 < share < 1 or len(order) < 2 * batch:
            raise DataError(
                f"{self.samples} samples of {self.source} cannot be split with a share of {share}; "
                f"it takes at least {2 * batch} samples and a share between 0 and 1"
            )
        batches = len(order) // batch
        first = min(max(round(share * batches), 1), batches - 1) * batch
        return self.take(np.sort(order[:first])), self.take(np.sort(order[first:]))

    def augmented(self, crops: int, seed: int, *, most: int | None = None) -> Dataset:
        """Every picture ``crops`` times: plain first, then random crops, half of them mirrored.

        All pictures come once before any comes again. Samples that are no pictures stay as they
        are. Split before, not after: otherwise both parts get crops of the same picture.

        Args:
            crops: Inputs to make of every picture.
            seed: Decides, with the number of the picture in its folder, what the crops show.
            most: Inputs beyond which no crop is added; every picture is there once.

        Raises:
            DataError: If there are fewer crops than one.
        """
        if crops < 1:
            raise DataError(f"at least one crop of every picture is needed, not {crops}")
        if crops == 1 or not isinstance(self.store, Images):
            return self
        indices = (np.arange(crops)[:, None] * len(self.store) + self.indices).reshape(-1)
        if most is not None:
            indices = indices[: max(most, self.samples)]
        indices.flags.writeable = False
        return replace(self, store=Crops(self.store, crops, seed), indices=indices)

    def _pieces(self, batch_size: int) -> list[Int[np.ndarray, " b"]]:
        """The samples of every batch."""
        fixed, indices = self.fixed_batch, self.indices.tolist()
        if fixed is None:
            return batched(indices, self.store.layout, batch_size)
        full = filled(indices, self.store.layout, fixed)
        if not full:
            raise DataError(
                f"the model takes batches of exactly {fixed} samples, which the {self.samples} of "
                f"{self.source} do not fill; give more samples of one shape, or export the model "
                "with a dynamic batch"
            )
        return full

    def _read(self, piece: Int[np.ndarray, " b"]) -> dict[str, Shaped[np.ndarray, "b ..."]]:
        raw = self.store.read(piece)
        return {
            spec.name: fitted(
                spec,
                raw[spec.name],
                preprocessing=self.preprocessing,
                name=lambda row: f"{self.store.name(int(piece[row]))} of {self.source}",
            )
            for spec in self.inputs
        }


def open_data(
    source: str,
    inputs: Sequence[InputSpec],
    *,
    preprocessing: Preprocessing | None = None,
    samples: int | None = None,
    seed: int = 0,
    allow_random: bool = False,
    sizes: Sizes | None = None,
) -> Dataset:
    """Open the data that a user named, and check that they fit the model.

    Args:
        source: A folder of images, a ``.npz``, a ``.npy``, ``script.py:function``,
            ``module:Class``, or ``random``. Folders and uncompressed arrays are read as batches are
            taken; a function or a class is run to its end, here and once.
        inputs: The model's inputs.
        preprocessing: How pictures become the model's image input.
        samples: Use a random subset of this many, where there are more.
        seed: Of the subset, and of random data.
        allow_random: Let ``random`` stand for random numbers.
        sizes: Dimensions of these, where the model leaves them open.

    Returns:
        At least one sample, and at least one full batch for a model with a fixed batch size.

    Raises:
        DataError: If there are no such data, or they do not fit; says what to do.
    """
    if samples is not None and samples < 1:
        raise DataError(f"at least one sample is needed, not {samples}")
    specs = tuple(inputs)
    require_batchable(specs)
    check = partial(require_fit, source, inputs=specs, preprocessing=preprocessing)
    if source == "random":
        if not allow_random:
            raise DataError(NO_DATA)
        count = samples or RANDOM_SAMPLES
        store: Store = open_noise(specs, samples=count, seed=seed, sizes=sizes or {})
    elif is_loader(source) and not Path(source).exists():
        store = open_loader(source, check=check, samples=samples, seed=seed)
    else:
        store = _open_path(source, specs, preprocessing)
        check(store.layout(0))
    indices = subset(source, len(store), samples, seed)
    dataset = Dataset(store, specs, indices, source, preprocessing)
    dataset._pieces(1)  # raises if a fixed batch size is never filled
    return dataset


def _open_path(source: str, specs: Layout, preprocessing: Preprocessing | None) -> Store:
    path = Path(source)
    if not source or not path.exists():
        raise DataError(f"there are no data at {source!r}; give {FORMS}")
    if path.is_dir():
        return _open_folder(path, specs, preprocessing)
    match path.suffix.lower():
        case ".npz":
            return open_npz(path)
        case ".npy":
            return open_npy(path, only_input(source, "a .npy holds", specs))
    raise DataError(f"{source} is not of a kind that can be read; give {FORMS}")


def _open_folder(path: Path, specs: Layout, preprocessing: Preprocessing | None) -> Store:
    name = only_input(str(path), "a folder of images holds", specs)
    if preprocessing is None:
        raise DataError(how_to_preprocess(path, specs[0]))
    if preprocessing.input != name:
        raise DataError(
            f"the preprocessing is for an input {preprocessing.input!r}, but the model's input is "
            f"{name!r}; correct `input` in its .preprocessing.json"
        )
    return open_images(path, preprocessing)
