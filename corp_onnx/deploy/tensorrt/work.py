"""Runs of an engine: its memory on the device, its stream, and the time of the last run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from corp_onnx.deploy.tensorrt.bindings import told, trt
from corp_onnx.deploy.tensorrt.cuda import Graph, Memory, Stream
from corp_onnx.deploy.tensorrt.tensors import Tensors
from corp_onnx.errors import DataError, GraphError

Shapes = Mapping[str, tuple[int, ...]]


class Work:
    """One context with its memory and its stream."""

    def __init__(
        self,
        engine: trt.ICudaEngine,
        tensors: Tensors,
        errors: list[str],
        *,
        cuda_graph: bool = False,
    ) -> None:
        context = engine.create_execution_context()
        if context is None:
            raise GraphError(f"the engine does not fit the device: {told(errors)}")
        self._engine, self._context, self._tensors = engine, context, tensors
        self._errors, self._cuda_graph = errors, cuda_graph
        self._memory = {name: Memory() for name in tensors.names}
        self._stream = Stream()
        self._graph: Graph | None = None
        self._bound: Shapes | None = None
        self.device_ms: float | None = None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Copy inputs to the device, run, copy outputs back, wait."""
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

    def keep_quiet(self) -> None:
        """Annotate nothing for profilers of the whole machine: that takes time of every run."""
        self._context.nvtx_verbosity = trt.ProfilingVerbosity.NONE

    def watch(self, profiler: trt.IProfiler) -> None:
        """Report the time of every layer from now on."""
        self._profiler = profiler  # the context does not keep it
        self._context.profiler = profiler

    def close(self) -> None:
        """Give back all that is on the device."""
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
            raise GraphError(f"TensorRT does not take memory for {name}: {told(self._errors)}")

    def _outside(self, name: str, shape: tuple[int, ...]) -> str:
        fixed = list(self._engine.get_tensor_shape(name))
        if min(fixed, default=0) >= 0:
            return f"the engine takes {name} as {fixed}, not {list(shape)}"
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
            raise GraphError(f"TensorRT cannot run the engine: {told(self._errors)}")

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
