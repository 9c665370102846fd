"""Which inputs and outputs of a node are float32, and which of them may become 16 bits wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from corp_onnx.data.batching import Batch
from corp_onnx.graph.facts import Facts, element_type
from corp_onnx.graph.model import Model
from corp_onnx.graph.operators import is_standard
from corp_onnx.graph.shapes import evaluate, usual_facts
from corp_onnx.precision.records import Format

FLOAT = "tensor(float)"


@dataclass(frozen=True, slots=True)
class Types:
    """What a set of operators says of their types, and what a graph says of its tensors."""

    facts: Facts
    opset: int
    format: Format

    def is_float(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is known to be float32."""
        return self.known(tensor) == np.float32

    def known(self, tensor: gs.Tensor) -> np.dtype | None:
        """The element type of a tensor; None if neither inference nor the file says it."""
        return self.facts.dtype(tensor) or element_type(tensor)

    def float_inputs(self, node: gs.Node) -> tuple[int, ...]:
        """Places of inputs that are float32."""
        return tuple(i for i, tensor in enumerate(node.inputs) if self._floats(tensor))

    def float_outputs(self, node: gs.Node) -> tuple[int, ...]:
        """Places of outputs that are float32."""
        return tuple(i for i, tensor in enumerate(node.outputs) if self._floats(tensor))

    def narrow_inputs(self, node: gs.Node) -> tuple[int, ...]:
        """Those that are not float32 by definition, as the scales of a Resize are."""
        schema = self.schema(node)
        return tuple(
            slot for slot in self.float_inputs(node) if _kind(schema.inputs, slot) != FLOAT
        )

    def narrow_outputs(self, node: gs.Node) -> tuple[int, ...]:
        """The same of outputs."""
        schema = self.schema(node)
        return tuple(
            slot for slot in self.float_outputs(node) if _kind(schema.outputs, slot) != FLOAT
        )

    def allows(self, node: gs.Node) -> bool:
        """Whether the operator set has the operator in the narrow type."""
        schema = self.schema(node)
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        wanted = f"tensor({self.format.name})"
        return all(wanted in allowed.get(kind, ()) for kind in self._kinds(node, schema))

    def schema(self, node: gs.Node) -> onnx.defs.OpSchema:
        """The definition of a standard operator.

        Raises:
            KeyError: If there is none.
        """
        return _schema(node.op, self.opset)

    def _floats(self, tensor: gs.Tensor) -> bool:
        return bool(tensor.name) and self.is_float(tensor)

    def _kinds(self, node: gs.Node, schema: onnx.defs.OpSchema) -> Iterator[str]:
        for slot in self.float_inputs(node):
            yield _kind(schema.inputs, slot)
        for slot in self.float_outputs(node):
            yield _kind(schema.outputs, slot)


def types_of(model: Model, form: Format, batches: Sequence[Batch] = ()) -> Types:
    """Types at the sizes of a batch, or without one at the sizes used for counting."""
    return Types(facts_at(model.graph, batches), model.fingerprint.opset, form)


def facts_at(graph: gs.Graph, batches: Sequence[Batch]) -> Facts:
    """What is known of tensors at the sizes of the first batch, if there is one."""
    if not batches or any(tensor.name not in batches[0] for tensor in graph.inputs):
        return usual_facts(graph)
    return evaluate(graph, {t.name: tuple(batches[0][t.name].shape) for t in graph.inputs})


def is_in(node: gs.Node, opset: int) -> bool:
    """Whether an operator is one of ONNX itself, and in this version of the set."""
    return is_standard(node) and onnx.defs.has(node.op, max_inclusive_version=opset)


@cache
def _schema(op: str, opset: int) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(op, opset)


def _kind(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], slot: int) -> str:
    """The letter of a type, or the type itself; the last parameter may stand for many."""
    return str(parameters[min(slot, len(parameters) - 1)].type_str)
