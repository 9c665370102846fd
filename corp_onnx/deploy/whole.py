"""Attention written whole, as ONNX Runtime's own operator, where a graph has it in plain pieces."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.deploy.pieces import Pieces, Sight, match_pieces, sight_of
from corp_onnx.graph.emit import Emitter
from corp_onnx.graph.operators import MICROSOFT
from corp_onnx.session import version

OPERATOR, DOMAIN = "MultiHeadAttention", MICROSOFT

FLOAT = (np.dtype(np.float32),)

MASKED = (*FLOAT, np.dtype(np.float16))
"""Types for which every kernel reads a mask."""

MASKS_SINCE = (1, 22)
"""Older kernels read a mask that is the same for all heads at the wrong places from the second
sample on (microsoft/onnxruntime#24017).
"""


def write_whole(graph: gs.Graph, dtypes: Collection[np.dtype] = FLOAT) -> int:
    """Let `MultiHeadAttention` stand for every plain attention, in place; how many there were.

    ``Reshape, Transpose`` of query, key and value, the product of the first two, ``Softmax``, the
    product with the value, ``Transpose, Reshape``: one operator does it without writing all these
    tensors. It computes::

        softmax(scale · query · key + mask) · value

    so a number that multiplies or divides query, key or their product is part of its scale, and
    what is added to the product is its mask, whatever is in it: 0 and a large negative number by
    key, or a bias of every pair of tokens and head. Zeros in place of weights that are no numbers
    become zeros in the result; they also hide values that are none. Where a piece has another
    reader, is of another form, as with a mask that is scaled, or of another type, the graph stays
    as it is.

    Args:
        graph: Is changed.
        dtypes: Types that there are kernels for.
    """
    softmaxes = [node for node in graph.nodes if node.op == "Softmax"]
    if not softmaxes:
        return 0
    sight = sight_of(graph)
    matched = [match_pieces(node, sight, dtypes) for node in softmaxes]
    found = [pieces for pieces in matched if pieces is not None and _is_computed(pieces, sight)]
    writer = _Writer(sight, Emitter.of(graph))
    for pieces in found:
        writer.write(pieces)
    if found:
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return len(found)


def _is_computed(pieces: Pieces, sight: Sight) -> bool:
    """Whether the operator does the same: to it a scale of 0 says that it shall take its own."""
    major, minor, *_ = version().split(".")
    masked = (int(major), int(minor)) >= MASKS_SINCE and (
        sight.probes[0].dtype(pieces.query) in MASKED
    )
    return bool(np.float32(pieces.scale)) and (pieces.mask is None or masked)


@dataclass(frozen=True, slots=True, eq=False)
class _Writer:
    """Writes operators into one graph, and every mask that serves many of them once."""

    sight: Sight
    emit: Emitter
    spread: dict[str, gs.Tensor] = field(default_factory=dict)
    """By the name of the mask, for queries that are as many as the keys."""

    def write(self, pieces: Pieces) -> None:
        """The operator that stands for an attention, its output taken over."""
        emit = self.emit.under(f"{pieces.softmax.name}/whole")
        inputs = [pieces.query, pieces.key, pieces.value]
        if pieces.mask is not None:
            none = gs.Variable.empty()
            inputs += [none, none, self._mask(pieces, pieces.mask, emit)]
        dtype = self.sight.probes[0].dtype(pieces.query)
        attrs = {"num_heads": pieces.heads, "scale": pieces.scale}
        made = emit.node(OPERATOR, inputs, dtype=dtype, attrs=attrs, domain=DOMAIN)
        if pieces.guarded:
            zero = emit.constant("zero", np.zeros((), dtype))
            made = emit.node("Where", [emit.node("IsNaN", [made], dtype=bool), zero, made])
        (last,), outputs = made.inputs, list(pieces.joined.outputs)
        pieces.joined.outputs.clear()
        last.outputs = outputs

    def _mask(self, pieces: Pieces, mask: gs.Tensor, emit: Emitter) -> gs.Tensor:
        """The mask as the operator takes it: for every query and key, but once for many heads."""
        shapes, wanted = self.sight.shapes(mask), self.sight.shapes(pieces.logits)
        pairs = list(zip(shapes, wanted, strict=True))
        if all(len(shape) == 4 and shape[2:] == full[2:] for shape, full in pairs):
            return mask
        if not self._is_square(pieces) or any(shape[-1:] != full[-1:] for shape, full in pairs):
            lengths = [_size(tensor, 1, emit) for tensor in (pieces.query, pieces.key)]
            return _spread(mask, lengths, emit)
        if mask.name not in self.spread:
            lengths = [_size(mask, len(shapes[0]) - 1, emit)] * 2
            self.spread[mask.name] = _spread(mask, lengths, emit)
        return self.spread[mask.name]

    def _is_square(self, pieces: Pieces) -> bool:
        """Whether queries and keys are made from one sequence, and so of one length."""
        return self._source(pieces.query) is self._source(pieces.key)

    def _source(self, tensor: gs.Tensor) -> gs.Tensor:
        """Back over all that is done to the tokens of one sequence, as a projection is."""
        while tensor.inputs:
            lengths = [shape[:2] for shape in self.sight.shapes(tensor)]
            before = [
                each
                for each in tensor.inputs[0].inputs
                if [s[:2] for s in self.sight.shapes(each) if len(s) == 3] == lengths
            ]
            if len(before) != 1:
                break
            (tensor,) = before
        return tensor


def _size(tensor: gs.Tensor, axis: int, emit: Emitter) -> gs.Tensor:
    """The size of a tensor along an axis, as a vector of one number."""
    return emit.part(emit.node("Shape", [tensor], dtype=np.int64), axis, axis + 1)


def _spread(mask: gs.Tensor, lengths: list[gs.Tensor], emit: Emitter) -> gs.Tensor:
    """A mask of four axes, of which the last two are whole."""
    return emit.node("Expand", [mask, emit.join([[1, 1], *lengths])], dtype=mask.dtype)
