"""Calibrating and solving on the processor and on an NVIDIA GPU: time, and whether both agree.

The bundled model runs on its own pictures, DeiT-B with drawn weights on noise. Seconds are those
that the program reports of its stages; what CUDA takes to start is left out, as everything has run
once before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks import exports
from benchmarks.outcome import Outcome, Place, Row
from corp_onnx import example
from corp_onnx.commands import Source
from corp_onnx.data.dataset import Dataset
from corp_onnx.device import DEVICES, DeviceName, device_of
from corp_onnx.graph.model import Model
from corp_onnx.latency import conditions
from corp_onnx.pipeline import Pruned, Settings, prune
from corp_onnx.providers import CPU, CUDA, EXACT
from corp_onnx.session import Runtime, open_session
from corp_onnx.solve import Method, Recipe
from corp_onnx.verify.checks import Check

log = logging.getLogger(__name__)

METHODS: tuple[Method, ...] = ("corp", "best")
PICTURES, SIZE = 96, (3, 224, 224)
STAGES = ("calibrate", "solve", "fit")
APART = 0.02
"""How far the errors of the two may differ, as a share: rounding decides between near equals."""


@dataclass(frozen=True, slots=True)
class _Case:
    """A model and what to calibrate it on."""

    name: str
    model: Path
    data: str


def measure(place: Place) -> Outcome:
    """Every model by every method on both."""
    rows: list[Row] = []
    with TemporaryDirectory(prefix="benchmark.") as folder:
        cases = _cases(place, Path(folder))
        for device in DEVICES:
            _pruned(cases[0], "best", device)
        for case in cases:
            for method in METHODS:
                for device in DEVICES:
                    rows.append(_row(case, method, device))
                    log.info("%s", rows[-1])
    checks = tuple(_checks(rows))
    return Outcome({"stages": rows}, checks, {"machine": str(conditions.read())})


def _cases(place: Place, folder: Path) -> list[_Case]:
    fashion = _Case("Fashion ViT", example.MODEL, str(example.CALIBRATION))
    if place.quick:
        return [fashion]
    noise = folder / "noise.npy"
    np.save(noise, np.random.default_rng(0).standard_normal((PICTURES, *SIZE), dtype=np.float32))
    return [fashion, _Case("DeiT-B", exports.deit(place, "DeiT-B"), str(noise))]


def _row(case: _Case, method: Method, device: DeviceName) -> Row:
    """Seconds by stage, and the error on held-out samples."""
    done = _pruned(case, method, device)
    seconds = {stage: done.seconds.get(stage, 0.0) for stage in STAGES}
    return {
        "model": case.name,
        "method": method,
        "device": device,
        **{f"{stage}_s": found for stage, found in seconds.items()},
        "together_s": sum(seconds.values()),
        "error": done.verification.comparison.relative_error,
    }


def _pruned(case: _Case, method: Method, device: DeviceName) -> Pruned:
    def opened(model: Model) -> Dataset:
        return Source(case.data).open(case.model, open_session(model))

    runtime = Runtime(CUDA if device == "cuda" else CPU, provider_options=EXACT)
    settings = Settings(recipe=Recipe(method, device=device_of(device)), runtime=runtime)
    with TemporaryDirectory(prefix="benchmark.") as folder:
        return prune(case.model, Path(folder) / "small.onnx", opened, settings=settings)


def _checks(rows: list[Row]) -> Iterator[Check]:
    """Whether the model is as good, wherever it was made."""
    for host, gpu in zip(rows[::2], rows[1::2], strict=True):
        apart = abs(gpu["error"] / host["error"] - 1.0)
        faster = host["together_s"] / gpu["together_s"]
        yield Check(
            f"{host['model']}, {host['method']}: as good a model on the GPU",
            apart <= APART,
            f"errors {apart:.2%} apart, {faster:.1f} times as fast",
        )
