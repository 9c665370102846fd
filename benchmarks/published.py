"""What the paper states for DeiT on ImageNet-1k, and measurements held against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.outcome import Row
from corp_onnx.solve import Method
from corp_onnx.verify.checks import Check
from corp_onnx.verify.comparison import Comparison

SOURCE = "Zhang & Yang, CORP, arXiv 2602.05243"


@dataclass(frozen=True, slots=True)
class Published:
    """Top-1 accuracies in per cent, of the dense model and by cut and share removed."""

    model: str
    dense: float
    pruned: Mapping[tuple[str, float], float]


PUBLISHED: Mapping[str, Published] = {
    "deit_tiny_patch16_224": Published(
        "DeiT-Tiny", 72.02, {("mlp", 0.5): 55.37, ("qk", 0.5): 64.25, ("both", 0.5): 41.36}
    ),
    "deit_small_patch16_224": Published(
        "DeiT-Small", 79.72, {("mlp", 0.5): 69.34, ("qk", 0.5): 72.49, ("both", 0.5): 58.37}
    ),
    "deit_base_patch16_224": Published(
        "DeiT-Base", 81.74, {("mlp", 0.5): 72.00, ("qk", 0.5): 80.80}
    ),
    "deit3_large_patch16_224": Published(
        "DeiT-Large", 84.58, {("mlp", 0.5): 82.05, ("qk", 0.5): 83.61, ("both", 0.5): 80.30}
    ),
    "deit3_huge_patch14_224": Published(
        "DeiT-Huge",
        84.97,
        {
            ("mlp", 0.5): 84.07,
            ("qk", 0.5): 84.18,
            ("both", 0.1): 84.96,
            ("both", 0.2): 84.91,
            ("both", 0.3): 84.66,
            ("both", 0.4): 84.23,
            ("both", 0.5): 83.27,
            ("both", 0.6): 80.98,
            ("both", 0.7): 75.38,
        },
    ),
}
"""By timm's name of the model.

The row of Base with both cut is left out: as printed, it repeats the one with the MLP cut alone.
Large and Huge are taken to be DeiT III, for the first DeiT has no such sizes.
"""

UNREPAIRED: tuple[Method, ...] = ("none", "mean")
"""Methods that are shown for comparison only; the published figures are of a repair."""

STANDARD_ERRORS = 2
"""How many standard errors a figure may lie off the published one."""


@dataclass(frozen=True, slots=True)
class CutModel:
    """One cut by one method, before it is tested.

    ``macs`` are those of one picture, dense and pruned; ``broken`` the checks of `prune` that did
    not hold; ``samples`` and ``seconds`` those of the whole of `prune`.
    """

    cut: str
    method: Method
    file: Path
    macs: tuple[int, int]
    broken: tuple[str, ...]
    samples: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A cut model beside the dense one."""

    made: CutModel
    comparison: Comparison

    @property
    def dense(self) -> float:
        """Top-1 of the dense model in per cent."""
        return 100 * self._top1["dense"]

    @property
    def pruned(self) -> float:
        """Top-1 of the cut model in per cent."""
        return 100 * self._top1["pruned"]

    @property
    def _top1(self) -> Mapping[str, float]:
        assert self.comparison.top1 is not None, "labels were given"
        return self.comparison.top1

    @property
    def drop(self) -> float:
        """Points lost."""
        return self.dense - self.pruned


def _stated(model: str, share: float, tested: Measured) -> tuple[float, float] | None:
    """Published top-1 in per cent, dense and pruned, where a repair of that cut is published."""
    paper = PUBLISHED.get(model)
    key = tested.made.cut, share
    if paper is None or key not in paper.pruned or tested.made.method in UNREPAIRED:
        return None
    return paper.dense, paper.pruned[key]


def accuracy(model: str, share: float, tested: Measured) -> Row:
    """Top-1 in per cent and drops in points, here and published."""
    dense, pruned = _stated(model, share, tested) or (None, None)
    drop = None if dense is None or pruned is None else dense - pruned
    return {
        "cut": tested.made.cut,
        "method": tested.made.method,
        "dense": tested.dense,
        "pruned": tested.pruned,
        "drop": tested.drop,
        "published dense": dense,
        "published pruned": pruned,
        "published drop": drop,
        "more than published": None if drop is None else tested.drop - drop,
    }


def cost(tested: Measured) -> Row:
    """Error of the logits, multiply-adds of one picture, seconds of the whole of `prune`."""
    made, (dense, pruned) = tested.made, tested.made.macs
    return {
        "cut": made.cut,
        "method": made.method,
        "error": tested.comparison.relative_error,
        "agreement": tested.comparison.top1_agreement,
        "dense MACs": dense,
        "pruned MACs": pruned,
        "MACs removed": 1 - pruned / dense,
        "seconds": made.seconds,
        "checks broken": ", ".join(made.broken) or None,
    }


def checks(model: str, share: float, tested: Sequence[Measured]) -> Iterator[Check]:
    """The dense model is the published one; its repairs hold, and lose no more than published."""
    if model in PUBLISHED:
        yield _dense_check(model, tested[0])
    for one in tested:
        if one.made.method in UNREPAIRED:
            continue
        name = f"{model}, {one.made.cut}, {one.made.method}"
        broken = ", ".join(one.made.broken)
        yield Check(f"{name}: as promised", not broken, broken or "every check of prune holds")
        stated = _stated(model, share, one)
        if stated is not None:
            limit, slack = stated[0] - stated[1], _slack(one, 1 - one.comparison.top1_agreement)
            found = f"{one.drop:.2f} points, published {limit:.2f}, {slack:.2f} more allowed"
            yield Check(f"{name}: loses no more than published", one.drop <= limit + slack, found)


def _dense_check(model: str, tested: Measured) -> Check:
    wanted = PUBLISHED[model].dense
    slack = _slack(tested, wanted / 100 * (1 - wanted / 100))
    found = f"{tested.dense:.2f}, published {wanted:.2f}, {slack:.2f} off allowed"
    near = abs(tested.dense - wanted) <= slack
    return Check(f"{model}: the dense model is as accurate as published", near, found)


def _slack(tested: Measured, variance: float) -> float:
    """Points that sampling may make up: standard errors of a mean over the test pictures.

    A drop has the variance of ``d = right before - right after``, at most the share of pictures
    whose answer changed.
    """
    return float(100 * STANDARD_ERRORS * (variance / tested.comparison.samples) ** 0.5)
