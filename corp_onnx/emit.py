"""Nodes and constants under fresh names, for graphs that are being edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import onnx_graphsurgeon as gs


@dataclass(frozen=True, slots=True, eq=False)
class Emitter:
    """Adds nodes to one graph; names start with those of the block, and never clash."""

    graph: gs.Graph
    prefix: str
    taken: set[str]

    @classmethod
    def of(cls, graph: gs.Graph, prefix: str = "") -> Self:
        """All names of the graph are taken."""
        return cls(graph, prefix, set(graph.tensors()) | {node.name for node in graph.nodes})

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
        name = self._fresh(op)
        ends = ["output"] if count == 1 else [f"output_{index}" for index in range(count)]
        outputs = [gs.Variable(f"{name}_{end}", dtype=dtype) for end in ends]
        self.graph.nodes.append(
            gs.Node(op, name, dict(attrs or {}), list(inputs), list(outputs), domain=domain)
        )
        return outputs

    def split(
        self, tensor: gs.Tensor, sizes: Sequence[int], axis: int, opset: int
    ) -> list[gs.Variable]:
        """The parts of a tensor along an axis."""
        name = self._fresh("Split")
        outputs = [gs.Variable(f"{name}_{part}", dtype=tensor.dtype) for part in range(len(sizes))]
        node = gs.Node("Split", name, {"axis": axis}, [tensor], outputs)
        if opset >= 13:
            node.inputs.append(self.integers("sizes", sizes))
        else:
            node.attrs["split"] = list(sizes)
        self.graph.nodes.append(node)
        return outputs

    def redefine(self, node: gs.Node, value: gs.Tensor) -> None:
        """Let the output of a node, which may be one of the graph, be ``value`` instead."""
        (output,) = node.outputs
        node.outputs.clear()
        self.graph.nodes.append(
            gs.Node("Identity", self._fresh("Identity"), inputs=[value], outputs=[output])
        )

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

    def _fresh(self, role: str) -> str:
        """A name nobody has, from the block's name and what the thing is."""
        number = 0
        while f"{self.prefix}/{role}_{number}" in self.taken:
            number += 1
        name = f"{self.prefix}/{role}_{number}"
        self.taken.add(name)
        return name


def replace_readers(
    old: gs.Tensor, new: gs.Tensor, readers: Sequence[gs.Node] | None = None
) -> None:
    """Let every node that reads ``old``, or only these, read ``new`` instead."""
    for node in list(old.outputs if readers is None else readers):
        for slot, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[slot] = new
