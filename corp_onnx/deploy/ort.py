"""ONNX Runtime as a target, with one execution provider each."""

from __future__ import annotations

import functools
import logging
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError

from corp_onnx.deploy.records import Build, Precision, options_of
from corp_onnx.deploy.sessions import SessionEngine
from corp_onnx.deploy.uncast import without_casts
from corp_onnx.deploy.whole import DOMAIN, FLOAT, write_whole
from corp_onnx.errors import PlanError
from corp_onnx.files import require_writable
from corp_onnx.graph.canonical.quantised import pack_narrow_constants
from corp_onnx.graph.model import is_large, write
from corp_onnx.graph.sizes import Sizes
from corp_onnx.session import GraphLevel, Runtime, Session, open_session, require_providers, version

log = logging.getLogger(__name__)

PROVIDERS: Mapping[str, str] = {
    "ort-cpu": "CPUExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-openvino": "OpenVINOExecutionProvider",
}
"""Targets and what runs them; what a provider cannot run falls to the processor."""

LACKING: Mapping[str, tuple[Precision, ...]] = {"ort-cpu": ("bf16",)}
"""Types without kernels."""

WIDENED: Mapping[str, tuple[Precision, ...]] = {"ort-cpu": ("fp16",)}
"""Types that most kernels lack, so that their operators run in float32 between casts."""

WHOLE: Mapping[str, tuple[np.dtype, ...]] = {
    "ort-cpu": FLOAT,
    "ort-cuda": (*FLOAT, np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)),
}
"""Where there are kernels for attention in one piece, and their types."""

DEVICES: Mapping[str, str] = {"ort-cuda": "cuda"}
"""Where inputs and outputs may lie, so that a run can be timed without copying them."""

WIDE_INSIDE: Mapping[str, tuple[str, ...]] = {"ort-cuda": ("LayerNormalization", "Softmax")}
"""Operators whose kernels sum up in float32, whatever they read and write."""

COMPILING = ("ort-tensorrt", "ort-openvino")
"""Providers that make engines of their own out of graphs."""

ENABLED: Mapping[Precision, str] = {
    "fp16": "trt_fp16_enable",
    "bf16": "trt_bf16_enable",
    "int8": "trt_int8_enable",
}
"""What lets the TensorRT provider take a model of these types."""

ENGINE = "model.onnx"
COMPILED = "TensorrtExecutionProvider_*"
"""What the TensorRT provider keeps: engines, their shapes, times of kernels."""


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """ONNX Runtime with one execution provider: builds the graph that it optimised.

    Attributes:
        name: One of `PROVIDERS`.
        threads: Of one operator; 0 takes all cores.
        spinning: Whether idle threads wait busily; not where several engines take turns.
        arena: Whether freed memory is kept for the next run.
        graph_level: How far the graph is rewritten.
        cache: Folder of engines and timings of the TensorRT provider; None takes that of the build.
        custom_op_library: Of operators that the model needs.
    """

    name: str = "ort-cpu"
    threads: int = 0
    spinning: bool = False
    arena: bool = True
    graph_level: GraphLevel = "all"
    cache: Path | None = None
    custom_op_library: Path | None = None

    @property
    def inference_threads(self) -> int:
        """As asked for."""
        return self.threads

    def versions(self) -> Mapping[str, str]:
        """Of ONNX Runtime."""
        return {"onnxruntime": version(), "machine": platform.machine()}

    def rounds_by_itself(self, precision: Precision) -> bool:
        """Never: it computes in the types that the file has."""
        return False

    def require(self, precision: Precision) -> None:
        """See whether the provider is installed and has kernels for these types."""
        require_providers([PROVIDERS[self.name]])
        if precision in LACKING.get(self.name, ()):
            raise PlanError(
                f"{self.name} has no kernels for {precision}; choose fp32 or int8 there, or another"
                " target: openvino computes bf16 on processors that have it"
            )
        if precision in WIDENED.get(self.name, ()):
            warn_of_width(self.name, precision)

    def sized(self, sizes: Sizes) -> OnnxRuntime:
        """As it is: an engine takes all sizes."""
        return self

    def build(self, model: Path, folder: Path, precision: Precision) -> Build:
        """Write attention whole, load the model, keep the graph that ONNX Runtime made of it.

        Providers that compile graphs cannot write them: there the model itself is kept, and what
        TensorRT compiles of it, or once it sees inputs, in its cache.
        """
        self.require(precision)
        path = folder / ENGINE
        require_writable(path)
        start = perf_counter()
        self._write(model, path, precision)
        seconds = perf_counter() - start
        files = [path, *folder.glob(f"{ENGINE}.*"), *folder.glob(COMPILED)]
        build = Build(
            *(self.name, precision, path, seconds, sum(file.stat().st_size for file in files)),
            versions=self.versions(),
            options=options_of(self),
        )
        build.write()
        return build

    def _write(self, model: Path, path: Path, precision: Precision) -> None:
        proto = _read(model)
        runtime = self._runtime(self.graph_level, precision, path.parent)
        if proto is not None and self.name in WHOLE and self.graph_level != "none":
            proto = rewritten(proto, self.name)
        if proto is None:
            open_session(model, runtime)  # says what is wrong
        elif self.name in COMPILING:
            write(proto, path)
            open_session(path, runtime)
        else:
            with tempfile.TemporaryDirectory(prefix="corp_onnx.") as folder:
                write(proto, Path(folder) / ENGINE)
                kept = replace(runtime, optimised=path, optimised_apart=is_large(proto))
                open_session(Path(folder) / ENGINE, kept)

    def load(self, build: Build) -> SessionEngine:
        """The optimised graph as it is: it is not optimised again."""
        graph_level = self.graph_level if self.name in COMPILING else "none"
        runtime = self._runtime(graph_level, build.precision, build.path.parent)

        def profiled(path: Path) -> Session:
            return open_session(build.path, replace(runtime, profile=path))

        session = open_session(build.path, runtime)
        return SessionEngine(session, profiled, DEVICES.get(self.name))

    def _runtime(self, graph_level: GraphLevel, precision: Precision, folder: Path) -> Runtime:
        provider = PROVIDERS[self.name]
        options = {}
        if self.name == "ort-tensorrt":
            options = {provider: _tensorrt_options(self.cache or folder, precision)}
        return Runtime(
            tuple(dict.fromkeys([provider, PROVIDERS["ort-cpu"]])),
            threads=self.threads,
            spinning=self.spinning,
            custom_op_library=self.custom_op_library,
            graph_level=graph_level,
            arena=self.arena,
            provider_options=options,
        )


@functools.cache
def warn_of_width(name: str, precision: Precision) -> None:
    """Say once that a target computes in wider types than a model has."""
    log.warning(
        "%s computes most of %s in float32, between casts: the file is smaller, not faster",
        *(name, precision),
    )


def _read(model: Path) -> onnx.ModelProto | None:
    """The file; None if it is no model, of which ONNX Runtime says what is wrong."""
    try:
        return onnx.load(model)
    except (DecodeError, OSError, onnx.checker.ValidationError):  # the last of weights beside it
        return None


def rewritten(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model as a provider's kernels and fusions like it: attention as one operator."""
    graph = gs.import_onnx(proto)
    uncast = without_casts(graph, WIDE_INSIDE.get(name, ()))
    whole = write_whole(graph, WHOLE[name])
    if uncast == whole == 0:
        return proto
    pack_narrow_constants(graph)
    made = gs.export_onnx(graph, do_type_check=False)
    if whole and all(opset.domain != DOMAIN for opset in made.opset_import):
        made.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return made


def _tensorrt_options(cache: Path, precision: Precision) -> dict[str, str]:
    """Which types may be used, and where engines and times of kernels are kept."""
    types = {ENABLED[precision]: "True"} if precision in ENABLED else {}
    return {
        **types,
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
    }
