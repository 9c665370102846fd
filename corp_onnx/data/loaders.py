"""Batches from the user's own code: a function that yields them, or a class with ``get_next``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import logging
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Int, Shaped

from corp_onnx.data.stores import Layout, layout_of
from corp_onnx.errors import CorpError, DataError

_log = logging.getLogger(__name__)

END = object()
LIBRARIES = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), "<")
"""How paths begin of code that is not the user's, frozen modules included."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One row of a batch that was yielded, and its place among all rows, counted from 0."""

    position: int
    layout: Layout
    arrays: Mapping[str, Shaped[np.ndarray, "..."]]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Samples kept in memory, each with the layout of the batch it came in."""

    samples: tuple[Sample, ...]
    labels: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def layout(self, index: int) -> Layout:
        """That of the batch it came in."""
        return self.samples[index].layout

    def place(self, index: int) -> int:
        """A sample's place among all that were yielded, counted from 0."""
        return self.samples[index].position

    def name(self, index: int) -> str:
        """That place, in words."""
        return f"sample {self.place(index)}"

    def read(self, indices: Int[np.ndarray, " n"]) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        """Those rows, stacked."""
        chosen = [self.samples[index].arrays for index in indices]
        return {name: np.stack([arrays[name] for arrays in chosen]) for name in chosen[0]}


def is_loader(source: str) -> bool:
    """Whether a source has the form ``script.py:name`` or ``package.module:name``."""
    place, colon, name = source.rpartition(":")
    dotted = all(part.isidentifier() for part in place.split("."))
    return bool(colon) and name.isidentifier() and (dotted or place.endswith(".py"))


def open_loader(
    source: str, *, check: Callable[[Layout], None], samples: int | None, seed: int
) -> Rows:
    """Run the user's loader to its end, and keep ``samples`` of what it yields (None: all).

    What is kept is a uniform random subset, drawn while the loader runs (reservoir sampling, Vitter
    1985, algorithm R), so memory holds no more than that.

    Args:
        source: ``script.py:name`` or ``package.module:name``; modules are also looked for in the
            working directory. The name is a function that yields dicts of arrays, each a batch, or
            a class or object whose ``get_next`` gives such a dict, and None after the last.
        check: Called with every layout when it is first met; raises if it does not fit the model.
        samples: How many samples to keep.
        seed: Of the draw.

    Raises:
        DataError: If there is no such loader, or it yields something else, or nothing, or raises
            an error itself.
    """
    place, _, name = source.rpartition(":")
    script = Path(place) if place.endswith(".py") else None
    with importable(Path.cwd() if script is None else script.resolve().parent):
        with _Blamed(place):
            module = _import_module(place) if script is None else _run_script(script)
        batches = _batches(source, _find(source, module, name))
        return _drain(source, batches, check=check, samples=samples, seed=seed)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let the user's code import what lies beside it, in this folder."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"the module {name} cannot be imported ({error}); install what is missing, or run from "
            f"the folder that {name.partition('.')[0]!r} is in"
        ) from error


def _run_script(path: Path) -> ModuleType:
    name = f"_corp_onnx_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise DataError(f"the script {path} does not exist; check the path before the colon")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the script look their module up there
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise DataError(
            f"{path} imports something that is missing ({error}); install it in this environment"
        ) from error
    return module


@dataclass(frozen=True, slots=True)
class _Blamed:
    """What the user's code raises within becomes an error that says where it was raised."""

    source: str

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, CorpError):
            return
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)] or frames
        where = f"{Path(own[-1].filename).name}, line {own[-1].lineno}"
        raise DataError(
            f"{self.source} raised {type(error).__name__}: {error} ({where})"
        ) from error


def _find(source: str, module: ModuleType, name: str) -> object:
    try:
        return getattr(module, name)
    except AttributeError as error:
        found = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise DataError(
            f"{source}: there is no {name!r} in it; callable there: {', '.join(found) or 'nothing'}"
        ) from error


def _batches(source: str, loader: object) -> Iterable[object]:
    """What a loader yields, by either convention."""
    if isinstance(loader, type):
        loader = _called(source, loader)
    get_next = getattr(loader, "get_next", None)
    if get_next is not None:
        return _until_none(get_next)
    batches = _called(source, loader)
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise DataError(
            f"{source} returned a {type(batches).__name__}; it must yield dicts of arrays, one per "
            "batch, or return a list of them"
        )
    return batches


def _called(source: str, loader: object) -> object:
    if not callable(loader):
        raise DataError(
            f"{source} is a {type(loader).__name__}, neither a function that yields batches nor a "
            "class with get_next"
        )
    try:
        inspect.signature(loader).bind()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{source} cannot be called without arguments ({error}); wrap it in a function that "
            "takes none"
        ) from error
    with _Blamed(source):
        return loader()


def _until_none(get_next: Callable[[], object]) -> Iterator[object]:
    while (batch := get_next()) is not None:
        yield batch


def _blamed(source: str, batches: Iterable[object]) -> Iterator[object]:
    """All of them; what is raised on the way is the loader's."""
    with _Blamed(source):
        iterator = iter(batches)
    while True:
        with _Blamed(source):
            batch = next(iterator, END)
        if batch is END:
            return
        yield batch


def _drain(
    source: str,
    batches: Iterable[object],
    *,
    check: Callable[[Layout], None],
    samples: int | None,
    seed: int,
) -> Rows:
    kept: dict[int, Sample] = {}
    position = -1
    for position, ((layout, arrays), slot) in enumerate(
        zip(_rows(source, batches, check), _slots(samples, seed), strict=False)
    ):
        if slot is not None:
            owned = {name: np.array(array) for name, array in arrays.items()}
            kept[slot] = Sample(position, layout, owned)
    if position < 0:
        raise DataError(f"{source} ended without yielding a sample; it must yield at least one")
    _log.info("%s yielded %d samples, %d are kept", source, position + 1, len(kept))
    return Rows(tuple(sorted(kept.values(), key=lambda sample: sample.position)))


def _slots(size: int | None, seed: int) -> Iterator[int | None]:
    """Where each item of a stream goes in a reservoir of some size; None: nowhere."""
    rng = np.random.default_rng(seed)
    for position in itertools.count():
        if size is None or position < size:
            yield position
        else:
            slot = int(rng.integers(position + 1))
            yield slot if slot < size else None


def _rows(
    source: str, batches: Iterable[object], check: Callable[[Layout], None]
) -> Iterator[tuple[Layout, Mapping[str, Shaped[np.ndarray, "..."]]]]:
    """Single samples, as views of a batch whose buffers the loader may fill again."""
    layouts: dict[Layout, Layout] = {}
    for number, batch in enumerate(_blamed(source, batches)):
        where = f"batch {number} of {source}"
        arrays = _require_arrays(where, batch)
        layout, count = layout_of(where, arrays)
        if layout not in layouts:
            check(layout)
        layout = layouts.setdefault(layout, layout)
        for row in range(count):
            yield layout, {name: array[row] for name, array in arrays.items()}


def _require_arrays(where: str, batch: object) -> dict[str, Shaped[np.ndarray, "..."]]:
    if not isinstance(batch, Mapping) or not all(isinstance(name, str) for name in batch):
        raise DataError(
            f"{where} is a {type(batch).__name__}; it must be a dict of input names to NumPy arrays"
        )
    for name, value in batch.items():
        if not isinstance(value, np.ndarray) or value.dtype.hasobject:
            kind = "an object array" if isinstance(value, np.ndarray) else type(value).__name__
            raise DataError(
                f"{where}: {name!r} is {kind}, not a plain NumPy array; convert it, a torch tensor "
                "with .cpu().numpy(), and pad rows of unequal length"
            )
    return dict(batch)
