"""The one door to CUDA: the device, memory on it, and a stream of work with its time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from corp_onnx.errors import BackendUnavailable, GraphError

if TYPE_CHECKING:
    from cuda.bindings import runtime as cudart
else:

    class _Lazy:
        """The CUDA runtime, imported when something is asked of it."""

        def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the module has)
            if name.startswith("__"):  # whoever only looks, such as doctest
                raise AttributeError(name)
            return getattr(_runtime(), name)

    cudart = _Lazy()

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU.

    Attributes:
        name: As its maker calls it.
        capability: Its generation as CUDA counts them, such as (8, 6).
        driver: The newest CUDA that its driver knows.
        runtime: The version of the CUDA runtime in use.
    """

    name: str
    capability: tuple[int, int]
    driver: str
    runtime: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def device() -> Device:
    """The first GPU that CUDA sees.

    Raises:
        BackendUnavailable: If there is none, or no driver for it.
    """
    status, count = cudart.cudaGetDeviceCount()
    if status != cudart.cudaError_t.cudaSuccess or not count:
        raise BackendUnavailable(
            f"CUDA finds no GPU here ({_named(status)}); the target needs a machine with an NVIDIA "
            "GPU and its driver, and CUDA_VISIBLE_DEVICES must not hide it"
        )
    attributes = cudart.cudaDeviceAttr
    capability = (
        _value(cudart.cudaDeviceGetAttribute(attributes.cudaDevAttrComputeCapabilityMajor, 0)),
        _value(cudart.cudaDeviceGetAttribute(attributes.cudaDevAttrComputeCapabilityMinor, 0)),
    )
    name = _value(cudart.cudaGetDeviceProperties(0)).name.rstrip(b"\0").decode(errors="replace")
    versions = _value(cudart.cudaDriverGetVersion()), _value(cudart.cudaRuntimeGetVersion())
    return Device(name, capability, *map(_version, versions))


class Memory:
    """Bytes on the device; they only ever become more."""

    def __init__(self) -> None:
        self.address = 0
        self.size_bytes = 0

    def hold(self, size_bytes: int) -> None:
        """Have room for so many; what was there is lost if that takes another place."""
        if size_bytes > self.size_bytes or not self.address:
            self.free()
            self.address = int(_value(cudart.cudaMalloc(max(1, size_bytes))))
            self.size_bytes = size_bytes

    def free(self) -> None:
        """Give the bytes back."""
        if self.address:
            _done(cudart.cudaFree(self.address))
        self.address = self.size_bytes = 0


class Stream:
    """Work for the device, done in order, and the time that a part of it took."""

    def __init__(self) -> None:
        self._stream = _value(cudart.cudaStreamCreate())
        self._start = _value(cudart.cudaEventCreate())
        self._end = _value(cudart.cudaEventCreate())

    @property
    def handle(self) -> int:
        """The stream as other libraries take it."""
        return int(self._stream)

    def upload(self, array: np.ndarray, memory: Memory) -> None:
        """Copy to the device; the array must stay until `synchronize`."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        source = array.ctypes.data
        _done(cudart.cudaMemcpyAsync(memory.address, source, array.nbytes, kind, self._stream))

    def download(self, memory: Memory, array: np.ndarray) -> None:
        """Copy from the device; the array has it after `synchronize`."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        target = array.ctypes.data
        _done(cudart.cudaMemcpyAsync(target, memory.address, array.nbytes, kind, self._stream))

    def start_clock(self) -> None:
        """What follows is timed."""
        _done(cudart.cudaEventRecord(self._start, self._stream))

    def stop_clock(self) -> None:
        """What follows is not timed."""
        _done(cudart.cudaEventRecord(self._end, self._stream))

    def elapsed_ms(self) -> float:
        """The time between, after `synchronize`."""
        return float(_value(cudart.cudaEventElapsedTime(self._start, self._end)))

    def synchronize(self) -> None:
        """Wait until all is done."""
        _done(cudart.cudaStreamSynchronize(self._stream))

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Keep what is enqueued as a graph, which is launched at once; it is not run now."""
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _done(cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            enqueue()
        finally:
            captured = cudart.cudaStreamEndCapture(self._stream)
        return Graph(_value(captured), self._stream)

    def close(self) -> None:
        """Give back the stream and its events."""
        _done(cudart.cudaEventDestroy(self._start))
        _done(cudart.cudaEventDestroy(self._end))
        _done(cudart.cudaStreamDestroy(self._stream))


class Graph:
    """Work that was captured, ready to be launched in its stream."""

    def __init__(self, graph: cudart.cudaGraph_t, stream: cudart.cudaStream_t) -> None:
        self._stream = stream
        try:
            self._launchable = _value(cudart.cudaGraphInstantiate(graph, 0))
        finally:
            _done(cudart.cudaGraphDestroy(graph))

    def launch(self) -> None:
        """Enqueue all of it."""
        _done(cudart.cudaGraphLaunch(self._launchable, self._stream))

    def close(self) -> None:
        """Give it back."""
        _done(cudart.cudaGraphExecDestroy(self._launchable))


def _value(result: tuple[cudart.cudaError_t, Value]) -> Value:
    _done(result)
    return result[1]


def _done(result: tuple[Any, ...]) -> None:
    """See whether a call of CUDA did what it should.

    Raises:
        GraphError: If not.
    """
    if result[0] != cudart.cudaError_t.cudaSuccess:
        raise GraphError(
            f"CUDA reports {_named(result[0])}; where memory is short, close other programs on the "
            "GPU, or take a smaller batch"
        )


def _named(status: cudart.cudaError_t) -> str:
    _, name = cudart.cudaGetErrorName(status)
    _, meaning = cudart.cudaGetErrorString(status)
    return f"{name.decode()}: {meaning.decode()}"


def _version(number: int) -> str:
    """13020 as 13.2, as CUDA counts."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _runtime() -> ModuleType:
    """The CUDA runtime, or an error that says how to get it."""
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError) as error:
        raise BackendUnavailable(
            f"the target tensorrt needs CUDA for Python, which cannot be imported ({error}); "
            "install it with `pip install cuda-python`, in the version of your CUDA, such as "
            "`pip install 'cuda-python==12.6.*'`"
        ) from error
    return runtime
