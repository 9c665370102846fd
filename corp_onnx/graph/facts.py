"""What is known of the tensors of a graph at given input sizes, as a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from corp_onnx.graph.sizes import Sizes


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """Shapes and types of tensors, and small values that do not depend on the data, by name."""

    sizes: Sizes
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    types: dict[str, onnx.TypeProto] = field(default_factory=dict)
    named: Mapping[str, int] = field(default_factory=dict)
    """Sizes of the dimensions of inputs that are not fixed, by their names."""
    chosen: set[str] = field(default_factory=set)
    """Values that an If chose by sizes, and what follows from them."""

    @property
    def filled(self) -> int:
        """How many tensors are known to hold something.

        Where sizes are too small for a model, convolutions leave nothing of them.
        """
        return sum(min(shape, default=1) > 0 for shape in self.shapes.values())

    def value(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The value of a tensor, or None if it depends on the data or is large."""
        if isinstance(tensor, gs.Constant):
            return np.asarray(tensor.values)
        return self.values.get(tensor.name)

    def dtype(self, tensor: gs.Tensor) -> np.dtype | None:
        """The element type of a tensor, or None if it could not be inferred."""
        kind = self.kind(tensor)
        return kind and onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)

    def kind(self, tensor: gs.Tensor) -> onnx.TypeProto | None:
        """The type of a tensor as protobuf, or None if it could not be inferred."""
        return self.types.get(tensor.name) or type_of_constant(tensor)

    def shape(self, tensor: gs.Tensor) -> tuple[int, ...] | None:
        """The shape of a tensor, or None if it could not be inferred."""
        if isinstance(tensor, gs.Constant):
            return tuple(tensor.shape)
        return self.shapes.get(tensor.name)

    def copy(self) -> Facts:
        """The same facts, to which others can be added."""
        known = dict(self.shapes), dict(self.values), dict(self.types)
        return Facts(self.sizes, *known, self.named, set(self.chosen))


def type_of(
    dtype: Any,  # noqa: ANN401 (an ONNX code or a NumPy type)
    shape: tuple[int, ...],
) -> onnx.TypeProto:
    """An element type and a shape as protobuf."""
    code = (
        dtype if isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    )
    return onnx.helper.make_tensor_type_proto(code, shape)


def element_type(tensor: gs.Tensor) -> np.dtype | None:
    """The type that the file gives a tensor; None if it gives none.

    The library holds it as ONNX's number where NumPy has no such type of its own.
    """
    dtype = tensor.dtype
    if isinstance(dtype, int):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    return None if dtype is None else np.dtype(dtype)


def type_of_constant(tensor: gs.Tensor) -> onnx.TypeProto | None:
    """The type of a constant as protobuf; None for other tensors."""
    if not isinstance(tensor, gs.Constant):
        return None
    return type_of(tensor.dtype, tuple(tensor.shape))


def shape_of(kind: onnx.TypeProto) -> tuple[int, ...] | None:
    """The shape in a type, if all of it is known."""
    dims = kind.tensor_type.shape.dim
    if not kind.tensor_type.HasField("shape") or any(not d.HasField("dim_value") for d in dims):
        return None
    return tuple(dim.dim_value for dim in dims)
