"""How much memory an engine takes, in a process of its own."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from corp_onnx.deploy.records import Build, Target
from corp_onnx.graph.sizes import Sizes
from corp_onnx.latency.conditions import own_device_bytes
from corp_onnx.latency.race import timing_inputs
from corp_onnx.latency.stopwatch import Lane, Stopwatch

RUNS = 3


@dataclass(frozen=True, slots=True)
class Footprint:
    """The most memory that a process holds which loads an engine and runs it a few times.

    Attributes:
        peak_bytes: Of the whole process, Python and the runtime included; None where the operating
            system does not tell.
        device_bytes: That it holds on NVIDIA devices at the end; None where nothing tells.
    """

    peak_bytes: int | None
    device_bytes: int | None


def footprint(lane: Lane, watch: Stopwatch) -> Footprint:
    """The memory of one engine, in a process of its own.

    Raises:
        CorpError: As `Lane.built`, and whatever the engine raises.
    """
    with (
        lane.built(watch) as (build, sizes),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart,
    ):
        return apart.submit(_alone, lane.target, build, watch, sizes).result()


def _alone(target: Target, build: Build, watch: Stopwatch, sizes: Sizes | None) -> Footprint:
    engine = target.load(build)
    feeds = timing_inputs(engine.inputs, sizes or watch.sizes_of_engine(engine))
    for _ in range(RUNS):
        engine.run(feeds)
    on_device = own_device_bytes()
    engine.close()
    return Footprint(own_peak_bytes(), on_device)


def own_peak_bytes() -> int | None:
    """The most memory that this process held so far; None where the system does not tell.

    On Linux `getrusage` begins with what the parent held when it forked; the kernel's own record
    of the process does not.
    """
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
