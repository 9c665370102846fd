"""Functions that a model brings along, written out where they are called."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx.inliner import inline_local_functions

from corp_onnx.errors import GraphError
from corp_onnx.graph.operators import STANDARD


def inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model without functions of its own; ``proto`` itself if it has none.

    A function may be written for another opset than the model, as long as its operators are the
    same in both.

    Raises:
        GraphError: If they are not.
    """
    if not proto.functions:
        return proto
    aligned = onnx.ModelProto()
    aligned.CopyFrom(proto)
    imported = {entry.domain: entry.version for entry in proto.opset_import}
    for function in aligned.functions:
        for entry in function.opset_import:
            wanted = imported.get(entry.domain, entry.version)
            if entry.domain not in STANDARD or entry.version == wanted:
                continue
            changed = _first_changed(function.node, entry.version, wanted)
            if changed:
                raise GraphError(
                    f"the function {function.name!r} is written for opset {entry.version} and the "
                    f"model for opset {wanted}, in which {changed} is another operator; export the "
                    "model again without functions, or inline them with onnx.inliner"
                )
            entry.version = wanted
    return inline_local_functions(aligned)


def _first_changed(nodes: Iterable[onnx.NodeProto], one: int, other: int) -> str | None:
    """An operator among nodes and their bodies that two opsets define differently."""
    for node in nodes:
        for attribute in node.attribute:
            below = _first_changed(attribute.g.node, one, other)
            if below:
                return below
        if node.domain in STANDARD and _since(node.op_type, one) != _since(node.op_type, other):
            return str(node.op_type)
    return None


def _since(op: str, opset: int) -> int:
    """The opset that brought an operator in the form that it has; 0 if it is not known."""
    return int(onnx.defs.get_schema(op, opset).since_version) if onnx.defs.has(op, opset) else 0
