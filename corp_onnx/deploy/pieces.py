"""Attention in plain pieces, recognised from its softmax on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph.facts import Facts
from corp_onnx.graph.fixed import fixed_value
from corp_onnx.graph.varied import probed

LAST_BY_DEFAULT = 13
"""The first opset whose Softmax is along the last axis unless told otherwise."""

HEADS_FIRST, KEYS_TURNED = [0, 2, 1, 3], [0, 2, 3, 1]
"""From ``[b, t, h, e]``: to ``[b, h, t, e]`` and to ``[b, h, e, t]``."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """A graph, and what is known of its tensors at every size that was probed."""

    graph: gs.Graph
    probes: Sequence[Facts]
    shown: frozenset[int]
    """Tensors that the graph or a body gives, by identity."""

    def shapes(self, tensor: gs.Tensor) -> tuple[Shape, ...]:
        """The shape at every size; ``(0,)``, which nothing fits, where it is not known."""
        return tuple(facts.shape(tensor) or (0,) for facts in self.probes)

    def only_reader(self, tensor: gs.Tensor, op: str) -> gs.Node | None:
        """The node of a kind that reads a tensor, if nobody else sees it but for its own target."""
        readers = [node for node in tensor.outputs if node.op == op]
        if len(readers) != 1 or id(tensor) in self.shown:
            return None
        (reader,) = readers
        others = [node for node in tensor.outputs if node is not reader]
        if any(node.op != "Shape" or not self._serves(node, reader) for node in others):
            return None
        return reader if any(reader is node for node in self.graph.nodes) else None

    def _serves(self, node: gs.Node, end: gs.Node) -> bool:
        """Whether all that is made of a node are sizes that one other node reads."""
        return node is end or all(
            id(output) not in self.shown
            and self.probes[0].value(output) is not None
            and all(self._serves(reader, end) for reader in output.outputs)
            for output in node.outputs
        )

    def only_writer(self, tensor: gs.Tensor, *ops: str) -> gs.Node | None:
        """The node of one of these kinds that writes a tensor which one node sees."""
        if not tensor.inputs or len(tensor.outputs) != 1 or id(tensor) in self.shown:
            return None
        return tensor.inputs[0] if tensor.inputs[0].op in ops else None

    def number(self, tensor: gs.Tensor) -> float | None:
        """The number that a tensor is at all sizes; None if it is none, or not the same."""
        value = fixed_value(self.probes, tensor, {})
        return float(value.reshape(())) if value is not None and value.size == 1 else None

    def unscaled(self, tensor: gs.Tensor) -> tuple[float, gs.Tensor]:
        """Back over products with numbers but 0: their product, and what they multiply."""
        scale = 1.0
        while (node := self.only_writer(tensor, "Mul", "Div")) is not None:
            left, right = node.inputs
            if node.op == "Mul" and (factor := self.number(left)):
                scale, tensor = scale * factor, right
            elif factor := self.number(right):
                scale, tensor = scale * factor if node.op == "Mul" else scale / factor, left
            else:
                break
        return scale, tensor

    def unmoved(self, tensor: gs.Tensor) -> gs.Tensor:
        """Behind a Reshape that changes nothing."""
        node = self.only_reader(tensor, "Reshape")
        same = node is not None and self.shapes(node.outputs[0]) == self.shapes(tensor)
        return node.outputs[0] if node is not None and same else tensor

    def heads(self, flat: gs.Tensor, cut: gs.Tensor) -> int | None:
        """Heads of ``cut``, ``[b, t, h, e]``, which is ``flat``, ``[b, t, h·e]``, at all sizes."""
        found: set[int | None] = set()
        for whole, parts in zip(self.shapes(flat), self.shapes(cut), strict=True):
            fits = len(whole) == 3 and len(parts) == 4 and whole[:2] == parts[:2]
            found.add(parts[2] if fits else None)
        return found.pop() if len(found) == 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class _Operand:
    """Query, key or value: ``[b, t, h·e]`` that is cut into heads, turned and scaled."""

    tensor: gs.Tensor
    heads: int
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class _Logits:
    """``scale · query · key + mask``, the mask of any shape that broadcasts to theirs."""

    query: _Operand
    key: _Operand
    scale: float
    mask: gs.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """An attention: what it reads, and the node whose output is its own."""

    softmax: gs.Node
    query: gs.Tensor
    key: gs.Tensor
    value: gs.Tensor
    heads: int
    scale: float
    mask: gs.Tensor | None
    guarded: bool
    """Whether a query whose weights are no numbers, for all its keys are masked, gives 0."""
    joined: gs.Node

    @property
    def logits(self) -> gs.Tensor:
        """With the mask, ``[b, h, q, k]``."""
        return self.softmax.inputs[0]


def sight_of(graph: gs.Graph) -> Sight:
    """The graph, evaluated at sizes of its own."""
    bodies = graph.subgraphs(recursive=True)
    shown = (tensor for each in (graph, *bodies) for tensor in each.outputs)
    return Sight(graph, probed(graph), frozenset(map(id, shown)))


def match_pieces(softmax: gs.Node, sight: Sight, dtypes: Collection[np.dtype]) -> Pieces | None:
    """Read the attention around a softmax; None if it is of another form or of other types."""
    weights = _without_nan(softmax.outputs[0], sight)
    context = sight.only_reader(weights, "MatMul")
    joined = context and _joined(context, sight)
    logits = _logits(softmax.inputs[0], sight)
    if context is None or joined is None or logits is None or not _over_keys(softmax, sight):
        return None
    value = _operand(context.inputs[1], HEADS_FIRST, sight)
    if context.inputs[0] is not weights or value is None or value.scale != 1.0:
        return None
    if not logits.query.heads == logits.key.heads == value.heads:
        return None
    pieces = Pieces(
        softmax,
        logits.query.tensor,
        logits.key.tensor,
        value.tensor,
        value.heads,
        logits.scale,
        logits.mask,
        weights is not softmax.outputs[0],
        joined,
    )
    return pieces if all(_alike(pieces, facts, dtypes) for facts in sight.probes) else None


def _without_nan(weights: gs.Tensor, sight: Sight) -> gs.Tensor:
    """The weights with 0 in place of what is no number, where that is all that is read of them.

    ``Where(IsNaN(p), 0, p)``: so exporters write PyTorch's attention with a mask of truth values.
    """
    if len(weights.outputs) != 2 or id(weights) in sight.shown:
        return weights
    test, choice = sorted(weights.outputs, key=lambda node: node.op)
    if (test.op, choice.op) != ("IsNaN", "Where"):
        return weights
    condition, zero, _ = choice.inputs
    fits = condition is test.outputs[0] and sight.number(zero) == 0.0
    alone = sight.only_reader(condition, "Where") is not None
    return choice.outputs[0] if fits and alone else weights


def _over_keys(softmax: gs.Node, sight: Sight) -> bool:
    """Whether it sums up along the last of four axes."""
    usual = -1 if sight.graph.opset >= LAST_BY_DEFAULT else 1
    return softmax.attrs.get("axis", usual) in {-1, 3}


def _alike(pieces: Pieces, facts: Facts, dtypes: Collection[np.dtype]) -> bool:
    """Whether query, key and value are sequences of one batch, keys and values of one length.

    The mask must not make more logits than the product has.
    """
    tensors = (pieces.query, pieces.key, pieces.value)
    query, key, value = (facts.shape(tensor) or () for tensor in tensors)
    if {len(query), len(key), len(value)} != {3}:
        return False
    wanted = (query[0], pieces.heads, query[1], key[1])
    kinds = {facts.dtype(tensor) for tensor in tensors}
    one_batch = query[0] == key[0] and key[:2] == value[:2]
    return one_batch and facts.shape(pieces.logits) == wanted and kinds in [{d} for d in dtypes]


def _joined(context: gs.Node, sight: Sight) -> gs.Node | None:
    """The node behind which the heads lie side by side again."""
    turned = sight.only_reader(sight.unmoved(context.outputs[0]), "Transpose")
    if turned is None or turned.attrs.get("perm") != HEADS_FIRST:
        return None
    joined = sight.only_reader(turned.outputs[0], "Reshape")
    return joined if joined and sight.heads(joined.outputs[0], turned.outputs[0]) else None


def _logits(tensor: gs.Tensor, sight: Sight) -> _Logits | None:
    """Back over a mask that was added, and a scale before it, to queries and keys."""
    added = sight.only_writer(tensor, "Add")
    if added is None:
        return _scaled(tensor, sight)
    for logits, mask in (added.inputs, reversed(added.inputs)):
        found = _scaled(logits, sight)
        if found is not None:
            return replace(found, mask=mask)
    return None


def _scaled(tensor: gs.Tensor, sight: Sight) -> _Logits | None:
    """Back over a scale to the product of queries and keys."""
    scale, tensor = sight.unscaled(tensor)
    product = sight.only_writer(tensor, "MatMul")
    if product is None:
        return None
    query = _operand(product.inputs[0], HEADS_FIRST, sight)
    key = _operand(product.inputs[1], KEYS_TURNED, sight)
    if query is None or key is None:
        return None
    return _Logits(query, key, scale * query.scale * key.scale, None)


def _operand(tensor: gs.Tensor, perm: list[int], sight: Sight) -> _Operand | None:
    """Back over a scale, a turn and a cut into heads."""
    scale, tensor = sight.unscaled(tensor)
    turned = sight.only_writer(tensor, "Transpose")
    if turned is None or turned.attrs.get("perm") != perm:
        return None
    cut = sight.only_writer(turned.inputs[0], "Reshape")
    heads = cut and sight.heads(cut.inputs[0], cut.outputs[0])
    return None if cut is None or not heads else _Operand(cut.inputs[0], heads, scale)
