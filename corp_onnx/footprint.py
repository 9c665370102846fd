"""How much memory an engine takes, in a process of its own."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from corp_onnx.deploy.records import Build, Target
from corp_onnx.latency import timing_inputs
from corp_onnx.sizes import Sizes
from corp_onnx.timing import Lane, Stopwatch, inputs_of

RUNS = 3


def peak_bytes(lane: Lane, watch: Stopwatch) -> int | None:
    """The most memory that a process holds which loads an engine and runs it a few times.

    It is that of the whole process, Python and the runtime included; None where the operating
    system does not tell. Memory of a device is not in it.

    Raises:
        CorpError: As `Lane.built`, and whatever the engine raises.
    """
    with (
        lane.built(watch.sizes_of) as (build, sizes),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart,
    ):
        return apart.submit(_peak_of, lane.target, build, watch, sizes).result()


def _peak_of(target: Target, build: Build, watch: Stopwatch, sizes: Sizes | None) -> int | None:
    engine = target.load(build)
    feeds = timing_inputs(engine.inputs, sizes or watch.sizes_of(inputs_of(engine)))
    for _ in range(RUNS):
        engine.run(feeds)
    engine.close()
    return own_peak_bytes()


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
