"""Attention, found by what the graph does between its projections and its products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.logits import Anchor, match_logits, match_mixing
from corp_onnx.blocks.movement import MOVING_OPS, PASSING_OPS, Path, move
from corp_onnx.blocks.readers import readers_below, size_readers
from corp_onnx.blocks.records import (
    Attention,
    Axis,
    Mask,
    Output,
    Refusal,
    Scalar,
    SizeReader,
    Target,
)
from corp_onnx.blocks.routes import SHARED, Traced, trace
from corp_onnx.blocks.view import View, follows_data

_ROLES: Mapping[Axis, tuple[str, ...]] = {"qk": ("query", "key"), "vo": ("value",)}


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The tensors that an attention operator multiplies, however it is written."""

    anchor: gs.Node
    query: gs.Tensor
    key: gs.Tensor
    key_axis: int
    """The axis of the key operand that holds a head's channels."""
    value: gs.Tensor
    context: gs.Tensor
    products: tuple[gs.Node, ...]
    frozen: tuple[Scalar, ...]
    mask: Mask | None
    bent: str | None


def match_attention(view: View, anchor: Anchor) -> Parts | Refusal:
    """Read the products above and below a Softmax."""
    mixing = match_mixing(view, anchor.probabilities)
    if isinstance(mixing, str):
        return Refusal(anchor.node.name, anchor.node.op, mixing)
    logits = match_logits(view, anchor.logits)
    if isinstance(logits, str):
        return Refusal(anchor.node.name, anchor.node.op, logits)
    query, key = logits.product.inputs
    rank = len(view.shape(key) or ())
    return Parts(
        anchor.node,
        query,
        key,
        rank - 2,
        mixing.inputs[1],
        mixing.outputs[0],
        (logits.product, mixing),
        logits.frozen,
        logits.mask,
        logits.bent,
    )


def match_operator(view: View, node: gs.Node) -> Parts | Refusal:
    """Read the standard Attention operator of opset 23."""
    inputs = [*node.inputs, *[gs.Variable.empty()] * (6 - len(node.inputs))]
    query, key, value, mask, *cache = inputs
    if any(tensor.name for tensor in cache) or any(
        tensor.name and tensor.outputs for tensor in node.outputs[1:3]
    ):
        return Refusal(node.name, node.op, "keys and values are kept in a cache, an interface")
    if len(view.shape(query) or ()) != 4:
        return Refusal(
            node.name, node.op, "its inputs are 3-D; heads are split inside the operator"
        )
    padding = None
    if mask.name and follows_data(mask):
        padding = Mask(mask.name, "keeps" if view.probes[0].dtype(mask) == np.bool_ else "added")
    bent = "its logits are capped (softcap)" if node.attrs.get("softcap", 0.0) else None
    return Parts(node, query, key, 3, value, node.outputs[0], (node,), (), padding, bent)


def attention_of(view: View, parts: Parts, block_id: str) -> Attention | Refusal:
    """The block made of an attention's parts, with the reason for every axis it cannot offer."""
    query = trace(view, parts.query, axis=len(view.shape(parts.query) or ()) - 1, name="the query")
    key = trace(view, parts.key, axis=parts.key_axis, name="the key")
    value = trace(view, parts.value, axis=len(view.shape(parts.value) or ()) - 1, name="the value")
    output = _output(view, parts.context, value) if isinstance(value, Traced) else value
    refused = _refusals(view, parts, query, key, output)
    traced = {
        name: t
        for name, t in (("query", query), ("key", key), ("value", value))
        if isinstance(t, Traced)
    }
    if not traced:
        reasons = "; ".join(dict.fromkeys(refused.values()))
        return Refusal(parts.anchor.name, parts.anchor.op, reasons)
    readers = _readers(view, parts, traced, refused)
    shapes = {name: item.route.channels.shape for name, item in traced.items()}
    qk = shapes.get("query") or shapes.get("key") or (0, 0)
    vo = shapes.get("value") or (0, 0)
    return Attention(
        block_id,
        parts.anchor.name,
        tuple(node.name for node in parts.products),
        query.route if isinstance(query, Traced) else None,
        key.route if isinstance(key, Traced) else None,
        value.route if isinstance(value, Traced) else None,
        output if isinstance(output, Output) else None,
        heads=qk[0] or vo[0],
        kv_heads=(shapes.get("key") or vo or qk)[0],
        head_width=qk[1],
        value_width=vo[1],
        frozen=parts.frozen,
        readers=(*readers, *(output.readers if isinstance(output, Output) else ())),
        padding=_padding(parts, qk[0], traced),
        refused=refused,
    )


def _padding(parts: Parts, heads: int, traced: Mapping[str, Traced]) -> Mask | None:
    """The mask, and how its axes compare with those of the activations."""
    if parts.mask is None:
        return None
    layout = next(iter(traced.values())).route.layout
    tokens = [axis for axis in layout.perm if axis < layout.tokens]
    return replace(parts.mask, heads=heads, tokens_first=tokens == [1, 0])


def _refusals(
    view: View, parts: Parts, query: Traced | str, key: Traced | str, output: Output | str
) -> dict[Axis, str]:
    """Why an axis cannot be cut exactly, for those that cannot."""
    refused: dict[Axis, str] = {}
    if len({id(parts.query), id(parts.key), id(parts.value)}) < 3:
        one = "queries, keys and values are not three different tensors"
        return {"qk": one, "vo": one}
    if isinstance(query, str):
        refused["qk"] = query
    elif isinstance(key, str):
        refused["qk"] = key
    elif parts.bent is not None:
        refused["qk"] = parts.bent
    elif any(
        not np.array_equal(q.heads, k.heads)
        for q, k in zip(query.landings, key.landings, strict=True)
    ):
        refused["qk"] = f"the key {SHARED}"
    if isinstance(output, str):
        refused["vo"] = output
    return refused


def _readers(
    view: View, parts: Parts, traced: Mapping[str, Traced], refused: dict[Axis, str]
) -> tuple[SizeReader, ...]:
    """Shape nodes to be kept truthful; refuse an axis if anything else reads its projections."""
    inside = {id(node) for item in traced.values() for node in item.path.nodes}
    inside |= {id(node) for node in parts.products}
    names = {scalar.node for scalar in parts.frozen}
    scaled = {id(node) for node in view.graph.nodes if node.name in names}
    readers: dict[str, SizeReader] = {}
    for axis, roles in _ROLES.items():
        sources = {traced[role].path.source.name for role in roles if role in traced}
        own = [item for item in traced.values() if item.path.source.name in sources]
        found = size_readers(view, own, inside, scaled)
        if isinstance(found, str):
            refused.setdefault(axis, found)
        else:
            readers |= {reader.node: reader for reader in found}
    return tuple(readers.values())


def _output(view: View, context: gs.Tensor, value: Traced) -> Output | str:
    """Follow the mixed values through movement to the output projection."""
    path = _descend(view, context)
    if isinstance(path, str):
        return path
    linear = next(item for item in view.linears.values() if item.input == path.target.name)
    found: list[np.ndarray] = []
    targets: tuple[Target, ...] = ()
    readers: tuple[SizeReader, ...] = ()
    for facts, landing in zip(view.probes, value.landings, strict=True):
        shape = facts.shape(context)
        if shape is None or int(np.prod(shape[:-2])) != landing.heads.size:
            return f"the value {SHARED}"
        moved = move(
            path, np.arange(np.prod(shape)).reshape(shape), facts, view.opset, scaled=False
        )
        if moved is None:
            return "the mixed values are moved by sizes that depend on the data"
        places = _places(moved[path.target.name], shape, landing.heads)
        if places is None:
            return "the output projection reads heads in an order that changes from token to token"
        found.append(places)
        targets = _targets(path, moved, shape[-1])
        below = readers_below(path, moved, shape[-1])
        if isinstance(below, str):
            return below
        readers = below
    if any(not np.array_equal(found[0], places) for places in found):
        return "the output projection reads other channels when a size changes"
    return Output(linear, found[0], targets, readers)


def _descend(view: View, context: gs.Tensor) -> Path | str:
    """The movement from mixed values to the only linear layer that reads them."""
    nodes: list[gs.Node] = []
    tensor = context
    while True:
        readers = [node for node in tensor.outputs if node.op not in {"Shape", "Size"}]
        if view.is_output(tensor) or len(readers) != 1:
            return (
                f"the mixed values {tensor.name!r} are read {len(readers)} times, or by the caller"
            )
        (node,) = readers
        is_linear = any(
            item.node == node.name and item.input == tensor.name for item in view.linears.values()
        )
        if is_linear:
            return Path(context, tensor, tuple(nodes))
        if node.op not in MOVING_OPS | PASSING_OPS or len(node.outputs) != 1 or node.op == "Concat":
            return f"{node.op} ({node.name}) stands between the mixed values and a linear layer"
        nodes.append(node)
        tensor = node.outputs[0]


def _places(target: np.ndarray, shape: tuple[int, ...], heads: np.ndarray) -> np.ndarray | None:
    """Head and position of every input channel of the output projection, alike for all tokens."""
    flat = target.reshape(-1, target.shape[-1])
    lead, position = flat // (shape[-1] * shape[-2]), flat % shape[-1]
    places = np.stack([heads[lead], position], axis=-1)
    return places[0] if (places == places[:1]).all() else None


def _targets(path: Path, moved: Mapping[str, np.ndarray], width: int) -> tuple[Target, ...]:
    """For each Reshape of the path: the entry that holds value channels, of how many heads."""
    targets = []
    for node in path.nodes:
        if node.op != "Reshape":
            continue
        position = moved[node.outputs[0].name] % width
        moving = [axis for axis in range(position.ndim) if np.diff(position, axis=axis).any()]
        axis = moving[-1] if moving else position.ndim - 1
        heads = position.shape[axis] // width
        targets.append(Target(node.name, axis, position.ndim, heads))
    return tuple(targets)
