"""Constants as tensors and never as nodes, and a name for every node."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs


def constants_from_nodes(graph: gs.Graph) -> None:
    """Turn every Constant node into a constant tensor of the same name."""
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        value = _value(node) if node.op == "Constant" else None
        if value is None or id(node.outputs[0]) in outputs:
            continue
        (output,) = node.outputs
        node.outputs.clear()
        output.to_constant(value)


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
