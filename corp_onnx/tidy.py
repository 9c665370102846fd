"""Shape arithmetic that always comes to the same, written as the constant that it is."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from corp_onnx.blocks.catalog import probed
from corp_onnx.emit import Emitter
from corp_onnx.facts import Facts
from corp_onnx.shapes import usual_facts

CHOICES = frozenset({"If", "Loop", "Scan"})

AS_IT_WAS, WHATEVER_IS_LEFT = 0, -1
"""Entries of a target of Reshape: the input's dimension at that place, and the one that follows."""


def tidy_reshapes(graph: gs.Graph) -> None:
    """Let every Reshape have a constant target, where one serves all sizes; in place.

    Exporters compute targets from shapes at run time, node by node: ``Shape, Gather, Unsqueeze,
    Concat``. Where a dimension is that of the input at the same place it is copied, where it is the
    same at all sizes that were probed it is written down, and one more may follow from the rest. A
    dimension that is fixed is copied only if all before it are: further on it may be equal by
    chance.
    Nodes that only served the old target are left to `gs.Graph.cleanup`.

    Nothing is done where the sizes that can be probed do not tell all: a graph with pictures of any
    size, or with branches that may depend on sizes.
    """
    if any(node.op in CHOICES for node in graph.nodes):
        return
    probes = [*probed(graph), usual_facts(graph)]
    if not all(_varies(tensor, probes) for tensor in graph.inputs):
        return
    emit = Emitter(graph, "reshape", set(graph.tensors()) | {node.name for node in graph.nodes})
    for node in graph.nodes:
        if node.op != "Reshape" or isinstance(node.inputs[1], gs.Constant):
            continue
        before = [facts.shape(node.inputs[0]) for facts in probes]
        after = [facts.shape(node.outputs[0]) for facts in probes]
        target = _target(before, after)
        if target is not None:
            node.inputs[1] = emit.integers("target", target)
            node.attrs.pop("allowzero", None)


def _varies(tensor: gs.Tensor, probes: Sequence[Facts]) -> bool:
    """Whether every dimension of an input that is not fixed is probed at more than one size."""
    sizes = zip(*(facts.sizes[tensor.name] for facts in probes), strict=True)
    return all(
        isinstance(declared, int) or len(set(found)) > 1
        for declared, found in zip(tensor.shape or (), sizes, strict=False)
    )


def _target(
    before: Sequence[tuple[int, ...] | None], after: Sequence[tuple[int, ...] | None]
) -> list[int] | None:
    """A constant target that gives these shapes from those; None if there is none."""
    known = [(x, y) for x, y in zip(before, after, strict=True) if x is not None and y is not None]
    if len(known) < len(before) or any(0 in y for _, y in known):
        return None
    target: list[int] = []
    for place in range(len(known[0][1])):
        sizes = {y[place] for _, y in known}
        copied = all(place < len(x) and x[place] == y[place] for x, y in known)
        in_line = all(entry == AS_IT_WAS for entry in target)
        if copied and (in_line or len(sizes) > 1):
            target.append(AS_IT_WAS)
        else:
            target.append(sizes.pop() if len(sizes) == 1 else WHATEVER_IS_LEFT)
    return target if target.count(WHATEVER_IS_LEFT) <= 1 else None
