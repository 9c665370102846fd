"""An engine at work: its memory on the device, its runs, and the time that they take there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx

from corp_onnx.data import InputSpec
from corp_onnx.deploy.records import Build
from corp_onnx.deploy.tensorrt.cuda import Graph, Memory, Stream, device
from corp_onnx.deploy.tensorrt.library import new_logger, new_profiler, trt, version
from corp_onnx.errors import DataError, GraphError

Shapes = Mapping[str, tuple[int, ...]]

DTYPES: Mapping[str, np.dtype] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16),
    "INT8": np.dtype(np.int8),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
}
"""TensorRT's types by their names there."""


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
        GraphError: If it cannot be loaded here, as when another version or GPU built it.
    """

    def __init__(self, build: Build, *, cuda_graph: bool = False) -> None:
        self._errors: list[str] = []
        self._logger = new_logger(self._errors)
        self._runtime = trt.Runtime(self._logger)
        self._engine = _deserialised(self._runtime, build, self._errors)
        self._tensors = _Tensors(self._engine)
        self._work = _Work(self._engine, self._tensors, self._errors, cuda_graph=cuda_graph)

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
        work = _Work(self._engine, self._tensors, self._errors)
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


class _Tensors:
    """What goes in and out of an engine."""

    def __init__(self, engine: trt.ICudaEngine) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inside = trt.TensorIOMode.INPUT
        self.inputs = tuple(
            InputSpec(
                name,
                _dtype(engine, name),
                tuple(None if size < 0 else size for size in engine.get_tensor_shape(name)),
            )
            for name in names
            if engine.get_tensor_mode(name) == inside
        )
        self.outputs = {
            name: _dtype(engine, name) for name in names if engine.get_tensor_mode(name) != inside
        }

    def taken(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs, laid out as the device has them."""
        missing = [spec.name for spec in self.inputs if spec.name not in feeds]
        if missing:
            raise DataError(f"the engine also reads {', '.join(missing)}; got {', '.join(feeds)}")
        for spec in self.inputs:
            if feeds[spec.name].dtype != spec.dtype:
                raise DataError(
                    f"{spec.name} is {feeds[spec.name].dtype}, but the engine reads {spec.dtype}; "
                    "convert it with .astype first"
                )
        return {spec.name: np.ascontiguousarray(feeds[spec.name]) for spec in self.inputs}


class _Work:
    """One context with its memory and its stream."""

    def __init__(
        self,
        engine: trt.ICudaEngine,
        tensors: _Tensors,
        errors: list[str],
        *,
        cuda_graph: bool = False,
    ) -> None:
        context = engine.create_execution_context()
        if context is None:
            raise GraphError(f"the engine does not fit the device: {_told(errors)}")
        context.nvtx_verbosity = trt.ProfilingVerbosity.NONE
        self._engine, self._context, self._tensors = engine, context, tensors
        self._errors, self._cuda_graph = errors, cuda_graph
        self._memory = {name: Memory() for name in _names(tensors)}
        self._stream = Stream()
        self._graph: Graph | None = None
        self._bound: Shapes | None = None
        self.device_ms: float | None = None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = self._tensors.taken(feeds)
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self._bound:
            self._bind(shapes)
        for name, array in arrays.items():
            self._stream.upload(array, self._memory[name])
        if self._cuda_graph and self._graph is None:
            self._graph = self._captured()
        self._stream.start_clock()
        self._launch()
        self._stream.stop_clock()
        results = {
            name: np.empty(tuple(self._context.get_tensor_shape(name)), dtype)
            for name, dtype in self._tensors.outputs.items()
        }
        for name, result in results.items():
            self._stream.download(self._memory[name], result)
        self._stream.synchronize()
        self.device_ms = self._stream.elapsed_ms()
        return results

    def watch(self, profiler: trt.IProfiler) -> None:
        """Report the time of every layer from now on."""
        self._profiler = profiler  # the context does not keep it
        self._context.profiler = profiler

    def close(self) -> None:
        self._drop_graph()
        for memory in self._memory.values():
            memory.free()
        self._stream.close()
        del self._context

    def _bind(self, shapes: Shapes) -> None:
        """Memory for inputs of these shapes, and for the outputs that they make."""
        self._bound = None
        self._drop_graph()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise DataError(self._outside(name, shape))
        unknown = self._context.infer_shapes()
        if unknown:
            raise GraphError(f"TensorRT cannot tell the sizes of {', '.join(unknown)}")
        for spec in self._tensors.inputs:
            self._place(spec.name, shapes[spec.name], spec.dtype)
        for name, dtype in self._tensors.outputs.items():
            self._place(name, tuple(self._context.get_tensor_shape(name)), dtype)
        self._bound = dict(shapes)

    def _place(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if min(shape, default=0) < 0:
            raise GraphError(
                f"the size of output {name} depends on values, not only on shapes; cut the model "
                "off before it"
            )
        self._memory[name].hold(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        if not self._context.set_tensor_address(name, self._memory[name].address):
            raise GraphError(f"TensorRT does not take memory for {name}: {_told(self._errors)}")

    def _outside(self, name: str, shape: tuple[int, ...]) -> str:
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        return (
            f"the engine takes {name} from {list(low)} to {list(high)}, not {list(shape)}; build "
            "it again with other --min-shapes and --max-shapes"
        )

    def _launch(self) -> None:
        if self._graph is not None:
            self._graph.launch()
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        self._errors.clear()
        if not self._context.execute_async_v3(self._stream.handle):
            raise GraphError(f"TensorRT cannot run the engine: {_told(self._errors)}")

    def _captured(self) -> Graph:
        """A run as a graph, after one as usual: what follows from new shapes is not captured."""
        self._enqueue()
        self._stream.synchronize()
        try:
            return self._stream.capture(self._enqueue)
        except GraphError as error:
            raise GraphError(
                f"{error}. Not every engine can be a CUDA graph: do without"
            ) from error

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
        self._graph = None


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
            f"{_told(errors)}. An engine belongs to one version and one kind of GPU: build it again"
        )
    return engine


def _dtype(engine: trt.ICudaEngine, name: str) -> np.dtype:
    found = engine.get_tensor_dtype(name).name
    if found not in DTYPES:
        raise GraphError(f"{name} is {found}, which NumPy has no arrays of; cast it in the model")
    return DTYPES[found]


def _names(tensors: _Tensors) -> list[str]:
    return [*(spec.name for spec in tensors.inputs), *tensors.outputs]


def _told(errors: Sequence[str]) -> str:
    return "; ".join(errors) or "it does not say why"
