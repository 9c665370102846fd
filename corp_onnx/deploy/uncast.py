"""Casts to float32 and back, around kernels that compute in float32 whatever they are given."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from corp_onnx.blocks.catalog import probed
from corp_onnx.emit import replace_readers
from corp_onnx.facts import Facts

FLOAT = onnx.TensorProto.FLOAT
NARROW = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}

LOST = 2.0**-7
"""Of a number, relative, that rounding it to either type takes at most, above their subnormals."""


def without_casts(graph: gs.Graph, ops: Collection[str]) -> int:
    """Let nodes of these kinds read and write the narrow type itself, in place; how many did.

    A typed model says that a norm or a softmax is computed in float32: ``Cast, op, Cast``. Where a
    kernel sums up in float32 by itself, both casts cost three passes over memory and change
    nothing, and they hide the pattern that a runtime would fuse. Only what is cast from one type
    and, by all its readers, back to the same type is changed.

    Args:
        graph: Is changed.
        ops: Kinds of nodes whose kernels are such.
    """
    nodes = [node for node in graph.nodes if node.op in ops]
    shown = {id(tensor) for tensor in graph.outputs}
    facts = probed(graph)[0] if nodes else None
    changed = [node for node in nodes if facts and _uncast(node, shown, facts)]
    if changed:
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return len(changed)


def _uncast(node: gs.Node, shown: Collection[int], facts: Facts) -> bool:
    output = node.outputs[0]
    types = {reader.attrs["to"] if reader.op == "Cast" else FLOAT for reader in output.outputs}
    seen = any(id(tensor) in shown or tensor.outputs for tensor in node.outputs[1:])
    if id(output) in shown or seen or len(types) != 1 or not types <= NARROW:
        return False
    (kind,) = types
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    sources = [_narrow(tensor, dtype, facts) for tensor in node.inputs]
    if any(source is None for source in sources):
        return False
    for slot, source in enumerate(sources):
        node.inputs[slot] = source
    output.dtype = dtype
    for cast in list(output.outputs):
        if id(cast.outputs[0]) in shown:
            cast.op = "Identity"
            cast.attrs.clear()
        else:
            replace_readers(cast.outputs[0], output)
    return True


def _narrow(tensor: gs.Tensor, dtype: np.dtype, facts: Facts) -> gs.Tensor | None:
    """What was cast to float32, or a constant that loses no more than any weight; else None."""
    if isinstance(tensor, gs.Constant):
        wide = np.asarray(tensor.values)
        with np.errstate(over="ignore"):
            rounded = wide.astype(dtype)
        close = np.allclose(rounded.astype(wide.dtype), wide, rtol=LOST, atol=0.0)
        return gs.Constant(f"{tensor.name}/{dtype.name}", rounded) if close else None
    if not tensor.inputs or tensor.inputs[0].op != "Cast":
        return None
    source = tensor.inputs[0].inputs[0]
    return source if facts.dtype(source) == dtype else None
