"""The one door to TensorRT: found, of a version that is known, its messages kept."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from corp_onnx.deploy.tensorrt.cuda import device
from corp_onnx.errors import BackendUnavailable

if TYPE_CHECKING:
    import tensorrt as trt
else:

    class _Lazy:
        """TensorRT, imported when something is asked of it; type checkers see the module."""

        def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the module has)
            if name != "__version__" and name.startswith("__"):  # a look only, as of doctest
                raise AttributeError(name)
            return getattr(_tensorrt(), name)

    trt = _Lazy()

__all__ = [
    "HOW_TO_GET_IT",
    "major",
    "new_logger",
    "new_profiler",
    "started",
    "told",
    "trt",
    "version",
    "versions",
]

_log = logging.getLogger(__name__)

Made = TypeVar("Made")

MAJORS = (10, 11)
HOW_TO_GET_IT = (
    "install it with `pip install 'corp_onnx[tensorrt]'`, pip being told of NVIDIA's own package "
    "index as TensorRT's installation guide says; on a Jetson it comes with JetPack, so make the "
    "environment with `python -m venv --system-site-packages`"
)


def version() -> str:
    """The version of TensorRT that is installed.

    Raises:
        BackendUnavailable: If there is none, it cannot be loaded, or it is another than 10 or 11.
    """
    found = str(trt.__version__)
    if _major(found) not in MAJORS:
        raise BackendUnavailable(
            f"TensorRT {found} is installed, but 10 or 11 is needed; {HOW_TO_GET_IT}"
        )
    return found


def major() -> int:
    """The first number of the version.

    Raises:
        BackendUnavailable: As `version`.
    """
    return _major(version())


def versions() -> dict[str, str]:
    """Everything that an engine depends on, by name: libraries, driver and GPU.

    Raises:
        BackendUnavailable: If one of them is missing.
    """
    found, gpu = version(), device()
    return {
        "tensorrt": found,
        "cuda": gpu.runtime,
        "driver": gpu.driver,
        "gpu": str(gpu),
        "machine": platform.machine(),
    }


def new_logger(errors: list[str], say: Callable[[str], None] | None = None) -> trt.ILogger:
    """A logger that keeps errors, and tells all that TensorRT says; it must outlive its users.

    Args:
        errors: Where errors are added.
        say: What to do with every line; by default it goes to Python's logging.
    """
    severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
    levels = {"WARNING": logging.WARNING, "INFO": logging.INFO}

    class Recorder(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in severe:
                errors.append(msg.strip())
            if say is not None:
                say(f"[{severity.name}] {msg}")
            else:
                level = levels.get(severity.name, logging.DEBUG)
                _log.log(logging.ERROR if severity in severe else level, "%s", msg)

    return Recorder()


def new_profiler(times_ms: dict[str, list[float]]) -> trt.IProfiler:
    """A profiler that adds the time of every layer, in milliseconds, to those under its name."""

    class Stopwatch(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times_ms.setdefault(layer_name, []).append(ms)

    return Stopwatch()


def started(make: Callable[[], Made], errors: Sequence[str]) -> Made:
    """A builder or a runtime.

    Args:
        make: Makes it.
        errors: What its logger keeps.

    Raises:
        BackendUnavailable: If TensorRT has none, as where the driver is too old for it.
    """
    try:
        return make()
    except TypeError as error:  # what pybind11 makes of a null pointer
        raise BackendUnavailable(
            f"TensorRT {version()} cannot start on {device()}: {told(errors)}; see whether the "
            "driver is new enough for it"
        ) from error


def told(errors: Sequence[str]) -> str:
    """What TensorRT said in its log, for a message: its calls only say that they failed."""
    return "; ".join(errors) or "it does not say why"


def _major(found: str) -> int:
    return int(found.partition(".")[0])


def _tensorrt() -> ModuleType:
    """The tensorrt module, or an error that says how to get it."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise BackendUnavailable(
            f"the target tensorrt needs TensorRT, which cannot be imported ({error}); "
            f"{HOW_TO_GET_IT}"
        ) from error
    if not hasattr(tensorrt, "Builder"):
        raise BackendUnavailable(
            f"a folder or package called tensorrt is found, but TensorRT is not in it; "
            f"{HOW_TO_GET_IT}"
        )
    return tensorrt
