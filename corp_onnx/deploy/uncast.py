"""Casts to float32 and back, around kernels that compute in float32 whatever they are given."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from corp_onnx.graph.emit import Emitter, replace_readers
from corp_onnx.graph.facts import Facts
from corp_onnx.graph.rounding import MOST_SQUARED_ERROR, squared_error
from corp_onnx.graph.varied import probed

FLOAT = onnx.TensorProto.FLOAT
NARROW = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def without_casts(graph: gs.Graph, ops: Collection[str]) -> int:
    """Let nodes of these kinds read and write the narrow type itself, in place; how many did.

    A typed model says that a norm or a softmax is computed in float32: ``Cast, op, Cast``. Where a
    kernel sums up in float32 by itself, both casts cost three passes over memory and change
    nothing, and they hide the pattern that a runtime would fuse. Only what is cast from one type
    and, by all its readers, back to the same type is changed; weights of a norm are rounded to it
    as all others are.

    Args:
        graph: Is changed.
        ops: Kinds of nodes whose kernels are such.
    """
    nodes = [node for node in graph.nodes if node.op in ops]
    if not nodes:
        return 0
    view = _View(graph, probed(graph)[0], Emitter.of(graph))
    changed = [node for node in nodes if _uncast(node, view)]
    if changed:
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return len(changed)


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """A graph, the types in it, and the constants that were rounded."""

    graph: gs.Graph
    facts: Facts
    emit: Emitter
    rounded: dict[tuple[int, np.dtype], gs.Constant] = field(default_factory=dict)

    def shows(self, tensor: gs.Tensor) -> bool:
        """Whether anybody reads it who is no node of this graph."""
        graphs = (self.graph, *self.graph.subgraphs(recursive=True))
        return any(tensor is end for graph in graphs for end in graph.outputs)

    def narrow(self, tensor: gs.Tensor, dtype: np.dtype) -> gs.Tensor | None:
        """What was cast to float32, or a constant that rounding leaves; None of anything else."""
        if tensor.is_empty():
            return tensor
        if isinstance(tensor, gs.Constant):
            return self._constant(tensor, dtype)
        cast = tensor.inputs[0] if tensor.inputs else None
        if cast is None or cast.op != "Cast" or cast.attrs["to"] != FLOAT:
            return None
        (source,) = cast.inputs
        return source if self.facts.dtype(source) == dtype else None

    def _constant(self, tensor: gs.Constant, dtype: np.dtype) -> gs.Constant | None:
        values = np.asarray(tensor.values)
        if squared_error(values, dtype) > MOST_SQUARED_ERROR:
            return None
        key = (id(tensor), dtype)
        if key not in self.rounded:
            named = self.emit.under(tensor.name)
            self.rounded[key] = named.constant(dtype.name, values.astype(dtype))
        return self.rounded[key]


def _uncast(node: gs.Node, view: _View) -> bool:
    output, *others = node.outputs
    types = {reader.attrs["to"] if reader.op == "Cast" else FLOAT for reader in output.outputs}
    if view.shows(output) or any(other.outputs or view.shows(other) for other in others):
        return False
    if len(types) != 1 or not types <= NARROW:
        return False
    dtype = onnx.helper.tensor_dtype_to_np_dtype(*types)
    sources = [view.narrow(tensor, dtype) for tensor in node.inputs]
    if any(source is None for source in sources):
        return False
    for slot, source in enumerate(sources):
        node.inputs[slot] = source
    output.dtype = dtype
    for cast in list(output.outputs):
        if view.shows(cast.outputs[0]):
            cast.op = "Identity"
            cast.attrs.clear()
        else:
            replace_readers(cast.outputs[0], output)
    return True
