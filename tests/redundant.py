"""Models whose removed channels are a function of the kept ones: pruning them must be exact.

Hidden channels become copies of others, queries, keys and values of every head move in a subspace
of lower rank. Which channels stay is drawn at random for every head, and so is their order.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks import Attention, Block, Catalog, Mlp, axes_of, width_of
from corp_onnx.blocks.linear import bias_inside, bias_of, bias_slot, dtype_of, weight_of
from corp_onnx.blocks.records import Linear, Route, leader_of
from corp_onnx.blocks.view import constant_value
from corp_onnx.graph.model import Model
from corp_onnx.plan import Cut, Plan
from corp_onnx.solve.folds import EXACT, ValueOutputFold

_NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True, eq=False)
class Redundant:
    """A model, and what of it is enough."""

    model: Model
    kept: Mapping[tuple[str, str], np.ndarray]
    """Channels to keep by block and axis: ``[k]`` of an MLP, ``[g, r]`` of heads."""
    spans: Mapping[str, np.ndarray]
    """Per attention ``S [g, r, e]``: every value is ``v = v_kept S``."""


def with_redundancy(model: Model, catalog: Catalog, *, seed: int = 0) -> Redundant:
    """The model with half of every axis determined by the other half."""
    changed = model.with_graph(model.graph.copy())
    kept, spans = {}, {}
    for block in catalog.blocks:
        workshop = _Workshop(changed, _generator(block, seed))
        for axis in axes_of(block):
            if axis == "mlp":
                kept[block.id, axis] = workshop.copy_hidden(block)
            elif axis == "qk":
                kept[block.id, axis] = workshop.flatten_logits(block)
            else:
                kept[block.id, axis], spans[block.id] = workshop.flatten_values(block)
    return Redundant(changed, kept, spans)


def plan_of(catalog: Catalog, dense: Redundant) -> Plan:
    """Cuts of every axis that there is a solver for, to what is enough."""
    blocks = {block.id: block for block in catalog.blocks}
    return Plan(
        tuple(
            Cut(block, axis, width_of(blocks[block], axis), kept.shape[-1])
            for (block, axis), kept in dense.kept.items()
            if axis != "vo"
        )
    )


def value_folds(catalog: Catalog, dense: Redundant, *, seed: int = 1) -> list[ValueOutputFold]:
    """Exact folds of all values: kept channels in another basis, and what they span undone."""
    return [
        _value_fold(dense, block, _generator(block, seed))
        for block in catalog.blocks
        if block.id in dense.spans
    ]


def _generator(block: Block, seed: int) -> np.random.Generator:
    """The same for blocks that share their weights."""
    return np.random.default_rng([seed, *leader_of(block).encode()])


def _value_fold(dense: Redundant, block: Attention, rng: np.random.Generator) -> ValueOutputFold:
    span, kept = dense.spans[block.id], dense.kept[block.id, "vo"]
    groups, width, size = span.shape
    basis = np.linalg.qr(rng.standard_normal((groups, width, width)))[0]
    basis *= rng.uniform(0.5, 2, (groups, 1, width))
    selected = np.eye(size)[:, kept].transpose(1, 0, 2)
    nodes = {node.name: node for node in dense.model.graph.nodes}
    linear, opset = block.output.linear, dense.model.fingerprint.opset
    weight = weight_of(nodes, linear, opset)
    rows = np.zeros((len(block.output.value_heads), size, weight.shape[1]))
    rows[tuple(block.output.places.T)] = weight
    narrow = np.linalg.solve(basis, span)[block.output.value_heads] @ rows
    bias = bias_of(nodes, linear, opset)
    return ValueOutputFold(block.id, selected @ basis, narrow, bias, EXACT)


class _Workshop:
    """Changes weights of a model in place, at the places that a catalog names."""

    def __init__(self, model: Model, rng: np.random.Generator) -> None:
        self.nodes = {node.name: node for node in model.graph.nodes}
        self.opset, self.rng = model.fingerprint.opset, rng

    def copy_hidden(self, block: Mlp) -> np.ndarray:
        """Make half of the hidden channels copies of others; some have several copies."""
        order = self.rng.permutation(block.width)
        kept, removed = order[: block.width // 2], order[block.width // 2 :]
        donors = self.rng.choice(kept, len(removed))
        for source in block.sources:
            weight, bias = self._read(source.linear)
            for array in (weight, bias):
                array[..., source.channels[removed]] = array[..., source.channels[donors]]
            self._write(source.linear, weight, bias)
        for vector in block.vectors:
            node = self.nodes[vector.node]
            values = np.array(constant_value(node.inputs[vector.slot], self.opset))
            lines = np.moveaxis(values, vector.axis, -1)
            lines[..., removed] = lines[..., donors]
            node.inputs[vector.slot] = _constant(values)
        return kept

    def flatten_logits(self, block: Attention) -> np.ndarray:
        """Let queries and keys span half of a head each, in two subspaces of their own."""
        kept = self._drawn(len(block.key.channels), block.head_width)
        query = self._spans(block.query, kept, block.key_heads)
        self._project(block.query, query[block.key_heads], kept[block.key_heads])
        self._project(block.key, self._spans(block.key, kept), kept)
        return kept

    def flatten_values(self, block: Attention) -> tuple[np.ndarray, np.ndarray]:
        """Let values span half of a head."""
        kept = self._drawn(len(block.value.channels), block.value_width)
        spans = self._spans(block.value, kept)
        self._project(block.value, spans, kept)
        return kept, spans

    def _drawn(self, heads: int, width: int) -> np.ndarray:
        """Half of the channels of every head, in any order."""
        drawn = [self.rng.permutation(width)[: max(1, width // 2)] for _ in range(heads)]
        return np.stack(drawn)

    def _spans(
        self, route: Route, kept: np.ndarray, shared: np.ndarray | None = None
    ) -> np.ndarray:
        """``S [g, r, e]``, the identity where channels are kept.

        What is added behind a layer without a bias must be spanned as well: ``o = o_kept S``.
        """
        width, (heads, size) = route.channels.shape[1], kept.shape
        spans = self.rng.standard_normal((heads, size, width)) / np.sqrt(size)
        readers = np.arange(heads) if shared is None else shared
        for head, stays in enumerate(kept):
            spans[head][:, stays] = np.eye(size)
            given = route.offset[readers == head]
            if not self._has_bias(route.linear):
                spans[head] += np.linalg.pinv(given[:, stays]) @ (
                    given - given[:, stays] @ spans[head]
                )
        return spans

    def _project(self, route: Route, spans: np.ndarray, kept: np.ndarray) -> None:
        """Replace what enters a product, ``y``, by ``y_kept S``, bias and all."""
        weight, bias = self._read(route.linear)
        selected = np.take_along_axis(route.channels, kept, axis=1)
        gain, offset = (np.take_along_axis(a, kept, axis=1) for a in (route.gain, route.offset))
        columns = np.einsum("ihr,hre->ihe", weight[:, selected] * gain, spans)
        vectors = np.einsum("hr,hre->he", bias[selected] * gain + offset, spans)
        weight[:, route.channels] = columns / route.gain
        bias[route.channels] = (vectors - route.offset) / route.gain
        self._write(route.linear, weight, bias)

    def _has_bias(self, linear: Linear) -> bool:
        return linear.bias_node is not None or bias_inside(self.nodes[linear.node]) is not None

    def _read(self, linear: Linear) -> tuple[np.ndarray, np.ndarray]:
        read = (of(self.nodes, linear, self.opset) for of in (weight_of, bias_of))
        weight, bias = (np.array(array) for array in read)
        return weight, bias

    def _write(self, linear: Linear, weight: np.ndarray, bias: np.ndarray) -> None:
        node = self.nodes[linear.node]
        dtype = dtype_of(self.nodes, linear, self.opset)
        if node.op == "Conv":
            weight = weight.T.reshape(*weight.T.shape, *node.inputs[1].shape[2:])
        elif node.op == "Gemm":
            node.attrs.update(alpha=1.0, beta=1.0, transB=0)
        elif node.op == "MatMulNBits":
            assert len(node.inputs) <= 4, "the zoo has none with a bias inside"
            node.op, node.domain, node.attrs = "MatMul", None, {}
            while len(node.inputs) > 2:
                node.inputs.pop()
        node.inputs[1] = _constant(weight.astype(dtype))
        if not self._has_bias(linear):
            assert np.allclose(bias, 0)
            return
        adder = self.nodes[linear.bias_node] if linear.bias_node else node
        slot = bias_slot(adder, self.opset) if linear.bias_node else 2
        adder.inputs[slot] = _constant(bias.astype(dtype))


def _constant(values: np.ndarray) -> gs.Constant:
    return gs.Constant(f"redundant_{next(_NUMBERS)}", values)
