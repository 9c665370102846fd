"""What a cut costs as models grow: one network, trained alike in three sizes.

``python -m tools.train_fashion_family SIZE --out .assets/family`` makes each of them, on a GPU.
They are cut alike, with the same calibration images of the training split, and judged on the whole
test split.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

from benchmarks.methods import BEST, CORP, PUBLISHED, cut, solution
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.subjects import CUTS, Subject, classifier
from corp_onnx.blocks import Axis
from corp_onnx.errors import BackendUnavailable, DataError
from corp_onnx.plan import uniform
from corp_onnx.providers import CUDA, EXACT
from corp_onnx.session import Runtime, require_providers
from corp_onnx.verify.checks import Check

log = logging.getLogger(__name__)

MODELS = ("1M", "5M", "20M")
"""By millions of parameters, from the smallest."""

CALIBRATED, SEED = 1024, 0
DEEP: Mapping[str, dict[Axis, float]] = {
    "both": CUTS["both"],
    "both, 75 %": {"mlp": 0.75, "qk": 0.75},
    "all three": CUTS["all three"],
}
METHODS = (PUBLISHED, CORP, BEST)


def measure(place: Place) -> Outcome:
    """Every cut of every size that was trained, by every method."""
    folder = place.assets / "family"
    asked = [place.only] if place.only else MODELS
    names = [name for name in asked if (folder / f"{name}.onnx").is_file()]
    if not names:
        raise DataError(
            f"{folder} holds none of {', '.join(asked)}; train each on a GPU with `python -m "
            f"tools.train_fashion_family SIZE --data {place.assets / 'fashion-mnist'} --out "
            f"{folder}`"
        )
    rows = [row for name in names for row in _rows(name, _subject(place, folder, name).known())]
    settings = {"calibration": CALIBRATED, "missing": [name for name in asked if name not in names]}
    return Outcome({"Fashion ViT by size": rows}, tuple(_checks(rows)), settings)


def _subject(place: Place, folder: Path, name: str) -> Subject:
    files = (folder / f"{name}.onnx", folder / "calibration.npz", folder / "test.npz")
    return classifier(place, f"Fashion ViT, {name}", files, CALIBRATED, SEED, _runtime())


def _runtime() -> Runtime:
    """On the GPU where there is one."""
    try:
        require_providers(CUDA)
    except BackendUnavailable:
        return Runtime()
    return Runtime(CUDA, provider_options=EXACT)


def _rows(name: str, subject: Subject) -> Iterator[Row]:
    """Accuracies, and how much of them a cut takes."""
    dense = subject.accuracies()["top-1"]
    log.info("%s, dense: %.4f", name, dense)
    statistics = subject.statistics()
    for kind, shares in DEEP.items():
        plan = uniform(subject.catalog, shares)
        for method in METHODS:
            if method == PUBLISHED and "vo" in shares:
                continue  # the paper leaves values alone
            found = subject.measured(cut(subject, solution(subject, plan, method, statistics)))
            row = {"size": name, "dense": dense, "cut": kind, "method": method, **found}
            log.info("%s", row)
            yield row | {"loss": dense - found["top-1"]}


def _checks(rows: list[Row]) -> Iterator[Check]:
    """Whether the logits of a larger model change less."""
    for kind in DEEP:
        for method in METHODS:
            errors = [row["error"] for row in rows if (row["cut"], row["method"]) == (kind, method)]
            if len(errors) > 1:
                falls = all(small > large for small, large in pairwise(errors))
                found = ", ".join(f"{error:.3f}" for error in errors)
                yield Check(f"{kind}, {method}: the error falls as models grow", falls, found)
