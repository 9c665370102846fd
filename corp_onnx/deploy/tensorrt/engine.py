"""An engine that is loaded: it runs, and tells how long that took."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from corp_onnx.deploy.records import PROFILED_RUNS, Build
from corp_onnx.deploy.tensorrt.bindings import (
    new_logger,
    new_profiler,
    started,
    told,
    trt,
    version,
)
from corp_onnx.deploy.tensorrt.cuda import device
from corp_onnx.deploy.tensorrt.tensors import Tensors
from corp_onnx.deploy.tensorrt.work import Work
from corp_onnx.errors import GraphError
from corp_onnx.graph.inputs import InputSpec


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Median time of one layer, in milliseconds."""

    name: str
    median_ms: float


class TensorRTEngine:
    """An engine that is loaded and ready to run.

    Args:
        build: What was built.
        cuda_graph: Whether the kernels of a run are launched at once, as one graph.

    Raises:
        BackendUnavailable: If TensorRT cannot start here.
        GraphError: If it cannot be loaded here, as when another version or GPU built it.
    """

    def __init__(self, build: Build, *, cuda_graph: bool = False) -> None:
        self._errors: list[str] = []
        self._logger = new_logger(self._errors)
        self._runtime = started(lambda: trt.Runtime(self._logger), self._errors)
        self._engine = _deserialised(self._runtime, build, self._errors)
        self._tensors = Tensors(self._engine)
        self._work = Work(self._engine, self._tensors, self._errors, cuda_graph=cuda_graph)
        self._work.keep_quiet()

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """As the engine has them."""
        return self._tensors.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """As the engine has them."""
        return tuple(self._tensors.outputs)

    @property
    def device_ms(self) -> float | None:
        """Of the last run, without the copies; None before the first."""
        return self._work.device_ms

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference.

        Raises:
            DataError: If an input is missing, of another type, or outside the shapes built for.
            GraphError: If TensorRT or CUDA fails.
        """
        return self._work.run(feeds)

    def operator_times(
        self, feeds: Mapping[str, np.ndarray], *, runs: int = PROFILED_RUNS
    ) -> Mapping[str, float]:
        """By layer."""
        return {layer.name: layer.median_ms for layer in self.layer_times(feeds, runs=runs)}

    def layer_times(
        self, feeds: Mapping[str, np.ndarray], *, runs: int = 50
    ) -> tuple[LayerTime, ...]:
        """The median time of every layer, in the order in which they run.

        Layers are timed one by one, so all together they take longer than a run does.

        Raises:
            DataError: As `run`.
            GraphError: As `run`.
        """
        times_ms: dict[str, list[float]] = {}
        work = Work(self._engine, self._tensors, self._errors)
        try:
            work.run(feeds)
            work.watch(new_profiler(times_ms))
            for _ in range(runs):
                work.run(feeds)
        finally:
            work.close()
        return tuple(LayerTime(name, float(np.median(ms))) for name, ms in times_ms.items())

    def close(self) -> None:
        """Give back all that is on the device."""
        self._work.close()
        del self._work, self._engine, self._runtime


def write_layer_times(times: Sequence[LayerTime], path: Path) -> None:
    """A list of names and times, as JSON."""
    path.write_text(json.dumps([asdict(time) for time in times], indent=2) + "\n")


def _deserialised(runtime: trt.Runtime, build: Build, errors: list[str]) -> trt.ICudaEngine:
    runtime.engine_host_code_allowed = bool(build.options.get("version_compatible"))
    try:
        engine = runtime.deserialize_cuda_engine(build.path.read_bytes())
    except OSError as error:
        raise GraphError(f"{build.path} cannot be read ({error.strerror}); build it") from error
    if engine is None:
        made = build.versions
        raise GraphError(
            f"{build.path} was built by TensorRT {made.get('tensorrt', '?')} for "
            f"{made.get('gpu', '?')}, and TensorRT {version()} cannot load it on {device()}: "
            f"{told(errors)}. An engine belongs to one version and one kind of GPU: build it again"
        )
    return engine
