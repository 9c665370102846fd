"""Pictures by class, as ImageNet keeps them: listed, drawn evenly, kept apart, linked together."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corp_onnx.data.stores import IMAGE_SUFFIXES
from corp_onnx.errors import DataError

log = logging.getLogger(__name__)

TRAIN, VAL, LABELS = "train", "val", "val.txt"


@dataclass(frozen=True, slots=True)
class Picture:
    """A file and the class of what it shows."""

    path: Path
    wnid: str


@dataclass(frozen=True, slots=True)
class Part:
    """The pictures of a folder by class: their paths in the folder, sorted."""

    folder: Path
    by_class: Mapping[str, tuple[str, ...]]

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(map(len, self.by_class.values()))


@dataclass(frozen=True, slots=True)
class Pictures:
    """All pictures of a folder with ``train`` and ``val``.

    Attributes:
        classes: Every class; its place is the number that a model gives it, for timm's ImageNet
            models count WordNet's numbers (wnids) in sorted order.
        train: To draw the calibration pictures from.
        val: To test with.
    """

    classes: tuple[str, ...]
    train: Part
    val: Part


def open_pictures(folder: Path, labels: Path | None = None) -> Pictures:
    """Read the names of ``train/<wnid>/*`` and of ``val/<wnid>/*`` or ``val/*``.

    Args:
        folder: Where ``train`` and ``val`` lie. The classes are all that either has.
        labels: Of a flat ``val``; ``<folder>/val.txt`` by default. Every line begins with the name
            of a picture, with or without its suffix, and its class, separated by a space or a
            comma. The class is a wnid, or its place among all in sorted order, from 0.

    Raises:
        DataError: If a part is missing or empty, both are one, or a picture has no known class.
    """
    train, val = folder / TRAIN, folder / VAL
    for part in (train, val):
        if not part.is_dir():
            raise DataError(f"{folder} has no folder {part.name!r}; give the one that has both")
    if train.resolve() == val.resolve():
        raise DataError(f"{train} and {val} are one folder; calibrate on other pictures than val's")
    learnt, tested = _sorted(train), _sorted(val)
    if not learnt.count:
        raise DataError(f"{train} has no pictures in subfolders, one for each class")
    classes = tuple(sorted(learnt.by_class.keys() | tested.by_class.keys()))
    if not tested.count:
        tested = _labelled(val, labels or folder / LABELS, classes)
    return Pictures(classes, learnt, tested)


def drawn(part: Part, count: int, seed: int) -> tuple[Picture, ...]:
    """So many pictures at random, evenly over the classes: their numbers differ by one at most.

    A class that has fewer gives all it has. If there are not so many, all are taken.
    """
    if count > part.count:
        log.warning("%s has %d pictures, not the %d asked for", part.folder, part.count, count)
    return tuple(itertools.islice(_in_turn(part, np.random.default_rng(seed)), count))


def apart(pictures: Sequence[Picture], others: Sequence[Picture]) -> tuple[Picture, ...]:
    """Those that are no copy, byte for byte, of any of the others.

    Raises:
        DataError: If none are left.
    """
    sizes = {_size(picture) for picture in pictures}
    taken = {_digest(other) for other in others if _size(other) in sizes}
    kept = tuple(picture for picture in pictures if _digest(picture) not in taken)
    if not kept:
        raise DataError("every picture drawn to calibrate on is in the test set as well")
    return kept


def linked(pictures: Iterable[Picture], folder: Path) -> Path:
    """A folder of links to the pictures, in a subfolder for each class."""
    for picture in pictures:
        link = folder / picture.wnid / picture.path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(picture.path.absolute())
    return folder


def _in_turn(part: Part, rng: np.random.Generator) -> Iterator[Picture]:
    """One picture of every class, then a second of every class that has it, and so on."""
    orders = {wnid: rng.permutation(len(names)) for wnid, names in sorted(part.by_class.items())}
    wnids = rng.permutation(list(orders)).tolist()
    for turn in range(max(map(len, orders.values()))):
        for wnid in wnids:
            if turn < len(orders[wnid]):
                yield Picture(part.folder / part.by_class[wnid][orders[wnid][turn]], wnid)


def _sorted(folder: Path) -> Part:
    """The pictures in the subfolders of a folder."""
    subfolders = sorted(path.name for path in folder.iterdir() if _is_seen(path) and path.is_dir())
    names = {wnid: tuple(f"{wnid}/{name}" for name in _names(folder / wnid)) for wnid in subfolders}
    return Part(folder, {wnid: found for wnid, found in names.items() if found})


def _names(folder: Path) -> list[str]:
    """The names of the pictures in a folder itself, sorted."""
    files = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path.name for path in files if _is_seen(path))


def _is_seen(path: Path) -> bool:
    return not path.name.startswith(".")


def _labelled(folder: Path, labels: Path, classes: Sequence[str]) -> Part:
    """The pictures in a folder itself, each with the class that a file of labels names."""
    names = _names(folder)
    if not names:
        raise DataError(f"{folder} has no pictures, neither in it nor in subfolders by class")
    if not labels.is_file():
        raise DataError(
            f"the pictures in {folder} are not in subfolders by class, and there is no {labels}; "
            "sort them, or give a file with a line `NAME WNID` for each with --labels"
        )
    known = _read(labels)
    by_class: dict[str, list[str]] = {}
    for name in names:
        stem = Path(name).stem
        if stem not in known:
            raise DataError(f"{labels} says nothing of {name}; it needs a line for each picture")
        by_class.setdefault(_class(known[stem], labels, classes), []).append(name)
    return Part(folder, {wnid: tuple(found) for wnid, found in by_class.items()})


def _read(labels: Path) -> dict[str, str]:
    """The class of every picture by its name without suffix, as it is written."""
    words = [line.replace(",", " ").split() for line in labels.read_text("utf-8").splitlines()]
    if any(len(line) == 1 for line in words):
        raise DataError(
            f"{labels} has lines with one word only, not a picture's name and its class; the "
            "numbers of ImageNet's development kit are in an order of their own: write wnids"
        )
    return {Path(line[0]).stem: line[1] for line in words if line}


def _class(text: str, labels: Path, classes: Sequence[str]) -> str:
    if text.isdigit() and int(text) < len(classes):
        return classes[int(text)]
    if text not in classes:
        raise DataError(f"{labels} names a class {text}, which {TRAIN} does not have")
    return text


def _size(picture: Picture) -> int:
    return picture.path.stat().st_size


def _digest(picture: Picture) -> bytes:
    return hashlib.sha256(picture.path.read_bytes()).digest()
