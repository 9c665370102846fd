"""Our typed models and those of ONNX Runtime's own tools, of the same model and samples.

int8 is QDQ around linear layers, weights by output channel, activations in uint8: `quantize_static`
with each way that it has to choose ranges. `quantize_dynamic` finds ranges of activations at every
inference, in operators that only ONNX Runtime has. Both get what `quant_pre_process` makes of the
model, and are told to leave the products of attention alone as ours do. fp16 is
`convert_float_to_float16`, inputs and outputs in float32; what it computes is judged as ours is,
with every tensor rounded as its type says, since a processor computes it in float32. Errors are
against the same model in float32, on inputs that no range was taken from. Times are those of ONNX
Runtime, over the model in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationMethod,
    QuantType,
    quant_pre_process,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.transformers.float16 import convert_float_to_float16

from benchmarks.methods import BEST, cut, solution
from benchmarks.outcome import Outcome, Place, Row
from benchmarks.precisions import REMOVED, SEEN, UNLIMITED
from benchmarks.subjects import CUTS, Subject, subjects
from corp_onnx.data.batching import Batch
from corp_onnx.deploy.targets import open_target
from corp_onnx.graph.model import Model, from_proto, write
from corp_onnx.latency.stopwatch import Lane, Stopwatch
from corp_onnx.plan import uniform
from corp_onnx.precision import Request, in_precision
from corp_onnx.precision.check import size_bytes
from corp_onnx.precision.records import FORMATS
from corp_onnx.precision.rounded import rounding
from corp_onnx.session import open_session
from corp_onnx.verify.checks import Check
from corp_onnx.verify.comparison import compare

log = logging.getLogger(__name__)

MODELS = ("fashion", "dinov2", "minilm-l6")

OURS = "corp_onnx"
RANGES: Mapping[str, CalibrationMethod] = {
    "ONNX Runtime, MinMax": CalibrationMethod.MinMax,
    "ONNX Runtime, Entropy": CalibrationMethod.Entropy,
    "ONNX Runtime, Percentile": CalibrationMethod.Percentile,
}
DYNAMIC = "ONNX Runtime, dynamic"
CONVERTER = "ONNX Runtime, float16"

LINEAR: Mapping[str, Any] = {
    "op_types_to_quantize": ["MatMul", "Gemm"],
    "per_channel": True,
    "weight_type": QuantType.QInt8,
    "extra_options": {"MatMulConstBOnly": True},
}
"""What both tools are told."""

BATCH, WARMUP, RUNS = 8, 3, 20


def measure(place: Place) -> Outcome:
    """Every model, dense and cut, by every tool."""
    rows: list[Row] = []
    for _, subject in subjects(place, MODELS, {}, 1):
        plan = uniform(subject.catalog, CUTS[REMOVED])
        smaller = cut(subject, solution(subject, plan, BEST, subject.statistics()))
        for name, model in {"dense": subject.model, REMOVED: smaller}.items():
            common = {"model": subject.title, "cut": name}
            for row in (*_in_int8(subject, model), *_in_fp16(subject, model)):
                rows.append(common | row)
                log.info("%s", rows[-1])
    return Outcome({"by tool": rows}, tuple(_checks(rows)), {"batch": BATCH, "runs": RUNS})


def _in_int8(subject: Subject, model: Model) -> Iterator[Row]:
    """Errors and times of all ways to int8, raced turn by turn."""
    seen = _seen(subject)
    ours = in_precision(model, Request("int8", limit=UNLIMITED), seen, subject.test).model
    target = open_target("ort-cpu")
    with TemporaryDirectory() as folder:
        files = {OURS: Path(folder) / "ours.onnx"}
        write(ours.proto(), files[OURS])
        whole, prepared = Path(folder) / "whole.onnx", Path(folder) / "prepared.onnx"
        write(model.proto(), whole)
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        for name, method in RANGES.items():
            files[name] = Path(folder) / f"{method.name}.onnx"
            _static(prepared, seen, method, files[name])
        files[DYNAMIC] = Path(folder) / "dynamic.onnx"
        quantize_dynamic(prepared, files[DYNAMIC], **LINEAR)
        lanes = [Lane(model, target), *(Lane(path, target, "int8") for path in files.values())]
        race = Stopwatch(BATCH, warmup=WARMUP, runs=RUNS).race(lanes)
        dense = open_session(model)
        for (name, path), speedup in zip(files.items(), race.speedups[1:], strict=True):
            yield {
                "precision": "int8",
                "tool": name,
                "error": compare(dense, open_session(path), subject.test).relative_error,
                "size": path.stat().st_size / size_bytes(model),
                "speedup": speedup.ratio,
                "low": speedup.low,
                "high": speedup.high,
            }


def _in_fp16(subject: Subject, model: Model) -> Iterator[Row]:
    """Errors of both converters."""
    seen = _seen(subject)
    ours = in_precision(model, Request("fp16", limit=UNLIMITED), seen, subject.test).model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto())
    theirs = from_proto(convert_float_to_float16(proto, keep_io_types=True))
    dense = open_session(model)
    for name, typed in {OURS: ours, CONVERTER: theirs}.items():
        with np.errstate(over="ignore", invalid="ignore"):
            computed = open_session(rounding(typed, FORMATS["fp16"]))
            error = compare(dense, computed, subject.test).relative_error
        yield {
            "precision": "fp16",
            "tool": name,
            "error": error,
            "size": size_bytes(typed) / size_bytes(model),
        }


def _seen(subject: Subject) -> list[Batch]:
    """Texts padded to one length over all batches, as the tools' histograms want it."""
    batches = list(islice(subject.samples.batches(subject.crops, subject.seed), SEEN))
    longest = {name: max(batch[name].shape[-1] for batch in batches) for name in batches[0]}
    return [
        {name: _padded(array, longest[name]) for name, array in batch.items()} for batch in batches
    ]


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    """With zeros at the end of the last axis."""
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, length - array.shape[-1])])


def _static(
    prepared: Path, seen: Sequence[Batch], method: CalibrationMethod, written: Path
) -> None:
    """A file as ONNX Runtime's tool writes it from calibration samples."""
    quantize_static(
        prepared,
        written,
        _Reader(seen),
        activation_type=QuantType.QUInt8,
        calibrate_method=method,
        **LINEAR,
    )


class _Reader:
    """Batches as the tool asks for them."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Batch | None:
        """The next batch; None behind the last."""
        return next(self._batches, None)


def _checks(rows: Sequence[Row]) -> Iterator[Check]:
    """Ours is no farther from the model than what the tools make in the same form."""
    alike = [row for row in rows if row["tool"] != DYNAMIC]
    for kind in dict.fromkeys((row["model"], row["cut"], row["precision"]) for row in alike):
        of_kind = [row for row in alike if (row["model"], row["cut"], row["precision"]) == kind]
        (ours,) = (row["error"] for row in of_kind if row["tool"] == OURS)
        theirs = min(row["error"] for row in of_kind if row["tool"] != OURS)
        found = f"{ours:.2e}, the tools {theirs:.2e}"
        yield Check(f"{', '.join(kind)}: no farther than in the same form", ours <= theirs, found)
