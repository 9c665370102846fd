"""Nodes and constants under fresh names, for graphs that are being edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import onnx
import onnx_graphsurgeon as gs


@dataclass(frozen=True, slots=True, eq=False)
class Emitter:
    """Adds nodes to one graph; names start with those of the block, and never clash."""

    graph: gs.Graph
    prefix: str
    taken: set[str]

    @classmethod
    def of(cls, graph: gs.Graph, prefix: str = "") -> Self:
        """All names of the graph are taken, and those of tensors of graphs inside it."""
        graphs = (graph, *graph.subgraphs(recursive=True))
        tensors = {name for each in graphs for name in each.tensors()}
        return cls(graph, prefix, tensors | {node.name for node in graph.nodes})

    def under(self, prefix: str) -> Self:
        """The same, with another beginning of names."""
        return replace(self, prefix=prefix)

    def constant(self, role: str, values: np.ndarray) -> gs.Constant:
        """A new initializer."""
        return gs.Constant(self._fresh(role), np.asarray(values, order="C"))

    def integers(self, role: str, values: Sequence[int]) -> gs.Constant:
        """A new initializer of int64, for shapes and indices."""
        return self.constant(role, np.asarray(values, dtype=np.int64))

    def node(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        *,
        dtype: object = None,
        attrs: Mapping[str, object] | None = None,
        domain: str | None = None,
    ) -> gs.Variable:
        """The output of a new node."""
        (output,) = self.nodes(op, inputs, count=1, dtype=dtype, attrs=attrs, domain=domain)
        return output

    def nodes(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        *,
        count: int,
        dtype: object = None,
        attrs: Mapping[str, object] | None = None,
        domain: str | None = None,
    ) -> list[gs.Variable]:
        """All outputs of a new node that has ``count`` of them."""
        ends = ["_output"] if count == 1 else [f"_output_{index}" for index in range(count)]
        name = self._fresh(op, *ends)
        outputs = [gs.Variable(f"{name}{end}", dtype=dtype) for end in ends]
        self.graph.nodes.append(
            gs.Node(op, name, dict(attrs or {}), list(inputs), list(outputs), domain=domain)
        )
        return outputs

    def variable(self, role: str, dtype: object) -> gs.Variable:
        """A tensor that no node makes yet."""
        return gs.Variable(self._fresh(role), dtype=dtype)

    def into(self, op: str, inputs: Sequence[gs.Tensor], output: gs.Tensor) -> gs.Node:
        """A new node that makes a tensor which is there already, and which no other makes."""
        node = gs.Node(op, self._fresh(op), inputs=list(inputs), outputs=[output])
        self.graph.nodes.append(node)
        return node

    def split(
        self, tensor: gs.Tensor, sizes: Sequence[int], axis: int, opset: int
    ) -> list[gs.Variable]:
        """The parts of a tensor along an axis."""
        inputs: list[gs.Tensor] = [tensor]
        attrs: dict[str, object] = {"axis": axis}
        if opset >= 13:
            inputs.append(self.integers("sizes", sizes))
        else:
            attrs["split"] = list(sizes)
        return self.nodes("Split", inputs, count=len(sizes), dtype=tensor.dtype, attrs=attrs)

    def unsqueeze(self, tensor: gs.Tensor, axes: Sequence[int], opset: int) -> gs.Tensor:
        """A tensor with axes of one at these places of the result."""
        if not axes:
            return tensor
        inputs = [tensor, self.integers("axes", axes)] if opset >= 13 else [tensor]
        attrs = {} if opset >= 13 else {"axes": list(axes)}
        return self.node("Unsqueeze", inputs, dtype=tensor.dtype, attrs=attrs)

    def cast(self, tensor: gs.Tensor, dtype: str) -> gs.Variable:
        """A tensor in another element type."""
        code = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.node("Cast", [tensor], dtype=dtype, attrs={"to": code})

    def redefine(self, node: gs.Node, value: gs.Tensor) -> None:
        """Let the output of a node, which may be one of the graph, be ``value`` instead."""
        (output,) = node.outputs
        node.outputs.clear()
        self.into("Identity", [value], output)

    def part(self, vector: gs.Tensor, start: int, end: int) -> gs.Variable:
        """Entries ``start`` to ``end`` of a vector of sizes."""
        bounds = [self.integers("start", [start]), self.integers("end", [end])]
        return self.node("Slice", [vector, *bounds], dtype=np.int64)

    def join(self, pieces: Sequence[gs.Tensor | Sequence[int]]) -> gs.Tensor:
        """A vector of sizes from constant and computed pieces; a constant if all of them are."""
        merged: list[gs.Tensor | list[int]] = []
        for piece in pieces:
            if isinstance(piece, gs.Tensor):
                merged.append(piece)
            elif merged and isinstance(merged[-1], list):
                merged[-1].extend(piece)
            else:
                merged.append(list(piece))
        tensors = [
            self.integers("sizes", piece) if isinstance(piece, list) else piece
            for piece in merged
            if not isinstance(piece, list) or piece
        ]
        if len(tensors) == 1:
            return tensors[0]
        return self.node("Concat", tensors, dtype=np.int64, attrs={"axis": 0})

    def _fresh(self, role: str, *ends: str) -> str:
        """A name that nobody has, with ``ends`` neither: the block's, and what the thing is."""
        number = 0
        while not self.taken.isdisjoint(names := self._names(f"{role}_{number}", ends)):
            number += 1
        self.taken.update(names)
        return names[0]

    def _names(self, name: str, ends: Sequence[str]) -> list[str]:
        return [f"{self.prefix}/{name}{end}" for end in ("", *ends)]


def replace_readers(
    old: gs.Tensor, new: gs.Tensor, readers: Sequence[gs.Node] | None = None
) -> None:
    """Let every node that reads ``old``, or only these, read ``new`` instead."""
    for node in list(old.outputs if readers is None else readers):
        for slot, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[slot] = new
