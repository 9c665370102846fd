"""A model in bfloat16 as the same graph in float32, to be run where bfloat16 kernels are missing.

ONNX Runtime moves bfloat16 on a CPU (Reshape, Transpose, Gather, Cast), but does not multiply it.
The weights are the same numbers; activations are not rounded in between.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "stash_type", "softmax_precision"})
"""Attributes that name an element type."""


def is_bfloat16(proto: onnx.ModelProto) -> bool:
    """Whether a model stores weights as bfloat16."""
    return any(t.data_type == TensorProto.BFLOAT16 for g in _graphs(proto.graph) for t in _held(g))


def in_float32(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with float32 for bfloat16, in weights, inputs, outputs and casts.

    Args:
        proto: A model without functions of its own; it is not changed.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    for graph in _graphs(wide.graph):
        for tensor in _held(graph):
            if tensor.data_type == TensorProto.BFLOAT16:
                values = numpy_helper.to_array(tensor).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for attribute in _attributes(graph):
            if attribute.name in TYPE_ATTRIBUTES and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    return wide


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the bodies inside its nodes, at any depth."""
    yield graph
    for attribute in _attributes(graph):
        bodies = [attribute.g] if attribute.HasField("g") else []
        for body in (*bodies, *attribute.graphs):
            yield from _graphs(body)


def _held(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every tensor with values: initializers and attributes of nodes."""
    yield from graph.initializer
    for attribute in _attributes(graph):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def _attributes(graph: onnx.GraphProto) -> Iterator[onnx.AttributeProto]:
    for node in graph.node:
        yield from node.attribute
