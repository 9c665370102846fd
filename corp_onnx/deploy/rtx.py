"""TensorRT for RTX as a target: an execution provider that plugs into ONNX Runtime."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from corp_onnx.deploy.records import (
    Build,
    Precision,
    ShapeRange,
    declared_inputs,
    options_of,
    without_weights,
)
from corp_onnx.deploy.sessions import SessionEngine
from corp_onnx.deploy.shape_ranges import exactly, fitted
from corp_onnx.errors import BackendUnavailable, GraphError, PlanError
from corp_onnx.graph.sizes import Sizes
from corp_onnx.session import LOG_ONLY_FATAL, library, wrapped

ENGINE = "model.onnx"
"""A model whose nodes hold, or point to, what was compiled."""

LACKING: tuple[Precision, ...] = ("int8",)
"""What no GPU computes in there: int8 is for weights alone (TensorRT-RTX 1.5, Support Matrix)."""

SUPPORTED = "8.6, 8.9, or 12.0 and later (GeForce RTX 30, 40 and 50, and their workstation kin)"


@dataclass(frozen=True, slots=True)
class TensorRTRTX:
    """TensorRT for RTX on the GPUs that it supports; what it cannot run falls to the processor.

    Attributes:
        shapes: Of inputs with dimensions that vary; without them it takes every size.
        workspace_bytes: Memory that a kernel may take beside weights; None leaves it open.
        cuda_graph: Whether the kernels of a run are launched at once; shapes must then stay.
        cache: Folder for kernels that are compiled when they are first run.
    """

    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    workspace_bytes: int | None = None
    cuda_graph: bool = False
    cache: Path | None = None
    name: str = "tensorrt-rtx"

    @property
    def inference_threads(self) -> None:
        """None: a GPU computes."""

    def versions(self) -> Mapping[str, str]:
        """Of ONNX Runtime and the provider."""
        ort, _ = library()
        return {
            "onnxruntime": ort.__version__,
            "tensorrt-rtx": _plugin().__version__,
            "machine": platform.machine(),
        }

    def rounds_by_itself(self, precision: Precision) -> bool:
        """Never: it computes in the types that the file has."""
        return False

    def require(self, precision: Precision) -> None:
        """See whether the provider and a GPU for it are here, and it computes in these types."""
        _devices()
        if precision in LACKING:
            raise PlanError(
                f"TensorRT for RTX has {precision} for weights alone, and no products of it; "
                "choose fp16"
            )

    def sized(self, sizes: Sizes) -> TensorRTRTX:
        """For inputs of these sizes alone, unless it has ranges already."""
        return self if self.shapes else replace(self, shapes=exactly(sizes))

    def build(self, model: Path, folder: Path, precision: Precision) -> Build:
        """Compile the model for the GPUs of this machine, if ranges fit what it reads."""
        self.require(precision)
        if self.shapes:
            fitted(self.shapes, declared_inputs(without_weights(model)))
        ort, failures = library()
        path = folder / ENGINE
        before, clock = _marks(folder), time.perf_counter()
        try:
            ort.ModelCompiler(self._session_options(), str(model)).compile_to_file(str(path))
        except failures as error:
            raise GraphError(
                f"TensorRT for RTX cannot compile {model}: {str(error).strip()}"
            ) from error
        seconds = time.perf_counter() - clock
        written = {path, *(file for file, _ in _marks(folder) - before)}
        build = Build(
            *(self.name, precision, path, seconds),
            size_bytes=sum(file.stat().st_size for file in written),
            versions=self.versions(),
            options=options_of(self),
        )
        build.write()
        return build

    def load(self, build: Build) -> SessionEngine:
        """Open what was compiled."""
        self.require(build.precision)
        ort, failures = library()
        try:
            session = ort.InferenceSession(str(build.path), self._session_options())
        except failures as error:
            raise GraphError(
                f"TensorRT for RTX cannot load {build.path}: {str(error).strip()}; build it again "
                f"if another version or GPU made it ({dict(build.versions)})"
            ) from error
        return SessionEngine(wrapped(session))

    def _session_options(self) -> Any:  # noqa: ANN401 (ONNX Runtime ships no types)
        ort, _ = library()
        options = ort.SessionOptions()
        options.log_severity_level = LOG_ONLY_FATAL
        options.add_provider_for_devices(list(_devices()), self._provider_options())
        return options

    def _provider_options(self) -> dict[str, str]:
        options = {"enable_cuda_graph": str(int(self.cuda_graph))}
        if self.workspace_bytes is not None:
            options["nv_max_workspace_size"] = str(self.workspace_bytes)
        if self.cache is not None:
            options["nv_runtime_cache_path"] = str(self.cache)
        if self.shapes:
            ranges = self.shapes.items()
            options["nv_profile_min_shapes"] = _profile((n, r.smallest) for n, r in ranges)
            options["nv_profile_opt_shapes"] = _profile((n, r.likeliest) for n, r in ranges)
            options["nv_profile_max_shapes"] = _profile((n, r.largest) for n, r in ranges)
        return options


def _marks(folder: Path) -> set[tuple[Path, int]]:
    """Files there, and when each was written; by one clock, as that of files may lag others."""
    return {(file, file.stat().st_mtime_ns) for file in folder.iterdir() if file.is_file()}


def _profile(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, dims))}" for name, dims in shapes)


def _devices() -> Sequence[Any]:
    """The GPUs that the provider offers.

    Raises:
        BackendUnavailable: If it is not installed, cannot be loaded, or supports no GPU here.
    """
    name = _registered()
    ort, _ = library()
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise BackendUnavailable(
            "TensorRT for RTX finds no GPU that it supports, which are those of compute capability "
            f"{SUPPORTED}; on others take the target tensorrt or ort-cuda"
        )
    return devices


@cache
def _registered() -> str:
    """The name of the provider, known to ONNX Runtime from now on; that can be done once."""
    plugin = _plugin()
    ort, failures = library()
    if not hasattr(ort, "register_execution_provider_library"):
        raise BackendUnavailable(
            f"TensorRT for RTX needs ONNX Runtime 1.24 or later, not {ort.__version__}; install "
            "it with `pip install --upgrade 'corp_onnx[rtx]'`"
        )
    name, path = str(plugin.get_ep_name()), str(plugin.get_library_path())
    try:
        ort.register_execution_provider_library(name, path)
    except failures as error:
        raise BackendUnavailable(
            f"TensorRT for RTX cannot be loaded ({str(error).strip()}); it needs an NVIDIA GPU and "
            "a driver that knows CUDA 13"
        ) from error
    return name


def _plugin() -> ModuleType:
    """The module that brings the provider, or an error that says how to get it."""
    try:
        import onnxruntime_ep_nv_tensorrt_rtx
    except (ImportError, OSError) as error:
        raise BackendUnavailable(
            f"the target tensorrt-rtx needs TensorRT for RTX, which cannot be imported ({error}); "
            "install it with `pip install 'corp_onnx[rtx]'`"
        ) from error
    return onnxruntime_ep_nv_tensorrt_rtx  # type: ignore[no-any-return]
