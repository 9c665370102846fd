"""Edits on one graph: new linear layers, projections and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Float64

from corp_onnx.blocks.linear import bias_inside, bias_slot, dtype_of
from corp_onnx.blocks.records import Linear, SizeReader, Target
from corp_onnx.blocks.view import constant_value
from corp_onnx.graph.emit import Emitter, replace_readers


@dataclass(frozen=True, slots=True, eq=False)
class Theatre:
    """A graph being operated on: its nodes and tensors by name, and a source of new ones."""

    nodes: dict[str, gs.Node]
    tensors: dict[str, gs.Tensor]
    opset: int
    emit: Emitter
    biased: dict[str, str]
    """The Add behind every MatMul that had no bias and was given one."""

    @staticmethod
    def of(graph: gs.Graph, opset: int, emit: Emitter, biased: dict[str, str]) -> Theatre:
        """Look the graph up as it is now."""
        nodes = {node.name: node for node in graph.nodes}
        return Theatre(nodes, graph.tensors(), opset, emit, biased)

    def now(self, linear: Linear) -> Linear:
        """A linear layer with the bias that an earlier block may have given it."""
        return replace(linear, bias_node=self.biased.get(linear.node, linear.bias_node))

    def has_bias(self, linear: Linear) -> bool:
        """Whether a linear layer adds a vector."""
        return linear.bias_node is not None or bias_inside(self.nodes[linear.node]) is not None

    def set_linear(
        self,
        linear: Linear,
        weight: Float64[np.ndarray, "i o"],
        bias: Float64[np.ndarray, " o"] | None,
    ) -> None:
        """Give a linear layer a new weight and, unless None, a new bias, in its own type."""
        node = self.nodes[linear.node]
        dtype = dtype_of(self.nodes, linear, self.opset)
        stored = weight.astype(dtype)
        if node.op == "MatMulNBits":
            assert bias is not None or not self.has_bias(linear), "a bias inside is given anew"
            node.op, node.domain, node.attrs = "MatMul", None, {}
            while len(node.inputs) > 2:
                node.inputs.pop()
        if node.op == "Conv":
            old = constant_value(node.inputs[1], self.opset)
            assert old is not None, f"{linear.node} has no constant weight"
            points = old.ndim - 2
            stored = stored.T.reshape(*stored.T.shape, *[1] * points)
        node.inputs[1] = self.emit.constant("weight", stored)
        if node.op == "Gemm":
            node.attrs.update(transB=0, alpha=1.0, beta=1.0)
        if bias is not None:
            vector = self.as_bias(linear, bias.astype(dtype))
            self._set_bias(linear, self.emit.constant("bias", vector))

    def as_bias(self, linear: Linear, vector: np.ndarray) -> np.ndarray:
        """A vector with as many axes as the bias that is added behind the layer, if one is."""
        if linear.bias_node is None:
            return vector
        add = self.nodes[linear.bias_node]
        old = constant_value(add.inputs[bias_slot(add, self.opset)], self.opset)
        assert old is not None, f"{linear.bias_node} adds a constant"
        return vector.reshape([1] * (old.ndim - 1) + [-1])

    def _set_bias(self, linear: Linear, bias: gs.Constant) -> None:
        """Write a bias where the layer keeps it; a MatMul without one gets an Add."""
        node = self.nodes[linear.node]
        if len(node.inputs) > 2:
            node.inputs[2] = bias
        elif node.op != "MatMul":
            node.inputs.append(bias)
        elif linear.bias_node is not None:
            add = self.nodes[linear.bias_node]
            add.inputs[bias_slot(add, self.opset)] = bias
        else:
            (output,) = node.outputs
            node.outputs.clear()
            product = self.emit.variable("product", output.dtype)
            node.outputs.append(product)
            self.biased[linear.node] = self.emit.into("Add", [product, bias], output).name

    def split(self, whole: str, tensors: Sequence[str], size: int, axis: int) -> None:
        """Let tensors, which were split off from a layer's output, be equal parts of it now."""
        if list(tensors) == [whole]:
            return
        parts = [self.tensors[whole]]
        if len(tensors) > 1:
            parts = self.emit.split(parts[0], [size] * len(tensors), axis, self.opset)
        for name, part in zip(tensors, parts, strict=True):
            self.take_place(name, part)

    def set_target(self, target: Target, width: int) -> None:
        """Let a Reshape make ``multiple · width`` channels, its target constant or not."""
        node = self.nodes[target.node]
        sizes, size = node.inputs[1], target.multiple * width
        if isinstance(sizes, gs.Constant):
            values = [int(value) for value in sizes.values]
            values[target.axis] = size if values[target.axis] != -1 else -1
            node.inputs[1] = self.emit.integers("target", values)
            return
        before = [self.emit.part(sizes, 0, target.axis)] if target.axis else []
        behind = target.axis + 1
        after = [self.emit.part(sizes, behind, target.rank)] if behind < target.rank else []
        node.inputs[1] = self.emit.join([*before, [size], *after])

    def keep_sizes(self, readers: Sequence[SizeReader]) -> None:
        """Let Shape nodes go on saying what they said of the dense tensors."""
        for reader in readers:
            if reader.node not in self.nodes:
                continue  # in this part of the model nobody asks
            node = self.nodes[reader.node]
            if not node.outputs:  # another block of the same layer has seen to it
                continue
            pieces: list[gs.Tensor | Sequence[int]] = []
            for size in reader.sizes:
                if isinstance(size, int):
                    pieces.append([size])
                else:
                    pieces.append(self.size(self.tensors[reader.like], int(size[1:])))
            self.emit.redefine(node, self.emit.join(pieces))

    def take_place(self, name: str, new: gs.Variable) -> None:
        """Let whoever reads a tensor read ``new`` instead, the caller of the model included."""
        old, self.tensors[name] = self.tensors[name], new
        replace_readers(old, new)
        if any(old is output for output in self.emit.graph.outputs):
            (maker,) = old.inputs
            slot = next(index for index, made in enumerate(maker.outputs) if made is old)
            maker.outputs[slot] = self.emit.variable("before", old.dtype)
            self.emit.into("Identity", [new], old)

    def size(self, tensor: gs.Tensor, axis: int, count: int = 1) -> gs.Variable:
        """The size of ``count`` axes together at run time, as a vector of one entry."""
        shape = self.emit.node("Shape", [tensor], dtype=np.int64)
        sizes = self.emit.part(shape, axis, axis + count)
        if count == 1:
            return sizes
        return self.emit.node("ReduceProd", [sizes], dtype=np.int64, attrs={"keepdims": 1})
