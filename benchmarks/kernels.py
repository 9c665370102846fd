"""Where an NVIDIA GPU spends its time on dense and cut models, kernel by kernel.

ONNX Runtime notes when it launches a kernel, not how long the GPU takes for it. CUPTI does, for all
kernels of the process, and torch's profiler asks it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.cuda import DRAWN, TARGET, prepared, watch_of
from benchmarks.exports import DEIT
from benchmarks.latency import TOKENS
from benchmarks.machine import alone
from benchmarks.outcome import Outcome, Place, Row
from corp_onnx.errors import BackendUnavailable
from corp_onnx.latency.race import timing_inputs

if TYPE_CHECKING:
    from corp_onnx.data.batching import Batch
    from corp_onnx.deploy.records import Engine

MODELS = (*DEIT, *DRAWN)
BATCH, WARMUP, RUNS = 128, 3, 10
TOLD, LONGEST = 8, 120
"""Kernels of an engine that are told by name, and letters of that name."""

KINDS: Mapping[str, str] = {
    "attention": r"fmha|flash|attention|softmax",
    "norms": r"layer_?norm",
    "products": r"gemm|gemv|nvjet|xmma|cutlass|splitk",
    "copies": r"^mem(cpy|set)",
}
"""What names of kernels say, the first that fits; all others are element by element."""
OTHERS = "elementwise"


@dataclass(frozen=True, slots=True)
class _Kernel:
    """What it is called, launches of an inference, and milliseconds of all of them."""

    name: str
    launches: float
    ms: float

    @property
    def kind(self) -> str:
        found = (kind for kind, words in KINDS.items() if re.search(words, self.name, re.I))
        return next(found, OTHERS)


def measure(place: Place) -> Outcome:
    """Trace every engine of one model."""
    bench = prepared(place)
    tokens = TOKENS[1] if bench.text else None
    labels, lanes = zip(*bench.lanes(TARGET), strict=True)
    kinds: list[Row] = []
    kernels: list[Row] = []
    with alone(), ExitStack() as opened:
        watch = watch_of(bench, BATCH, tokens)
        engines = [opened.enter_context(lane.opened(watch)) for lane in lanes]
        for label, (engine, sizes) in zip(labels, engines, strict=True):
            found = _traced(engine, timing_inputs(engine.inputs, sizes))
            common = {"precision": label["precision"], "cut": label["cut"]}
            kinds.append(common | _by_kind(found))
            kernels.extend(common | row for row in _longest(found))
    settings = {"model": place.model, "batch": BATCH, "tokens": tokens, "runs": RUNS}
    return Outcome({"by kind": kinds, "longest": kernels}, settings=settings)


def _traced(engine: Engine, feeds: Batch) -> list[_Kernel]:
    """Everything that the GPU did in an inference.

    Raises:
        BackendUnavailable: If CUPTI tells nothing.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(WARMUP):
        engine.run(feeds)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(RUNS):
            engine.run(feeds)
    found = [
        _Kernel(event.key, event.count / RUNS, event.self_device_time_total / 1000 / RUNS)
        for event in trace.key_averages()
        if event.device_type == DeviceType.CUDA
    ]
    if not found:
        raise BackendUnavailable(
            "torch's profiler saw no kernel; it needs a torch for CUDA, with CUPTI, and an NVIDIA "
            "GPU that this user may profile"
        )
    return found


def _by_kind(kernels: list[_Kernel]) -> Row:
    """Launches, and milliseconds by kind and together, without copies from and to the host."""
    at_work = [kernel for kernel in kernels if kernel.kind != "copies"]
    spent = {
        f"{kind}_ms": sum(kernel.ms for kernel in at_work if kernel.kind == kind)
        for kind in (*KINDS, OTHERS)
        if kind != "copies"
    }
    launches = sum(kernel.launches for kernel in at_work)
    return {"launches": launches, "together_ms": sum(spent.values()), **spent}


def _longest(kernels: list[_Kernel]) -> Iterator[Row]:
    for kernel in sorted(kernels, key=lambda kernel: -kernel.ms)[:TOLD]:
        yield {
            "kernel": kernel.name[:LONGEST],
            "kind": kernel.kind,
            "launches": kernel.launches,
            "ms": kernel.ms,
        }
