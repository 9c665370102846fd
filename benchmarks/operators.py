"""What a graph is made of when it runs, and where its time goes: exported, cleaned up, and cut.

Operators are those of the graph that ONNX Runtime has optimised, which is what runs: by itself, as
the exporter wrote the model, and after this package has written attention whole. Times are of a
profile, operator by operator; their sum is not the time of an inference.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx

from benchmarks.latency import AS_EXPORTED, CLEANED, MODELS, Bench, exported
from benchmarks.outcome import Outcome, Place, Row
from corp_onnx.deploy.targets import open_target
from corp_onnx.graph.model import Model, write
from corp_onnx.latency.stopwatch import Lane, Stopwatch
from corp_onnx.session import Runtime, open_session
from corp_onnx.verify.checks import Check

log = logging.getLogger(__name__)

BATCH, TOKENS = 8, 128
TARGET, OTHER = "ort-cpu", "openvino"
ALONE, CUT_ALONE = "as exported, ONNX Runtime alone", "all three, ONNX Runtime alone"
KINDS = (AS_EXPORTED, CLEANED, "all three")

Counts = Mapping[str, int]

GROUPS: Mapping[str, tuple[str, ...]] = {
    "products": ("MatMul", "Gemm", "Conv", "FullyConnected", "Convolution"),
    "attention": ("MultiHeadAttention", "Subgraph"),
    "softmax": ("Softmax",),
    "norms": ("LayerNormalization", "SkipLayerNormalization", "MVN"),
    "activations": ("BiasGelu", "Gelu", "Erf"),
    "sums, scales": ("Add", "Mul", "Multiply", "MulAdd"),
    "resized": ("Resize", "Interpolate"),
}
"""Of ONNX Runtime and of OpenVINO, whose subgraphs hold attention, and a few sums. All others move
data, or compute sizes and masks."""

WRITTEN_OUT = ("Softmax", "Erf", "Pow", "ReduceMean", "Resize")
"""What attention, activations, norms and positions are made of where not whole."""


def measure(place: Place) -> Outcome:
    """Every model; or one."""
    counted: list[Row] = []
    timed: list[Row] = []
    checks: list[Check] = []
    for name in MODELS if place.only is None else [place.only]:
        found = exported(place, name)
        bench = Bench.of(found, {TARGET: ("fp32",)})
        counts = {
            ALONE: _optimised(found),
            CUT_ALONE: _optimised(_model(bench, "all three")),
        } | {kind: _built(Lane(_model(bench, kind), open_target(TARGET))) for kind in KINDS}
        counted += [_counts_row(name, kind, of) for kind, of in counts.items()]
        checks += [_whole(name, kind, counts[kind]) for kind in (CLEANED, "all three")]
        timed += _times(name, bench)
    settings = {"batch": BATCH, "tokens": TOKENS, "targets": [TARGET, OTHER]}
    return Outcome({"operators": counted, "milliseconds": timed}, tuple(checks), settings)


def _model(bench: Bench, kind: str) -> Model | Path:
    return bench.exported if kind == AS_EXPORTED else bench.models[kind, "fp32"]


def _built(lane: Lane) -> Counts:
    """Of the graph that a target has made of a model."""
    with lane.built(Stopwatch(BATCH)) as (build, _):
        return _operators(build.path)


def _optimised(model: Model | Path) -> Counts:
    """Of the graph that ONNX Runtime makes of a model by itself."""
    with tempfile.TemporaryDirectory(prefix="corp_onnx.") as folder:
        path, kept = Path(folder) / "model.onnx", Path(folder) / "optimised.onnx"
        if isinstance(model, Model):
            write(model.proto(), path)
        open_session(path if isinstance(model, Model) else model, Runtime(optimised=kept))
        return _operators(kept)


def _operators(path: Path) -> Counts:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def _counts_row(name: str, kind: str, counts: Counts) -> Row:
    return {"model": name, "graph": kind, "operators": sum(counts.values())} | _grouped(counts)


def _grouped(by_operator: Mapping[str, float]) -> Row:
    grouped = {
        group: sum(by_operator.get(operator, 0) for operator in operators)
        for group, operators in GROUPS.items()
    }
    return grouped | {"others": sum(by_operator.values()) - sum(grouped.values())}


def _whole(name: str, kind: str, counts: Counts) -> Check:
    left = {op: counts[op] for op in WRITTEN_OUT if counts.get(op)}
    found = ", ".join(f"{count} {op}" for op, count in left.items()) or "all whole"
    return Check(f"{name}, {kind}: nothing is written out", not left, found)


def _times(name: str, bench: Bench) -> Iterator[Row]:
    """Milliseconds by kind of operator, of every graph on both targets."""
    for target in (TARGET, OTHER):
        log.info("%s on %s", name, target)
        watch = Stopwatch(BATCH, bench.sizes(BATCH, TOKENS if bench.text else None))
        lanes = [Lane(_model(bench, kind), open_target(target)) for kind in KINDS]
        for kind, times in zip(KINDS, watch.operator_times(lanes), strict=True):
            total = {"model": name, "target": target, "graph": kind, "ms": sum(times.values())}
            yield total | _grouped(times)
