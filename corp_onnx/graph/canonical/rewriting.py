"""What a rule is given beside its node: what is known around it, and a source of new nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph.emit import Emitter, replace_readers
from corp_onnx.graph.facts import Facts
from corp_onnx.graph.operators import SIZE_OPS

Outputs = Sequence[gs.Variable]
"""For every output of a node, the tensor that takes its place."""


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """A graph in which one node is looked at: its opset, what is known of it, new nodes."""

    opset: int
    facts: Facts
    """Of the graph as it was before any rule was applied, at a batch of two."""
    emit: Emitter
    rows: dict[str, gs.Tensor]
    """Masks of whole rows that were made of lengths, by the name of the lengths."""

    def beside(self, node: gs.Node) -> Bench:
        """The same bench, with new nodes named after ``node``."""
        return replace(self, emit=replace(self.emit, prefix=node.name))

    def shape(self, tensor: gs.Tensor) -> tuple[int, ...] | None:
        """The shape of a tensor, of which only ranks and fixed sizes are to be used."""
        return self.facts.shape(tensor)

    def dtype(self, tensor: gs.Tensor) -> np.dtype | None:
        """The element type of a tensor."""
        return self.facts.dtype(tensor)

    def turned(self, tensor: gs.Tensor, perm: Sequence[int]) -> gs.Tensor:
        """A tensor with its axes in another order; a constant stays one."""
        if list(perm) == sorted(perm):
            return tensor
        if isinstance(tensor, gs.Constant):
            return self.emit.constant("turned", np.asarray(tensor.values).transpose(perm))
        return self.emit.node("Transpose", [tensor], dtype=tensor.dtype, attrs={"perm": list(perm)})


Rule = Callable[[gs.Node, Bench], "Outputs | None"]
"""Rewrites a node, or leaves the graph as it is and answers None."""


def is_read(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether anybody reads a tensor."""
    return bool(tensor.outputs) or any(tensor is output for output in graph.outputs)


def sole_reader(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The only one who reads the values of a tensor, the caller included; its size is anybody's."""
    readers: list[gs.Node] = [node for node in tensor.outputs if node.op not in SIZE_OPS]
    if len(readers) != 1 or any(tensor is output for output in graph.outputs):
        return None
    return readers[0]


def instead(graph: gs.Graph, node: gs.Node, outputs: Outputs) -> None:
    """Take a node out of the graph; the makers of ``outputs`` now make its outputs."""
    old = list(node.outputs)
    node.outputs.clear()
    node.inputs.clear()
    graph.nodes.remove(node)
    for mine, made in zip(old, outputs, strict=False):
        if mine.name:
            (maker,) = made.inputs
            maker.outputs[next(i for i, t in enumerate(maker.outputs) if t is made)] = mine
            replace_readers(made, mine)
