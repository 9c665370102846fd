"""ONNX Runtime as a target, with one execution provider each."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from corp_onnx.data import InputSpec
from corp_onnx.deploy.records import Build, Precision
from corp_onnx.errors import PlanError
from corp_onnx.session import GraphLevel, Runtime, Session, open_session, require_providers, version

PROVIDERS: Mapping[str, str] = {
    "ort-cpu": "CPUExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-openvino": "OpenVINOExecutionProvider",
}
"""Targets and what runs them; what a provider cannot run falls to the processor."""

LACKING: Mapping[str, tuple[Precision, ...]] = {"ort-cpu": ("bf16",)}
"""Types without kernels."""

ENGINE = "model.onnx"


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """ONNX Runtime with one execution provider: builds the graph that it optimised.

    Attributes:
        name: One of `PROVIDERS`.
        threads: Of one operator; 0 takes all cores.
        spinning: Whether idle threads wait busily; not where several engines take turns.
        arena: Whether freed memory is kept for the next run.
        graph_level: How far the graph is rewritten.
        cache: Folder of engines and timings of the TensorRT provider.
        custom_op_library: Of operators that the model needs.
    """

    name: str = "ort-cpu"
    threads: int = 0
    spinning: bool = False
    arena: bool = True
    graph_level: GraphLevel = "all"
    cache: Path | None = None
    custom_op_library: Path | None = None

    def versions(self) -> Mapping[str, str]:
        """Of ONNX Runtime."""
        return {"onnxruntime": version(), "machine": platform.machine()}

    def require(self, precision: Precision) -> None:
        """See whether the provider is installed and has kernels for these types."""
        require_providers([PROVIDERS[self.name]])
        if precision in LACKING.get(self.name, ()):
            raise PlanError(
                f"{self.name} has no kernels for {precision}; choose fp32 or int8 there, or another"
                " target: openvino computes bf16 on processors that have it"
            )

    def build(self, model: Path, folder: Path, precision: Precision) -> Build:
        """Load the model once, and keep the graph that ONNX Runtime made of it.

        Only graphs for the processor are written: other providers compile when they load.
        """
        self.require(precision)
        path = folder / ENGINE
        start = perf_counter()
        open_session(model, self._runtime(self.graph_level, optimised=path))
        seconds = perf_counter() - start
        files = [path, *folder.glob(f"{ENGINE}.*")]
        build = Build(
            *(self.name, precision, path, seconds, sum(file.stat().st_size for file in files)),
            versions=self.versions(),
            options={key: str(value) for key, value in asdict(self).items() if key != "name"},
        )
        build.write()
        return build

    def load(self, build: Build) -> OrtEngine:
        """The optimised graph as it is: it is not optimised again."""
        return OrtEngine(open_session(build.path, self._runtime("none")))

    def _runtime(self, graph_level: GraphLevel, optimised: Path | None = None) -> Runtime:
        provider = PROVIDERS[self.name]
        options = {provider: _tensorrt_options(self.cache)} if self.name == "ort-tensorrt" else {}
        return Runtime(
            tuple(dict.fromkeys([provider, PROVIDERS["ort-cpu"]])),
            threads=self.threads,
            spinning=self.spinning,
            custom_op_library=self.custom_op_library,
            graph_level=graph_level,
            arena=self.arena,
            provider_options=options,
            optimised=optimised,
        )


@dataclass(frozen=True, slots=True, eq=False)
class OrtEngine:
    """A session of ONNX Runtime."""

    session: Session
    device_ms: float | None = None

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """As the session has them."""
        return self.session.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """As the session has them."""
        return self.session.outputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference."""
        return self.session.run(feeds)

    def close(self) -> None:
        """Nothing: the session goes with its last reference."""


def _tensorrt_options(cache: Path | None) -> dict[str, str]:
    """The types of a strongly typed model are its own; engines and timings may be kept."""
    if cache is None:
        return {}
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
    }
