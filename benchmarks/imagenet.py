"""The paper's table of DeiT on your ImageNet: ``python -m benchmarks.imagenet --imagenet FOLDER``.

The model is exported with weights that timm has downloaded before, or with a checkpoint. Dense or
cut, calibrated or tested, every picture goes through the one preprocessing that the export writes.
Calibration pictures come from ``train``, evenly over the classes; ``val`` is for testing alone.
Every cut is a whole run of what ``corp-onnx prune`` does; all cut models are then tested side by
side. Accuracies are of the highest of all logits, errors ``‖y - ŷ‖² / ‖y‖²`` of the logits,
multiply-adds those of one picture in linear layers and attention products.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from benchmarks import machine
from benchmarks.outcome import Outcome
from benchmarks.pictures import Picture, Pictures, apart, drawn, linked, open_pictures
from benchmarks.published import PUBLISHED, SOURCE, CutModel, Measured, accuracy, checks, cost
from benchmarks.report import RESULTS, Heading, report, status_of
from corp_onnx.blocks import Axis
from corp_onnx.commands import Source
from corp_onnx.data.batching import Batch
from corp_onnx.data.dataset import Dataset
from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.errors import BackendUnavailable, DataError
from corp_onnx.export import export
from corp_onnx.pipeline import Settings, prune
from corp_onnx.session import CPU, Runtime, open_session
from corp_onnx.solve import METHODS, Method, Recipe
from corp_onnx.verify.comparison import compare_each

log = logging.getLogger("benchmarks.imagenet")

CUTS: Mapping[str, tuple[Axis, ...]] = {"mlp": ("mlp",), "qk": ("qk",), "both": ("mlp", "qk")}

BATCH, LOGGED_EVERY = 32, 5_000

ABOUT = "top-1 of a cut model on ImageNet, against the published one"
PACKAGES = ("torch", "timm", "pillow")


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for, of one model."""

    model: str
    imagenet: Path
    checkpoint: Path | None
    labels: Path | None
    calibration: int
    limit: int | None
    cuts: tuple[str, ...]
    methods: tuple[Method, ...]
    share: float
    seed: int
    runtime: Runtime


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """A dense model with the pictures that it is calibrated and tested on."""

    path: Path
    recipe: Preprocessing
    calibration: Dataset
    test: Dataset
    labels: tuple[int, ...]


def main(argv: Sequence[str]) -> int:
    """Measure every model that is named; 0 if all checks hold."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when timm is first imported
    parser = _parser()
    asked = parser.parse_args(argv)
    if asked.checkpoint is not None and len(asked.models) > 1:
        parser.error("a checkpoint is of one model; name it alone with --models")
    return status_of(lambda: max([_reported(model, asked, argv) for model in asked.models]))


def _reported(model: str, asked: argparse.Namespace, argv: Sequence[str]) -> int:
    own = vars(asked) | {"model": model, "runtime": Runtime(tuple(asked.providers))}
    request = Request(**{name: own[name] for name in Request.__slots__})
    name = f"imagenet-{machine.slug(model)}"
    heading = Heading(name, ABOUT, PACKAGES, ("benchmarks.imagenet", *argv))
    return report(heading, lambda: measure(request), asked.out)


def measure(request: Request) -> Outcome:
    """Cut one model in every way that is asked for, and test the results side by side."""
    pictures = open_pictures(request.imagenet, request.labels)
    test = drawn(pictures.val, request.limit or pictures.val.count, request.seed)
    wanted = drawn(pictures.train, request.calibration, request.seed)
    calibration = apart(wanted, test)
    with tempfile.TemporaryDirectory() as name:
        subject = _prepared(request, pictures, calibration, test, Path(name))
        asked = [(cut, method) for cut in request.cuts for method in request.methods]
        cuts = [_made(request, subject, cut, method, Path(name)) for cut, method in asked]
        tested = _tested(request, subject, cuts)
    settings = {
        "share_removed": request.share,
        "seed": request.seed,
        "weights": "timm" if request.checkpoint is None else request.checkpoint.name,
        "preprocessing": asdict(subject.recipe),
        "classes": len(pictures.classes),
        "calibration_pictures": len(calibration),
        "of_these_in_statistics": cuts[0].samples,
        "left_out_because_also_in_test": len(wanted) - len(calibration),
        "test_pictures": len(test),
        "providers": request.runtime.providers,
        "published": SOURCE,
    }
    title = f"{request.model}, {request.share:.0%} removed"
    tables = {
        f"{title}: top-1 in %, drops in points": [
            accuracy(request.model, request.share, one) for one in tested
        ],
        f"{title}: error and cost": [cost(one) for one in tested],
    }
    return Outcome(tables, tuple(checks(request.model, request.share, tested)), settings)


def _prepared(
    request: Request,
    pictures: Pictures,
    calibration: Sequence[Picture],
    test: Sequence[Picture],
    folder: Path,
) -> _Subject:
    """The export, and both sets of pictures opened alike."""
    path = folder / "dense.onnx"
    log.info("exporting %s", request.model)
    try:
        export(f"timm:{request.model}", path, checkpoint=request.checkpoint)
    except BackendUnavailable as error:
        raise BackendUnavailable(
            f"{error}; nothing is downloaded here: let timm fetch the weights before, or give "
            "--checkpoint"
        ) from error
    _require_classes(path, pictures)
    recipe = Preprocessing.beside(path)
    if recipe is None:
        raise DataError(f"timm's preprocessing of {request.model} cannot be said in a recipe")
    session = open_session(path)
    opened = [
        Source(str(linked(part, folder / name))).open(path, session)
        for part, name in ((calibration, "calibration"), (test, "test"))
    ]
    numbers = {wnid: number for number, wnid in enumerate(pictures.classes)}
    labels = tuple(numbers[wnid] for wnid in opened[1].labels or ())
    return _Subject(path, recipe, opened[0], opened[1], labels)


def _require_classes(path: Path, pictures: Pictures) -> None:
    output = onnx.load(path, load_external_data=False).graph.output[0]
    told_apart = output.type.tensor_type.shape.dim[-1].dim_value
    if told_apart != len(pictures.classes):
        raise DataError(
            f"the model tells {told_apart} classes apart, but train and val have "
            f"{len(pictures.classes)}; a class is known by its place among all of them, sorted"
        )


def _made(request: Request, subject: _Subject, cut: str, method: Method, folder: Path) -> CutModel:
    """One cut by one method, as ``corp-onnx prune`` makes it."""
    log.info("%s: cutting %s, method %s", request.model, cut, method)
    file = folder / f"{cut}-{method}.onnx"
    found = prune(
        subject.path,
        file,
        lambda model: subject.calibration,
        shares_removed=dict.fromkeys(CUTS[cut], request.share),
        settings=Settings(recipe=Recipe(method), runtime=request.runtime, seed=request.seed),
    )
    macs = found.surgery.dense.total, found.surgery.pruned.total
    broken = tuple(check.name for check in found.verification.checks if not check.passed)
    seconds = sum(found.seconds.values())
    return CutModel(cut, method, file, macs, broken, found.solved.samples, seconds)


def _tested(request: Request, subject: _Subject, cuts: Sequence[CutModel]) -> list[Measured]:
    """All cut models beside the dense one, in one pass over the test pictures."""
    dense = open_session(subject.path, request.runtime)
    candidates = [open_session(made.file, request.runtime) for made in cuts]
    found = compare_each(dense, candidates, _logged(subject.test), labels=subject.labels)
    return [Measured(made, comparison) for made, comparison in zip(cuts, found, strict=True)]


def _logged(data: Dataset) -> Iterator[Batch]:
    """All batches, with a word on how far they have come."""
    for number, batch in enumerate(data.batches(BATCH)):
        if number * BATCH % LOGGED_EVERY < BATCH:
            log.info("tested on %d of %d pictures", number * BATCH, data.samples)
        yield batch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.imagenet", description=__doc__)
    add = parser.add_argument
    add("--imagenet", type=Path, required=True, help="folder with train/<wnid>/* and val/<wnid>/*")
    add("--models", nargs="+", default=list(PUBLISHED), metavar="NAME", help="timm's names")
    add("--checkpoint", type=Path, help="weights of the one model, instead of timm's")
    add("--labels", type=Path, help="NAME WNID by line, for a flat val; val.txt by default")
    add("--calibration", type=_count, default=1024, help="pictures drawn from train")
    add("--limit", type=_count, help="test on so many pictures only, evenly over the classes")
    add("--cuts", type=_several(CUTS), default=tuple(CUTS), help=",".join(CUTS))
    methods = tuple(reversed(METHODS))  # none first
    add("--methods", type=_several(methods), default=methods, help=",".join(methods))
    add("--share", type=float, default=0.5, help="of every width that is cut, what goes")
    add("--seed", type=int, default=0, help="of every draw")
    add("--providers", type=lambda text: text.split(","), default=CPU, help="of ONNX Runtime")
    add("--out", type=Path, default=RESULTS, help="for results, one file for each model")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"at least one picture is needed, not {number}")
    return number


def _several(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of some of these words, separated by commas."""

    def read(text: str) -> tuple[str, ...]:
        words = tuple(dict.fromkeys(text.split(",")))
        unknown = [word for word in words if word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return words

    return read


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
