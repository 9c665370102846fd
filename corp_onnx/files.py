"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from corp_onnx.errors import OutputError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft that takes the place of ``path`` once it is complete; else nothing of it is left.

    What is written beside the draft is moved with it, and before it.

    Raises:
        OutputError: If it cannot be written.
    """
    require_writable(path)
    path = path.resolve()  # a link stays one
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            draft = Path(folder) / path.name
            yield draft
            for file in sorted(draft.parent.iterdir(), key=lambda file: file == draft):
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def require_writable(path: Path, read: Iterable[Path] = ()) -> None:
    """Fail before the work, not after it, when a result could not be written to ``path``.

    Args:
        path: Where it would go.
        read: Files whose place it must not take, if they are there.

    Raises:
        OutputError: Saying why not.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; name a file")
    if path.exists() and not path.is_file():
        raise OutputError(f"cannot write {path}: it is a device or a pipe; name a file")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.exists() and any(path.samefile(file) for file in read if file.exists()):
        raise OutputError(f"{path} is a file that is read; name another one to write")
    _require_takes_files(path.parent, path)


def _require_takes_files(folder: Path, path: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {folder} takes no files ({error.strerror or error})"
        ) from error


def require_makeable(folder: Path) -> None:
    """Likewise, when a folder could not be made or takes no files."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    _require_takes_files(nearest, folder)


def made(folder: Path) -> Path:
    """The folder, with those above it, made if it is not there.

    Raises:
        OutputError: If it cannot be made, or takes no files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    _require_takes_files(folder, folder)
    return folder


@contextmanager
def whole_folder(folder: Path, *, log: str, last: str) -> Iterator[Path]:
    """A draft of a folder, whose files take their places once all are complete.

    Else nothing changes, but that the log of what failed is kept.

    Args:
        folder: Made if it is not there.
        log: The name of a file that is kept in any case.
        last: The name of the file that says what the others are.

    Raises:
        OutputError: If they cannot be written.
    """
    above = next(place for place in (folder, *folder.resolve().parents) if place.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=".draft.") as name:
            draft, files = Path(name), [Path(name) / log]
            try:
                yield draft
                files = sorted(draft.iterdir(), key=lambda file: file.name == last)
            finally:
                _move(files, folder)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error


def _move(files: Sequence[Path], folder: Path) -> None:
    """Into the folder, in place of files of these names and of weights beside these."""
    there = [file for file in files if file.is_file()]
    for stale in [each for file in there for each in made(folder).glob(f"{file.name}.*")]:
        stale.unlink()
    for file in there:
        file.replace(folder / file.name)
