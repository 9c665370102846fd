"""Execution providers of ONNX Runtime: which are installed, and by which distribution."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from types import ModuleType

from corp_onnx.errors import BackendUnavailable

_log = logging.getLogger(__name__)

CPU: tuple[str, ...] = ("CPUExecutionProvider",)
CUDA: tuple[str, ...] = ("CUDAExecutionProvider", *CPU)

EXACT: Mapping[str, Mapping[str, str]] = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""Options for statistics, which need all digits of float32; TF32, the default there, has three."""

DISTRIBUTIONS = (
    "onnxruntime",
    *(f"onnxruntime-{kind}" for kind in ("gpu", "openvino", "directml", "qnn", "rocm", "training")),
)
"""All hold one package, in one folder."""

MISSING = (
    "ONNX Runtime is not installed; install it with `pip install 'corp_onnx[cpu]'`, or on a "
    "machine with an NVIDIA GPU with `pip install 'corp_onnx[gpu]'`"
)


@functools.cache
def conflict() -> str:
    """What is wrong where several distributions are installed, and how to mend it; else nothing."""
    found = _installed()
    if len(found) < 2:
        return ""
    return (
        f"{' and '.join(found)} are installed together and overwrite each other's files; run "
        f"{_take_gpu(found)} (or [cpu])"
    )


@functools.cache
def warn_of_conflict() -> None:
    """Say once that what runs may be any of several, where several are installed."""
    if conflict():
        _log.warning("%s", conflict())


def require_available(ort: ModuleType, names: Sequence[str]) -> None:
    """Fail where the installed ONNX Runtime was built without a provider.

    Raises:
        BackendUnavailable: With those that it has, and for CUDA the commands that bring it.
    """
    available = ort.get_available_providers()
    missing = [name for name in names if name not in available]
    if not missing:
        return
    advice = "choose one of these with --providers or --target"
    if CUDA[0] in missing:
        advice += f", or, for a CUDA device: {conflict() or _take_gpu(_installed())}"
    raise BackendUnavailable(
        f"execution provider {', '.join(missing)} is not in the installed ONNX Runtime, which has "
        f"{', '.join(available)}; {advice}"
    )


def load_libraries(ort: ModuleType, names: Sequence[str]) -> None:
    """Load CUDA libraries that came as wheels; ONNX Runtime prints what it does not find."""
    if CUDA[0] not in names or not hasattr(ort, "preload_dlls"):  # before 1.21
        return
    with contextlib.redirect_stdout(io.StringIO()) as said:
        ort.preload_dlls()
    if said.getvalue():
        _log.info("%s", said.getvalue().strip())


def require_started(names: Sequence[str], started: Sequence[str]) -> None:
    """Fail where ONNX Runtime has left a provider out, which it does without an error.

    Raises:
        BackendUnavailable: With what it would run on instead.
    """
    idle = [name for name in names if name not in started]
    if idle:
        raise BackendUnavailable(
            f"ONNX Runtime could not start {', '.join(idle)} and would run on {', '.join(started)} "
            "instead; check driver and libraries (`nvidia-smi`; the gpu extra brings CUDA 13 and "
            "cuDNN 9, --log-level info says what was not found), or choose with --providers"
        )


def _installed() -> list[str]:
    """The distributions of ONNX Runtime."""
    return [name for name in DISTRIBUTIONS if _is_installed(name)]


def _take_gpu(found: Sequence[str]) -> str:
    """How to have the distribution with CUDA instead of those that are installed."""
    named = " ".join(found) or DISTRIBUTIONS[0]
    return f"`pip uninstall -y {named}`, then `pip install 'corp_onnx[gpu]'`"


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
