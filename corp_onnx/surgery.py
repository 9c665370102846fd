"""From a solution to a smaller graph: new weights and shapes, on a copy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.linear import bias_of, weight_of
from corp_onnx.blocks.records import Attention, Catalog, Mlp
from corp_onnx.blocks.view import constant_value
from corp_onnx.emit import Emitter
from corp_onnx.errors import SurgeryError
from corp_onnx.graph import Model
from corp_onnx.macs import Counts, count
from corp_onnx.projections import project
from corp_onnx.shapes import declared_only, evaluate
from corp_onnx.solve.folds import Fold, MlpFold, QueryKeyFold, Solution, ValueOutputFold
from corp_onnx.theatre import Theatre

OPERATORS = frozenset({"Attention", "MultiHeadAttention"})
"""What scales its logits by the head width, unless told otherwise."""


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
    graph = model.graph.copy()
    taken = set(graph.tensors()) | {node.name for node in graph.nodes}
    folds: dict[str, list[Fold]] = {}
    for fold in solution.folds:
        folds.setdefault(fold.block, []).append(fold)
    gone: set[str] = set()
    biased: dict[str, str] = {}
    for block in catalog.blocks:
        if block.id not in folds:
            continue
        emit = Emitter(graph, block.id, taken)
        theatre = Theatre.of(graph, model.fingerprint.opset, emit, biased)
        if isinstance(block, Mlp):
            _cut_mlp(theatre, block, folds[block.id])
        else:
            gone |= _cut_attention(theatre, block, folds[block.id])
    if any(block.twins for block in catalog.blocks):
        _share_equal_weights(graph, set(model.graph.tensors()))
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    _require_gone(graph, gone)
    _forget_shapes(graph)
    return Surgery(
        model.with_graph(graph),
        count(model.graph, evaluate(model.graph, catalog.sizes)),
        count(graph, evaluate(graph, catalog.sizes)),
    )


def _cut_mlp(theatre: Theatre, block: Mlp, folds: list[Fold]) -> None:
    """Narrow the hidden axis to the kept channels and renew the down projection."""
    (fold,) = folds
    assert isinstance(fold, MlpFold), f"{block.id} is an MLP"
    for linear in dict.fromkeys(source.linear for source in block.sources):
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


def _cut_attention(theatre: Theatre, block: Attention, folds: list[Fold]) -> set[str]:
    """Write new projections for every axis that is cut, and for what is packed with one.

    Returns:
        The nodes of the projections that this replaces.
    """
    routes = {"query": block.query, "key": block.key, "value": block.value}
    gone, cut = set(), set()
    for role, mapping in _maps(folds).items():
        route = routes[role]
        assert route is not None, f"{block.id} offers its {role}"
        gone.add(route.linear.node)
        cut.add(route.operand)
        theatre.take_place(route.operand, project(theatre, route, role, mapping))
    for fragment in block.fragments:
        if fragment.linear.node in gone and fragment.operand not in cut:
            theatre.take_place(fragment.operand, project(theatre, fragment, "part"))
    theatre.keep_sizes(block.readers)
    _state_scale(theatre, block)
    for fold in folds:
        if isinstance(fold, ValueOutputFold):
            _renew_output(theatre, block, fold)
    return gone


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


def _renew_output(theatre: Theatre, block: Attention, fold: ValueOutputFold) -> None:
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
    """Keep one of the new weights that are equal: blocks of one set of weights go on sharing it."""
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
