"""Shape arithmetic that always comes to the same, written as the constant that it is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import onnx_graphsurgeon as gs

from corp_onnx.graph.emit import Emitter
from corp_onnx.graph.facts import Facts
from corp_onnx.graph.shapes import evaluate, usual_facts
from corp_onnx.graph.sizes import input_sizes
from corp_onnx.graph.varied import probed
from corp_onnx.surgery.settle import settle

CHOICES = frozenset({"If", "Loop", "Scan"})

LONG, LONG_BATCH = (2003, 509), 3
"""Sequences, of which the first is tried that the model admits; primes divide by nothing else."""

AS_IT_WAS, WHATEVER_IS_LEFT = 0, -1
"""Entries of a target of Reshape: the input's dimension at that place, and the one that follows."""


def tidy(graph: gs.Graph) -> None:
    """Write down targets of Reshape and values (`settle`) that serve all sizes; in place.

    Nodes that only served what was computed before are left to `gs.Graph.cleanup`.

    Nothing is done where the sizes that can be probed do not tell all: a graph with pictures of any
    size, with dimensions of different names that always have the same size here, or with branches
    that may depend on sizes.
    """
    if any(node.op in CHOICES for node in graph.nodes):
        return
    probes = _probes(graph)
    if _tell_apart(graph, probes):
        _write_targets(graph, probes)
        settle(graph, probes)


def _write_targets(graph: gs.Graph, probes: Sequence[Facts]) -> None:
    """Let every Reshape have a constant target, where one serves all sizes.

    Exporters compute targets from shapes at run time, node by node: ``Shape, Gather, Unsqueeze,
    Concat``. Where a dimension is that of the input at the same place it is copied, where it is the
    same at all sizes that were probed it is written down, and one more may follow from the rest. A
    dimension that is fixed is copied only if all before it are: further on it may be equal by
    chance.
    """
    emit = Emitter.of(graph, "reshape")
    for node in graph.nodes:
        if node.op != "Reshape" or isinstance(node.inputs[1], gs.Constant):
            continue
        before = [facts.shape(node.inputs[0]) for facts in probes]
        after = [facts.shape(node.outputs[0]) for facts in probes]
        target = _target(before, after)
        if target is not None:
            node.inputs[1] = emit.integers("target", target)
            node.attrs.pop("allowzero", None)


def _probes(graph: gs.Graph) -> list[Facts]:
    """Facts at short sizes, at the usual one, and at one as long as the model admits.

    The last tells sizes that are padded to a multiple from those that are fixed.
    """
    usual = usual_facts(graph)
    probes = [*probed(graph), usual]
    for sequence in LONG:
        long = evaluate(graph, input_sizes(graph, batch=LONG_BATCH, sequence=sequence))
        if long.filled >= usual.filled:
            return [*probes, long]
    return probes


def _tell_apart(graph: gs.Graph, probes: Sequence[Facts]) -> bool:
    """Whether every dimension that may vary has a course over the probes that no other has."""
    names: dict[tuple[int, ...], Hashable] = {}
    if any(tensor.shape is None for tensor in graph.inputs):
        return False
    for tensor in graph.inputs:
        courses = zip(*(facts.sizes[tensor.name] for facts in probes), strict=True)
        for place, (declared, course) in enumerate(zip(tensor.shape or (), courses, strict=False)):
            if isinstance(declared, int) and declared > 0:
                continue
            name = declared if isinstance(declared, str) and declared else (tensor.name, place)
            if len(set(course)) == 1 or names.setdefault(course, name) != name:
                return False
    return True


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
