"""Types of tensors, and schemas of operators, as ONNX writes them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs


def shape_of(kind: onnx.TypeProto) -> tuple[int, ...] | None:
    """The sizes that a type states, or None if one of them is open."""
    dims = kind.tensor_type.shape.dim
    if not kind.tensor_type.HasField("shape") or any(not d.HasField("dim_value") for d in dims):
        return None
    return tuple(dim.dim_value for dim in dims)


def type_of_constant(tensor: gs.Tensor) -> onnx.TypeProto | None:
    """The type of a constant; None for all other tensors."""
    if not isinstance(tensor, gs.Constant):
        return None
    return type_of(tensor.dtype, tuple(tensor.shape))


@cache
def schema_of(op: str, opset: int, domain: str) -> onnx.defs.OpSchema | None:
    """The schema of an operator, or None if ONNX does not know it."""
    if not onnx.defs.has(op, opset, domain):
        return None
    return onnx.defs.get_schema(op, opset, domain)


def type_of(
    dtype: Any,  # noqa: ANN401 (an ONNX code or a NumPy type)
    shape: tuple[int, ...],
) -> onnx.TypeProto:
    """The type of a tensor of that element type and shape."""
    code = (
        dtype if isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    )
    return onnx.helper.make_tensor_type_proto(code, shape)
