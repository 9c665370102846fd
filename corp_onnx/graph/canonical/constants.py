"""Constants as tensors and never as nodes, weights in one piece, a name for every node."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph import reference
from corp_onnx.graph.emit import replace_readers
from corp_onnx.graph.facts import Facts, element_type
from corp_onnx.graph.operators import is_standard
from corp_onnx.graph.varied import probed


def constants_from_nodes(graph: gs.Graph) -> None:
    """Turn every Constant node into a constant tensor of the same name.

    What is only another name of a constant, as exporters give to weights that are equal, goes.
    """
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        named = node.op == "Identity" and isinstance(node.inputs[0], gs.Constant)
        if named and is_standard(node) and id(node.outputs[0]) not in outputs:
            replace_readers(node.outputs[0], node.inputs[0])
        value = _value(node) if node.op == "Constant" else None
        if value is None or id(node.outputs[0]) in outputs:
            continue
        (output,) = node.outputs
        node.outputs.clear()
        output.to_constant(value)


def cut_weights(graph: gs.Graph) -> None:
    """Carry out Slice and Split of weights where sizes of tensors decide, always in the same way.

    Packed projections are taken apart so, at bounds that follow from the width of an activation.
    """
    cuts = [node for node in graph.nodes if _cuts_weight(node)]
    if not cuts:
        return
    probes = probed(graph)
    for node in cuts:
        first, *others = (_bounds(node, facts) for facts in probes)
        if first is not None and all(other and _same(first, other) for other in others):
            _carry_out(node, first, graph.opset)


def name_every_node(graph: gs.Graph) -> None:
    """Give nodes without a name, or with a name already taken, one of their own."""
    taken = {node.name for node in graph.nodes}
    seen: set[str] = {""}
    for index, node in enumerate(graph.nodes):
        if node.name in seen:
            name = f"{node.name or node.op}_{index}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
        seen.add(node.name)


def _cuts_weight(node: gs.Node) -> bool:
    """Whether a node cuts a floating-point constant where something else than constants says."""
    return (
        node.op in {"Slice", "Split"}
        and isinstance(node.inputs[0], gs.Constant)
        and "float" in str(element_type(node.inputs[0]))
        and any(isinstance(tensor, gs.Variable) and tensor.name for tensor in node.inputs[1:])
    )


def _bounds(node: gs.Node, facts: Facts) -> dict[str, np.ndarray] | None:
    """Where a node cuts, by tensor name; None if the data decide."""
    values = {tensor.name: facts.value(tensor) for tensor in node.inputs[1:] if tensor.name}
    known = {name: value for name, value in values.items() if value is not None}
    return known if len(known) == len(values) else None


def _same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(value, other[name]) for name, value in one.items())


def _carry_out(node: gs.Node, bounds: dict[str, np.ndarray], opset: int) -> None:
    """Turn the outputs of a node into constants."""
    weight = node.inputs[0]
    parts = reference.run(node, {**bounds, weight.name: np.asarray(weight.values)}, opset)
    outputs = list(node.outputs)
    node.outputs.clear()
    for tensor, part in zip(outputs, parts, strict=True):
        tensor.to_constant(part)


def _value(node: gs.Node) -> np.ndarray | None:
    """The value of a Constant node; None if it is sparse or text."""
    value = node.attrs.get("value")
    if isinstance(value, gs.Constant):
        return np.asarray(value.values)
    for suffix, dtype in (("float", np.float32), ("int", np.int64)):
        for name in (f"value_{suffix}", f"value_{suffix}s"):
            if name in node.attrs:
                return np.asarray(node.attrs[name], dtype=dtype)
    return None
