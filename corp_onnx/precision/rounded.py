"""A 16-bit model as it computes: in float32, with every tensor rounded as its type says.

ONNX Runtime on a CPU has few kernels of 16 bits: it computes in float32 and leaves out the rounding
in between, so that a square that overflows in half precision looks well there. Casts to the narrow
type and back are not left out.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from corp_onnx.graph.emit import Emitter, replace_readers
from corp_onnx.graph.facts import Facts, element_type
from corp_onnx.graph.model import Model
from corp_onnx.graph.shapes import usual_facts
from corp_onnx.precision.records import Format

FLOAT = int(onnx.TensorProto.FLOAT)


def rounding(model: Model, form: Format) -> Model:
    """The model in float32, where every tensor of the narrow type is rounded to it."""
    graph = model.graph.copy()
    facts = usual_facts(graph)
    emit = Emitter.of(graph)
    tensors = graph.tensors().values()
    narrow = [tensor for tensor in tensors if _is(tensor, form, facts)]
    for tensor in narrow:
        if isinstance(tensor, gs.Constant):
            _widen(tensor, emit.under(tensor.name))
        else:
            tensor.dtype = np.dtype(np.float32)
    for node in graph.nodes:
        if node.op == "Cast" and node.attrs["to"] == form.code:
            node.attrs["to"] = FLOAT
    for tensor in narrow:
        if tensor.inputs or any(tensor is entry for entry in graph.inputs):
            _round(graph, tensor, form, emit.under(tensor.name))
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return model.with_graph(graph)


def _widen(tensor: gs.Constant, emit: Emitter) -> None:
    wide = emit.constant("wide", np.asarray(tensor.values).astype(np.float32))
    replace_readers(tensor, wide)


def _round(graph: gs.Graph, tensor: gs.Tensor, form: Format, emit: Emitter) -> None:
    """Let all who read a tensor read it rounded; an output of the graph keeps its name."""
    narrow = emit.node("Cast", [tensor], attrs={"to": form.code})
    narrow.dtype = form.dtype if form.dtype == np.float16 else form.code
    (first,) = narrow.inputs
    wide = emit.node("Cast", [narrow], dtype=np.float32, attrs={"to": FLOAT})
    replace_readers(tensor, wide)
    first.inputs[0] = tensor
    if any(tensor is output for output in graph.outputs):
        _swap(tensor, wide, emit)


def _swap(tensor: gs.Tensor, wide: gs.Tensor, emit: Emitter) -> None:
    """Give the rounded tensor the name, and the place among the outputs, of the one before it."""
    if not tensor.inputs:
        return
    (maker,), (last,) = tensor.inputs, wide.inputs
    raw = emit.variable("raw", np.float32)
    slot = next(i for i, made in enumerate(maker.outputs) if made is tensor)
    for reader in list(tensor.outputs):
        reader.inputs = [raw if entry is tensor else entry for entry in reader.inputs]
    replace_readers(wide, tensor)
    maker.outputs[slot] = raw
    last.outputs[0] = tensor


def _is(tensor: gs.Tensor, form: Format, facts: Facts) -> bool:
    """Whether a tensor is of the type."""
    return (element_type(tensor) or facts.dtype(tensor)) == form.dtype
