"""From a solution to a smaller graph: new weights and shapes, on a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.linear import bias_of, weight_of
from corp_onnx.blocks.records import Attention, Catalog, Mlp, Route
from corp_onnx.blocks.view import constant_value
from corp_onnx.errors import SurgeryError
from corp_onnx.graph.emit import Emitter
from corp_onnx.graph.macs import Counts, count
from corp_onnx.graph.model import Model
from corp_onnx.graph.shapes import declared_only, evaluate
from corp_onnx.solve.folds import Fold, MlpFold, OutputFold, QueryKeyFold, Solution, ValueOutputFold
from corp_onnx.surgery.projections import kept_rows, project
from corp_onnx.surgery.theatre import Theatre
from corp_onnx.surgery.tidy import tidy

OPERATORS = frozenset({"Attention", "MultiHeadAttention"})
"""What scales its logits by the head width, unless told otherwise."""

Cut = Mapping[str, np.ndarray]
"""Channels by the node of their layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Surgery:
    """The smaller model, and what there was to compute before and after."""

    model: Model
    dense: Counts
    pruned: Counts


def operate(model: Model, catalog: Catalog, solution: Solution) -> Surgery:
    """Carry a solution out on a copy of the model; ``model`` itself is untouched.

    Weights are cast once, here, to the type in which the model stored them, and written under new
    names: an initializer may have other readers.

    Raises:
        SurgeryError: If something outside the blocks still needs a projection that was to go.
    """
    graph = carried_out(model, catalog, solution.folds)
    tidy(graph)
    graph.cleanup(remove_unused_graph_inputs=False)
    return Surgery(
        model.with_graph(graph),
        count(model.graph, evaluate(model.graph, catalog.sizes)),
        count(graph, evaluate(graph, catalog.sizes)),
    )


def carried_out(model: Model, catalog: Catalog, folds: Iterable[Fold]) -> gs.Graph:
    """A copy of the graph, or of the part of it that a model holds, with its folds carried out.

    Raises:
        SurgeryError: As `operate`.
    """
    graph = model.graph.copy()
    emit = Emitter.of(graph)
    of_block: dict[str, list[Fold]] = {}
    for fold in folds:
        of_block.setdefault(fold.block, []).append(fold)
    gone: set[str] = set()
    cut = _cut_channels(catalog, of_block)
    biased: dict[str, str] = {}
    for block in catalog.blocks:
        if block.id not in of_block:
            continue
        theatre = Theatre.of(graph, model.fingerprint.opset, emit.under(block.id), biased)
        if isinstance(block, Mlp):
            gone |= _cut_mlp(theatre, block, of_block[block.id], cut)
        else:
            gone |= _cut_attention(theatre, block, of_block[block.id], cut)
    if catalog.rotary or any(block.twins for block in catalog.blocks):
        _share_equal_weights(graph, set(model.graph.tensors()))
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    _require_gone(graph, gone)
    _forget_shapes(graph)
    return graph


def _cut_channels(catalog: Catalog, folds: Mapping[str, list[Fold]]) -> Cut:
    """The channels of every layer that some block cuts."""
    cut: dict[str, list[np.ndarray]] = {}
    for block in catalog.blocks:
        if isinstance(block, Mlp):
            for source in block.sources if block.id in folds else ():
                cut.setdefault(source.linear.node, []).append(source.channels)
            continue
        roles = _maps(folds.get(block.id, []))
        for role, route in _routes(block).items():
            if role in roles:
                cut.setdefault(route.linear.node, []).append(route.channels.reshape(-1))
    return {node: np.concatenate(channels) for node, channels in cut.items()}


def _is_cut(fragment: Route, cut: Cut) -> bool:
    """Whether a fragment is written by a block that cuts it, this one or another."""
    return bool(np.isin(fragment.channels, cut.get(fragment.linear.node, ())).any())


def _cut_mlp(theatre: Theatre, block: Mlp, folds: list[Fold], cut: Cut) -> set[str]:
    """Narrow the hidden axis to the kept channels and renew the down projection.

    Returns:
        The nodes of layers that were taken apart.
    """
    (fold,) = folds
    assert isinstance(fold, MlpFold), f"{block.id} is an MLP"
    apart = _take_apart(theatre, block, fold, cut)
    for linear in dict.fromkeys(source.linear for source in block.sources):
        if linear.node in apart:
            continue
        sources = [source for source in block.sources if source.linear == linear]
        columns = np.concatenate([source.channels[fold.kept] for source in sources])
        layer = theatre.now(linear)
        weight = weight_of(theatre.nodes, layer, theatre.opset)[:, columns]
        bias = bias_of(theatre.nodes, layer, theatre.opset)[columns]
        theatre.set_linear(layer, weight, bias if theatre.has_bias(layer) else None)
        whole, tensors = sources[0].whole, [source.tensor for source in sources]
        theatre.split(whole, tensors, len(fold.kept), layer.axis)
    for vector in block.vectors:
        node = theatre.nodes[vector.node]
        values = constant_value(node.inputs[vector.slot], theatre.opset)
        assert values is not None, f"{vector.node} reads a constant"
        kept = np.take(values, fold.kept, axis=vector.axis)
        node.inputs[vector.slot] = theatre.emit.constant("vector", kept)
    for name in block.depthwise:
        theatre.nodes[name].attrs["group"] = len(fold.kept)
    theatre.keep_sizes(block.readers)
    for target in block.targets:
        theatre.set_target(target, len(fold.kept))
    theatre.set_linear(block.down, fold.weight, fold.bias)
    return apart


def _take_apart(theatre: Theatre, block: Mlp, fold: MlpFold, cut: Cut) -> set[str]:
    """Give hidden channels that are packed with others a layer of their own, and these another."""
    hidden = {source.tensor for source in block.sources}
    for fragment in block.fragments:
        if fragment.operand in hidden:
            kept = kept_rows(fragment, fold.kept)
            theatre.take_place(fragment.operand, project(theatre, kept, "hidden"))
        elif not _is_cut(fragment, cut):
            theatre.take_place(fragment.operand, project(theatre, fragment, "part"))
    return {fragment.linear.node for fragment in block.fragments}


def _cut_attention(theatre: Theatre, block: Attention, folds: list[Fold], cut: Cut) -> set[str]:
    """Write new projections for every axis that is cut, and for what is packed with one.

    Returns:
        The nodes of the projections that this replaces.
    """
    routes, gone = _routes(block), set()
    positions = next((fold.positions for fold in folds if isinstance(fold, QueryKeyFold)), None)
    for role, mapping in _maps(folds).items():
        route = routes[role]
        gone.add(route.linear.node)
        theatre.take_place(route.operand, project(theatre, route, role, mapping, positions))
    for fragment in block.fragments:
        if fragment.linear.node in gone and not _is_cut(fragment, cut):
            theatre.take_place(fragment.operand, project(theatre, fragment, "part"))
    theatre.keep_sizes(block.readers)
    _state_scale(theatre, block)
    for fold in folds:
        if isinstance(fold, ValueOutputFold):
            _narrow_output(theatre, block, fold)
        elif isinstance(fold, OutputFold):
            assert block.output is not None, f"the output of {block.id} was fitted"
            theatre.set_linear(block.output.linear, fold.weight, fold.bias)
    return gone


def _routes(block: Attention) -> dict[str, Route]:
    """The routes of an attention by role."""
    routes = {"query": block.query, "key": block.key, "value": block.value}
    return {role: route for role, route in routes.items() if route is not None}


def _maps(folds: list[Fold]) -> dict[str, np.ndarray]:
    """The map ``[heads, e, r]`` of every projection that a fold changes."""
    maps: dict[str, np.ndarray] = {}
    for fold in folds:
        if isinstance(fold, QueryKeyFold):
            maps |= {"query": fold.query, "key": fold.key}
        elif isinstance(fold, ValueOutputFold):
            maps["value"] = fold.value
    return maps


def _state_scale(theatre: Theatre, block: Attention) -> None:
    """Write the dense softmax scale as a constant wherever it would follow the head width."""
    for scalar in block.frozen:
        node = theatre.nodes[scalar.node]
        value = np.asarray(scalar.value, dtype=scalar.dtype)
        node.inputs[scalar.slot] = theatre.emit.constant("scale", value)
    anchor = theatre.nodes[block.anchor]
    if anchor.op in OPERATORS and not anchor.attrs.get("scale"):
        anchor.attrs["scale"] = float(1.0 / np.sqrt(block.head_width))


def _narrow_output(theatre: Theatre, block: Attention, fold: ValueOutputFold) -> None:
    """Narrow the way to the output projection and give it its refitted weight."""
    output = block.output
    assert output is not None, f"{block.id} offered its values"
    width = fold.value.shape[-1]
    for target in output.targets:
        theatre.set_target(target, width)
    head, position = output.places[output.places[:, 1] < width].T
    theatre.set_linear(output.linear, fold.weight[head, position], fold.bias)


def _require_gone(graph: gs.Graph, gone: set[str]) -> None:
    left = gone & {node.name for node in graph.nodes}
    if left:
        raise SurgeryError(
            f"the projections {', '.join(sorted(left))} were replaced, but something outside "
            "their attention block still reads them; leave that block out of the plan"
        )


def _share_equal_weights(graph: gs.Graph, dense: set[str]) -> None:
    """Keep one of the new weights that are equal: blocks of one set of weights go on sharing it.

    So do those that one table of angles turns.
    """
    first: dict[tuple[str, tuple[int, ...], bytes], gs.Constant] = {}
    for node in graph.nodes:
        for slot, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) and tensor.name not in dense:
                values = np.asarray(tensor.values)
                digest = hashlib.sha256(np.ascontiguousarray(values).tobytes()).digest()
                key = (str(values.dtype), values.shape, digest)
                node.inputs[slot] = first.setdefault(key, tensor)


def _forget_shapes(graph: gs.Graph) -> None:
    """Drop the recorded shapes of intermediate tensors, which may have changed.

    Those behind operators that nobody knows cannot be inferred again. No axis that is cut reaches
    them, so they stay.
    """
    kept = {tensor.name for tensor in (*graph.inputs, *graph.outputs)} | declared_only(graph)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.name not in kept:
            tensor.shape = None
