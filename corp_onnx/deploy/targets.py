"""The one door to all targets: by name, each imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corp_onnx.deploy.records import ShapeRange, Target
from corp_onnx.errors import PlanError
from corp_onnx.session import GraphLevel


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """What the command line lets one ask of a target; each takes what concerns it.

    Attributes:
        threads: Of one inference; 0 takes all cores.
        arena: Whether ONNX Runtime keeps freed memory.
        graph_level: How far ONNX Runtime rewrites the graph.
        cache: Folder for what a builder finds out and may use again.
        shapes: Ranges of inputs that TensorRT builds for.
        workspace_bytes: Memory that a kernel of TensorRT may take beside weights.
        optimization_level: How long TensorRT looks for the fastest kernels, 0 to 5.
        custom_op_library: Of operators that the model needs.
        refit: Whether the weights of an engine of TensorRT can be changed later.
        version_compatible: Whether later versions of TensorRT can run it.
        cuda_graph: Whether it launches all kernels of a run at once.
    """

    threads: int = 0
    arena: bool = True
    graph_level: GraphLevel = "all"
    cache: Path | None = None
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    workspace_bytes: int | None = None
    optimization_level: int = 3
    custom_op_library: Path | None = None
    refit: bool = False
    version_compatible: bool = False
    cuda_graph: bool = False


def require_taken(options: TargetOptions, targets: Sequence[str], *, builds: bool = True) -> None:
    """See whether everything that is asked for concerns one of the targets, and what is done there.

    Args:
        options: What is asked for.
        targets: Their names.
        builds: Whether anything is built, and not only run.

    Raises:
        PlanError: If something does not; says which flag, and where it would.
    """
    default = TargetOptions()
    for name, flag in FLAGS.items():
        if getattr(options, name) == getattr(default, name):
            continue
        if not any(name in TAKEN.get(target, ()) for target in targets):
            takers = ", ".join(target for target, taken in TAKEN.items() if name in taken)
            raise PlanError(
                f"{flag} means nothing to {', '.join(targets)}, it is for {takers}; leave it out"
            )
        if name in BUILDING and not builds:
            raise PlanError(
                f"{flag} says how an engine is built, and here all are built already; leave it out"
            )


def open_target(name: str, options: TargetOptions | None = None) -> Target:
    """The target of a name; nothing of it is loaded yet.

    Raises:
        PlanError: If it is none of `TARGETS`.
    """
    if name not in TARGETS:
        raise PlanError(f"--target {name!r} is none of {', '.join(TARGETS)}")
    return TARGETS[name](name, options or TargetOptions())


def _onnx_runtime(name: str, options: TargetOptions) -> Target:
    from corp_onnx.deploy.ort import OnnxRuntime

    return OnnxRuntime(
        name,
        threads=options.threads,
        arena=options.arena,
        graph_level=options.graph_level,
        cache=options.cache,
        custom_op_library=options.custom_op_library,
    )


def _openvino(name: str, options: TargetOptions) -> Target:
    from corp_onnx.deploy.openvino import OpenVino

    return OpenVino(options.threads)


def _tensorrt(name: str, options: TargetOptions) -> Target:
    from corp_onnx.deploy.tensorrt import TensorRT

    return TensorRT(
        shapes=options.shapes,
        workspace_bytes=options.workspace_bytes,
        optimization_level=options.optimization_level,
        timing_cache=options.cache and options.cache / "tensorrt.cache",
        threads=options.threads,
        refit=options.refit,
        version_compatible=options.version_compatible,
        cuda_graph=options.cuda_graph,
    )


def _tensorrt_rtx(name: str, options: TargetOptions) -> Target:
    from corp_onnx.deploy.rtx import TensorRTRTX

    return TensorRTRTX(options.shapes, options.workspace_bytes, cache=options.cache)


TARGETS: Mapping[str, Callable[[str, TargetOptions], Target]] = {
    "ort-cpu": _onnx_runtime,
    "ort-cuda": _onnx_runtime,
    "ort-tensorrt": _onnx_runtime,
    "ort-openvino": _onnx_runtime,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt_rtx,
}
"""Every target, and what makes it."""

_OF_ORT = frozenset({"threads", "arena", "graph_level", "custom_op_library"})
_OF_TENSORRT = frozenset({"shapes", "workspace_bytes", "cache"})

TAKEN: Mapping[str, frozenset[str]] = {
    "ort-cpu": _OF_ORT,
    "ort-cuda": _OF_ORT,
    "ort-tensorrt": _OF_ORT | {"cache"},
    "ort-openvino": _OF_ORT,
    "openvino": frozenset({"threads"}),
    "tensorrt": _OF_TENSORRT
    | {"optimization_level", "threads", "refit", "version_compatible", "cuda_graph"},
    "tensorrt-rtx": _OF_TENSORRT,
}
"""Fields of `TargetOptions` that concern a target."""

FLAGS: Mapping[str, str] = {
    "threads": "--threads",
    "arena": "--no-arena",
    "graph_level": "--graph-level",
    "cache": "--cache",
    "shapes": "--opt-shapes",
    "workspace_bytes": "--workspace",
    "optimization_level": "--optimization-level",
    "custom_op_library": "--custom-op-library",
    "refit": "--refit",
    "version_compatible": "--version-compatible",
    "cuda_graph": "--cuda-graph",
}
"""What those fields are on the command line."""

BUILDING = frozenset(
    {"shapes", "workspace_bytes", "optimization_level", "refit", "version_compatible"}
)
"""Those that say nothing of an engine that is built already."""

SYMMETRIC = ("ort-tensorrt", "tensorrt", "tensorrt-rtx")
"""Those that take whole-number activations only with zero in the middle."""
