"""What every width of every axis costs in time on one target, measured on reduced variants."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from math import lcm
from pathlib import Path

import numpy as np
import platformdirs
from jaxtyping import Float64

from corp_onnx.allocation.probes import Probe
from corp_onnx.deploy.records import Precision, Target
from corp_onnx.errors import OutputError
from corp_onnx.files import whole
from corp_onnx.graph.model import Model
from corp_onnx.latency.conditions import cores, devices
from corp_onnx.latency.stopwatch import Lane, Stopwatch
from corp_onnx.plan import least_width

log = logging.getLogger(__name__)

SHARES = (0.8, 0.6, 0.4, 0.2, 0.0)
"""Of an axis, kept in the variants; rounded to aligned widths, between which costs are linear."""

TOGETHER = 5
"""Variants that are timed in one race, beside the model at full width."""

WARMUP, RUNS = 3, 15

Shrunk = Callable[[Mapping[int, int]], Model]
"""From widths by the place of a probe to a model that is as fast; its values do not matter."""


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Times of a model whose axes of one kind are all cut to some width, on one target.

    Attributes:
        whole_ms: With every axis at its dense width, written as the cut model will be.
        variants_ms: By kind, as text, then by width.
    """

    whole_ms: float
    variants_ms: Mapping[str, Mapping[int, float]]

    def costs(self, probes: Sequence[Probe]) -> list[Float64[np.ndarray, " w1"]]:
        """Milliseconds that every width 0, 1, … of every axis adds, linear between what was timed.

        Noise may make a wider variant look faster; it counts as no slower than the narrower.
        """
        kinds = [kind_of(probe) for probe in probes]
        return [
            self._cost(kind, probe.width) / kinds.count(kind)
            for kind, probe in zip(kinds, probes, strict=True)
        ]

    def _cost(self, kind: str, width: int) -> Float64[np.ndarray, " w1"]:
        known = {**self.variants_ms[kind], width: self.whole_ms}
        widths = sorted(known)
        times = np.maximum.accumulate([known[place] for place in widths])
        cost: np.ndarray = np.interp(np.arange(width + 1), widths, times)
        return cost


def kind_of(probe: Probe) -> str:
    """Axes of one kind, alike in axis, width and work for one channel, take the same time."""
    return f"{probe.axis} {probe.width} {probe.macs:.0f} {probe.params:.0f}"


def measured(
    probes: Sequence[Probe],
    shrunk: Shrunk,
    target: Target,
    stopwatch: Stopwatch,
    *,
    precision: Precision = "fp32",
    align: int,
    on_variant: Callable[[int], None] = lambda variants: None,
) -> LatencyTable:
    """Time the model with all axes of a kind cut to a few widths, a kind after the other.

    Each race has the model at full width in it; only ratios to that one count, so drift of the
    machine between races does not.

    Args:
        probes: What there is to cut.
        shrunk: Makes a model of some widths.
        target: Where the models run.
        stopwatch: At which batch and sizes.
        precision: Of the models.
        align: Widths are multiples of this.
        on_variant: Called with the number of variants that were timed.
    """
    stopwatch = replace(stopwatch, warmup=WARMUP, runs=RUNS)
    full = {place: probe.width for place, probe in enumerate(probes)}
    reference = shrunk(full)
    variants = list(_variants(probes, align))
    whole_ms: list[float] = []
    ratios: dict[str, dict[int, float]] = {kind_of(probe): {} for probe in probes}
    for start in range(0, max(len(variants), 1), TOGETHER):
        some = variants[start : start + TOGETHER]
        models = [reference, *(shrunk(full | widths) for _, _, widths in some)]
        race = stopwatch.race([Lane(model, target, precision) for model in models])
        whole_ms.append(race.latencies[0].median_ms)
        for (kind, width, _), speedup in zip(some, race.speedups[1:], strict=True):
            ratios[kind][width] = 1.0 / speedup.ratio
        on_variant(len(some))
    scale = float(np.median(whole_ms))
    in_ms = {kind: {w: scale * each for w, each in of.items()} for kind, of in ratios.items()}
    return LatencyTable(scale, in_ms)


def _variants(probes: Sequence[Probe], align: int) -> Iterator[tuple[str, int, dict[int, int]]]:
    """Kind, width, and the widths of all axes of that kind by their place."""
    places: dict[str, list[int]] = {}
    for place, probe in enumerate(probes):
        places.setdefault(kind_of(probe), []).append(place)
    for kind, alike in places.items():
        width, multiple = probes[alike[0]].width, lcm(align, probes[alike[0]].step)
        least = least_width(width, multiple)
        wanted = {max(least, round(share * width / multiple) * multiple) for share in SHARES}
        for narrow in sorted(wanted - {width}, reverse=True):
            if narrow < width:
                yield kind, narrow, dict.fromkeys(alike, narrow)


def cached(
    measure: Callable[[], LatencyTable], key: Mapping[str, object], folder: Path | None = None
) -> LatencyTable:
    """The table of an earlier measurement under the same key, or a new one, kept for the next.

    Args:
        measure: Makes a new one.
        key: All that the times depend on: model, target and its versions, sizes.
        folder: Where tables are kept; the user's cache unless told otherwise.
    """
    ours = {"shares": SHARES, "corp_onnx": _version()}
    text = json.dumps({**key, **ours, "devices": devices(), "cores": cores()}, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = (folder or platformdirs.user_cache_path("corp_onnx")) / f"latency-{name}.json"
    known = _read(path)
    if known is not None:
        log.info("latency table taken from %s", path)
        return known
    table = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as draft:
            draft.write_text(json.dumps(asdict(table)), encoding="utf-8")
    except (OSError, OutputError) as error:
        log.warning("the latency table cannot be kept in %s: %s", path.parent, error)
    return table


def _version() -> str | None:
    """Of this package; None where it runs without being installed."""
    try:
        return metadata.version("corp_onnx")
    except metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> LatencyTable | None:
    """The table in a file; None if there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        variants = {
            kind: {int(width): float(time) for width, time in times.items()}
            for kind, times in document["variants_ms"].items()
        }
        return LatencyTable(float(document["whole_ms"]), variants)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("the latency table %s cannot be read (%s) and is measured again", path, error)
        return None
