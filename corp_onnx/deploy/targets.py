"""The one door to all targets: by name, each imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from corp_onnx.deploy.records import Target
from corp_onnx.errors import PlanError
from corp_onnx.session import GraphLevel


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """What the command line lets one ask of a target; each takes what concerns it.

    Attributes:
        threads: Of one inference; 0 takes all cores.
        spinning: Whether idle threads wait busily; not where engines take turns.
        arena: Whether ONNX Runtime keeps freed memory.
        graph_level: How far ONNX Runtime rewrites the graph.
        cache: Folder for what a builder finds out and may use again.
        custom_op_library: Of operators that the model needs.
    """

    threads: int = 0
    spinning: bool = False
    arena: bool = True
    graph_level: GraphLevel = "all"
    cache: Path | None = None
    custom_op_library: Path | None = None


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
        spinning=options.spinning,
        arena=options.arena,
        graph_level=options.graph_level,
        cache=options.cache,
        custom_op_library=options.custom_op_library,
    )


def _openvino(name: str, options: TargetOptions) -> Target:
    from corp_onnx.deploy.openvino import OpenVino

    return OpenVino(options.threads)


TARGETS: Mapping[str, Callable[[str, TargetOptions], Target]] = {
    "ort-cpu": _onnx_runtime,
    "ort-cuda": _onnx_runtime,
    "ort-tensorrt": _onnx_runtime,
    "ort-openvino": _onnx_runtime,
    "openvino": _openvino,
}
"""Every target, and what makes it."""
