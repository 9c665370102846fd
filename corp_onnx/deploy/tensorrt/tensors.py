"""What goes in and out of an engine: names, types and shapes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from corp_onnx.deploy.tensorrt.bindings import trt
from corp_onnx.errors import DataError, GraphError
from corp_onnx.graph.inputs import InputSpec

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


class Tensors:
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

    @property
    def names(self) -> tuple[str, ...]:
        """Of all."""
        return (*(spec.name for spec in self.inputs), *self.outputs)

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
        return {spec.name: np.asarray(feeds[spec.name], order="C") for spec in self.inputs}


def _dtype(engine: trt.ICudaEngine, name: str) -> np.dtype:
    found = engine.get_tensor_dtype(name).name
    if found not in DTYPES:
        raise GraphError(f"{name} is {found}, which NumPy has no arrays of; cast it in the model")
    return DTYPES[found]
