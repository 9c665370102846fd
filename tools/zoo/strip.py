"""Leave out of a file what can be drawn again, and what tells of the machine that wrote it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from tests.zoo_models import mark, tensors_of

LARGE = 100
"""Weights with more values than this are drawn on loading."""


def strip(model: onnx.ModelProto, parameters: Mapping[str, np.ndarray]) -> list[str]:
    """Leave out every large tensor that is a parameter, or several side by side.

    Returns:
        The large tensors of floating point that stay.
    """
    _drop_metadata(model)
    by_size: dict[int, list[str]] = {}
    for name, value in parameters.items():
        by_size.setdefault(value.size, []).append(name)
    left = []
    for tensor in tensors_of(model):
        values = numpy_helper.to_array(tensor)
        if values.size <= LARGE or values.dtype.kind != "f":
            continue
        recipe = _recipe(values, parameters, by_size)
        if recipe:
            mark(tensor, recipe)
        else:
            left.append(f"{tensor.name} {list(values.shape)}")
    return left


def _recipe(
    values: np.ndarray, parameters: Mapping[str, np.ndarray], by_size: Mapping[int, list[str]]
) -> str | None:
    """How to draw a tensor again: a parameter as it was, transposed, or three side by side."""
    for name in by_size.get(values.size, ()):
        form = _form(values, parameters[name].astype(values.dtype))
        if form is not None:
            shape = ",".join(map(str, parameters[name].shape))
            return f"{name}:{shape}{form}"
    if values.ndim == 2 and values.shape[1] % 3 == 0:
        parts = [_recipe(part, parameters, by_size) for part in np.split(values, 3, axis=1)]
        if all(parts) and not any("|" in part for part in parts if part):
            return "|".join(part for part in parts if part)
    return None


def _form(values: np.ndarray, parameter: np.ndarray) -> str | None:
    """``""`` for a parameter in another shape, ``":T"`` for one that was transposed first."""
    flat = values.reshape(-1)
    if np.array_equal(flat, parameter.reshape(-1)):
        return ""
    if parameter.ndim > 1 and np.array_equal(flat, parameter.T.reshape(-1)):
        return ":T"
    if values.ndim == 4 and values.shape == parameter.shape and _is_rescaled(values, parameter):
        return ""
    return None


def _is_rescaled(values: np.ndarray, parameter: np.ndarray) -> bool:
    """Whether a batch norm was folded into a convolution; leaving it out changes no structure."""
    ratio = values / np.where(parameter == 0, np.nan, parameter)
    per_channel = ratio.reshape(len(ratio), -1)
    return bool(np.nanmax(np.ptp(per_channel, axis=1) / np.abs(per_channel[:, 0])) < 1e-3)


def _drop_metadata(model: onnx.ModelProto) -> None:
    """Remove what torch notes about its own sources: stack traces with paths of this machine."""
    model.ClearField("doc_string")
    for owner in (model, *model.functions):
        del owner.metadata_props[:]
    for function in model.functions:
        function.ClearField("doc_string")
        for node in function.node:
            del node.metadata_props[:]
            node.ClearField("doc_string")
    graph = model.graph
    graph.ClearField("doc_string")
    del graph.metadata_props[:]
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
