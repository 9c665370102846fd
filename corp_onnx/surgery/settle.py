"""Values that are the same at all sizes, written as the constants that they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Bool

from corp_onnx.graph.emit import Emitter, replace_readers
from corp_onnx.graph.facts import Facts
from corp_onnx.graph.operators import SIZE_OPS
from corp_onnx.graph.reference import run

LARGEST = 256
"""Elements of what is written down; what is larger and follows from it, engines fold."""


MOVES = frozenset(
    "Cast Concat Flatten Gather Identity Reshape Slice Split Squeeze Transpose Unsqueeze".split()
)
"""Operators whose results are entries of their data, from one place or another."""

Entries = Bool[np.ndarray, "..."]
"""Which entries of a value are the same at all sizes."""

Fixed = dict[str, Entries]
"""By tensor."""


def settle(graph: gs.Graph, probes: Sequence[Facts]) -> None:
    """Let readers of a value that is fixed read a constant; in place.

    The size of what is no value itself is fixed if it is the same at all probes. A value is if all
    that it is computed of is; entries that are only moved stay what they were, so the height in the
    shape of a picture is fixed although the batch is not. A size that is compared with a bound
    gives nothing fixed, though no probe may be beyond the bound.

    What exporters compute from sizes that they could have written down keeps engines from folding
    what depends on it: positions, for one, that are resized to the size of the picture.

    Nodes that nobody reads afterwards are left to `gs.Graph.cleanup`.
    """
    fixed = _Ledger(graph, probes).fixed()
    settled = {name for name, each in fixed.items() if each.all() and each.size <= LARGEST}
    emit = Emitter.of(graph, "settled")
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name in settled:
                _write_down(tensor, probes[0].values[tensor.name], settled, emit)


def _write_down(tensor: gs.Tensor, value: np.ndarray, settled: set[str], emit: Emitter) -> None:
    """Let all who read a tensor read its value, but those whose own results are settled."""
    readers = [
        reader
        for reader in tensor.outputs
        if not all(made.name in settled for made in reader.outputs)
    ]
    replace_readers(tensor, emit.constant("value", value), readers)


@dataclass(frozen=True, slots=True, eq=False)
class _Ledger:
    """A graph, in the order of its nodes, and what is known of it at several sizes."""

    graph: gs.Graph
    probes: Sequence[Facts]

    def fixed(self) -> Fixed:
        """Of every small value that is known at all probes, and not empty."""
        fixed: Fixed = {}
        for node in self.graph.nodes:
            if all(made.name in facts.values for made in node.outputs for facts in self.probes):
                of_node = zip(node.outputs, self._entries(node, fixed), strict=True)
                fixed |= {
                    made.name: entries & self._alike(made)
                    for made, entries in of_node
                    if made.name and entries.size
                }
        return fixed

    def _entries(self, node: gs.Node, fixed: Fixed) -> Sequence[Entries]:
        """Which entries of every result are made of what is fixed."""
        read = [tensor for tensor in node.inputs if tensor.name]
        count = len(read) if node.op == "Concat" else 1
        data, told = read[:count], read[count:]
        if node.op in SIZE_OPS:
            traced = data[0].name not in self.probes[0].values or _is_fixed(data[0], fixed)
            return [self._alike(made) & traced for made in node.outputs]
        apart = {each.name for each in data}.isdisjoint(each.name for each in told)
        known = {each.name: _entries_of(each, fixed) for each in data}
        feeds = {
            name: entries.astype(np.int64) for name, entries in known.items() if entries is not None
        }
        moves = node.op in MOVES and apart and len(feeds) == len(known)
        if moves and all(_is_fixed(each, fixed) for each in told):
            feeds |= {each.name: self._value(each) for each in told}
            return [moved != 0 for moved in run(node, feeds, self.graph.opset)]
        whole = all(_is_fixed(each, fixed) for each in read)
        return [np.full(self._value(made).shape, whole) for made in node.outputs]

    def _value(self, tensor: gs.Tensor) -> np.ndarray:
        value = self.probes[0].value(tensor)
        assert value is not None, f"{tensor.name} is known"
        return value

    def _alike(self, tensor: gs.Tensor) -> Entries:
        """Which entries of a value are the same at all probes; none if its shape is not."""
        first, *others = (facts.values[tensor.name] for facts in self.probes)
        alike = np.ones(first.shape, bool)
        for other in others:
            alike &= other == first if other.shape == first.shape else False
        return alike


def _is_fixed(tensor: gs.Tensor, fixed: Fixed) -> bool:
    """Whether all of what a node reads is; of an empty value nothing says so."""
    entries = _entries_of(tensor, fixed)
    return entries is not None and bool(entries.all())


def _entries_of(tensor: gs.Tensor, fixed: Fixed) -> Entries | None:
    """Which entries of what a node reads are fixed; None where nothing is known."""
    if isinstance(tensor, gs.Constant):
        return np.ones(tensor.shape, bool)
    return fixed.get(tensor.name)
