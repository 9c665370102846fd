"""A graph as the recognisers see it: who feeds whom, what is constant, what is linear."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.records import Linear
from corp_onnx.graph import reference
from corp_onnx.graph.facts import Facts
from corp_onnx.graph.fixed import fixed_value
from corp_onnx.graph.operators import FOLDED_OPS, SIZE_OPS, is_standard
from corp_onnx.graph.reference import ROUNDING_OPS
from corp_onnx.graph.shapes import COMPUTED_OPS

OPEN_SIZE = (
    "size is not known: it depends on the data, or the model runs at one size only (see --shapes)"
)
"""What is said of a tensor whose shape could not be inferred."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A graph with what is known of it at several sets of input sizes and its linear layers."""

    graph: gs.Graph
    opset: int
    probes: tuple[Facts, ...]
    order: dict[int, int]
    """Position of every node, by its ``id``."""
    linears: dict[str, Linear]
    """Linear layers by the name of their output."""
    holders: dict[int, gs.Node]
    """For every node inside a body, by its ``id``: the node of the graph that has the body."""
    fixed: dict[str, bool] = field(default_factory=dict)
    """Which values are the same at all sizes, of those that were asked for."""
    rotary: bool = False
    """Whether queries and keys that are turned by their position are offered."""
    memory: dict[Hashable, Any] = field(default_factory=dict)
    """What was read off movement, by its pattern: it is the same in every layer that repeats."""

    def known(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The value of a tensor that is the same for all data and sizes, else None."""
        return fixed_value(self.probes, tensor, self.fixed)

    def shape(self, tensor: gs.Tensor) -> tuple[int, ...] | None:
        """The shape of a tensor at the first set of sizes."""
        return self.probes[0].shape(tensor)

    def readers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """Nodes of the graph that read a tensor; for one inside a body, that which has the body."""
        found = (self.holders.get(id(node), node) for node in tensor.outputs)
        return list({id(node): node for node in found}.values())

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is an output of the graph."""
        return any(tensor is output for output in self.graph.outputs)

    def in_order(self, nodes: Iterable[gs.Node]) -> list[gs.Node]:
        """Nodes without repetition, in the order of the graph."""
        return sorted({id(node): node for node in nodes}.values(), key=lambda n: self.order[id(n)])


def holders_of(graph: gs.Graph) -> dict[int, gs.Node]:
    """For every node inside the body of an If, Loop or Scan, at any depth: who has the body."""
    return {
        id(inner): node
        for node in graph.nodes
        for body in node.subgraphs(recursive=True)
        for inner in body.nodes
    }


def follows_data(tensor: gs.Tensor) -> bool:
    """Whether a tensor depends on what is in the inputs, rather than on their shapes alone."""
    stack, seen = [tensor], set()
    while stack:
        current = stack.pop()
        if isinstance(current, gs.Constant) or not current.name or current.name in seen:
            continue
        seen.add(current.name)
        node = producer(current)
        if node is None:
            return True
        if node.op not in SIZE_OPS:
            stack.extend(node.inputs)
    return False


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes a tensor; None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def layers_above(view: View, tensor: gs.Tensor) -> list[gs.Tensor]:
    """What the linear layers above a tensor give, whatever stands in between, the nearest first."""
    found: dict[str, gs.Tensor] = {}
    waiting, seen = [tensor], set()
    while waiting:
        current = waiting.pop(0)
        if current.name in view.linears:
            found[current.name] = current
            continue
        node = producer(current)
        if node is None or node.op in SIZE_OPS or current.name in seen:
            continue
        seen.add(current.name)
        waiting.extend(value for value in node.inputs if view.known(value) is None)
    return list(found.values())


def constant_value(tensor: gs.Tensor, opset: int) -> np.ndarray | None:
    """The value of a constant, read through the operators of `FOLDED_OPS`; else None."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    node = producer(tensor)
    if node is None or node.op not in FOLDED_OPS:
        return None
    if not is_standard(node) and node.op not in ROUNDING_OPS:
        return None
    values = {}
    for source in node.inputs:
        value = constant_value(source, opset)
        if value is None:
            return None
        values[source.name] = value
    slot = next(index for index, output in enumerate(node.outputs) if output is tensor)
    return reference.run(node, values, opset)[slot]


def serves_only(start: gs.Node, served: Set[int], asking: Set[int] = frozenset()) -> bool:
    """Whether all that follows from ``start`` is shape arithmetic that ends in ``served`` nodes.

    Nodes are given by ``id``; those that are ``asking`` need what they read.
    """
    stack, seen = [start], set()
    while stack:
        node = stack.pop()
        if id(node) in served or id(node) in seen:
            continue
        seen.add(id(node))
        readers = list(_readers(node))
        if node.op not in COMPUTED_OPS or not readers or id(node) in asking:
            return False
        stack.extend(readers)
    return True


def _readers(node: gs.Node) -> Iterator[gs.Node]:
    for tensor in node.outputs:
        yield from tensor.outputs


def reduced_axes(view: View, node: gs.Node) -> list[int]:
    """The axes that a reduction runs over; empty for all of them."""
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        axes = view.known(node.inputs[1])
    return [] if axes is None else [int(axis) for axis in np.ravel(axes)]
