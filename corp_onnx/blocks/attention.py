"""Attention, found by what the graph does between its projections and its products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.blockers import sources_of
from corp_onnx.blocks.fragments import Fan, fan_of, other_reader
from corp_onnx.blocks.operands import Operand, partners
from corp_onnx.blocks.outputs import find_output
from corp_onnx.blocks.parts import Parts
from corp_onnx.blocks.records import Attention, Axis, Mask, Output, Refusal, Route
from corp_onnx.blocks.routes import CHANNELS_ATTEND, Traced, trace
from corp_onnx.blocks.view import View, layers_above

_ROLES: Mapping[Axis, tuple[str, ...]] = {"qk": ("query", "key"), "vo": ("value",)}


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What could be traced of an attention, by role, and why the rest could not."""

    traced: Mapping[str, Traced]
    reasons: Mapping[str, str]
    key_heads: np.ndarray | None
    """The key head of every query head; None if heads do not pair."""
    output: Output | str


def attention_of(view: View, parts: Parts, block_id: str) -> Attention | Refusal:
    """The block made of an attention's parts, with the reason for every axis it cannot offer."""
    found = _follow(view, parts)
    refused = _refusals(parts, found)
    if not found.traced:
        reasons = "; ".join(dict.fromkeys(refused.values()))
        return Refusal(parts.anchor.name, parts.anchor.op, reasons)
    fans = _fans(view, parts, found.traced, refused)
    routes = {role: traced.route for role, traced in found.traced.items()}
    output = None if isinstance(found.output, str) else found.output
    heads, kv_heads = _heads(routes, output)
    widths = [_width(view, item) for item in (parts.query, parts.value)]
    sizes = [reader for fan in fans for reader in fan.readers]
    return Attention(
        block_id,
        parts.anchor.name,
        tuple(node.name for node in parts.products),
        routes.get("query"),
        routes.get("key"),
        routes.get("value"),
        output,
        heads=heads,
        kv_heads=kv_heads,
        head_width=widths[0],
        value_width=widths[1],
        key_heads=np.zeros(0, dtype=int) if found.key_heads is None else found.key_heads,
        fragments=tuple(end.route for fan in fans for end in fan.ends),
        frozen=parts.frozen,
        readers=(*sizes, *(output.readers if output else ())),
        key_padding=_padding(parts, heads, routes),
        crosses=_crosses(view, parts),
        refused=refused,
    )


def unshared(blocks: Sequence[Attention]) -> list[Attention]:
    """The same blocks, less the axes whose projection another block has a part of as well.

    Where one product mixes values by the probabilities of several, values are those of the last:
    in sequence they are cut when all that mixes them has been.
    """
    last = {block.products[-1]: block.id for block in blocks}
    blocks = [_without_values(block, last[block.products[-1]]) for block in blocks]
    owners: dict[str, set[str]] = {}
    for block in blocks:
        for route in block.fragments:
            owners.setdefault(route.linear.node, set()).add(block.id)
    return [_less_shared(block, owners) for block in blocks]


def _without_values(block: Attention, owner: str) -> Attention:
    """A block whose values belong to another one; as it is, if that is itself."""
    if owner == block.id:
        return block
    own = {route.linear.node for route in (block.query, block.key) if route is not None}
    return replace(
        block,
        value=None,
        output=None,
        fragments=tuple(route for route in block.fragments if route.linear.node in own),
        refused={**block.refused, "vo": f"its probabilities mix the values of {owner} with others"},
    )


def _less_shared(block: Attention, owners: Mapping[str, set[str]]) -> Attention:
    refused = dict(block.refused)
    for axis, roles in _ROLES.items():
        for role in roles:
            route: Route | None = getattr(block, role)
            others = owners.get(route.linear.node, set()) - {block.id} if route else set()
            if route and others:
                reason = f"its projection {route.linear.node!r} is also that of {min(others)}"
                refused.setdefault(axis, reason)
    return replace(block, refused=refused)


def _follow(view: View, parts: Parts) -> Found:
    """Trace every operand to its linear layer, and the mixed values to theirs."""
    traced, reasons = {}, {}
    for role in ("query", "key", "value"):
        operand = getattr(parts, role)
        if operand is None:
            continue
        turned = view.rotary and role != "value"
        result = trace(view, operand, name=f"the {role}", turned=turned)
        if isinstance(result, Traced):
            traced[role] = result
        else:
            reasons[role] = result
    output: Output | str = reasons.get("value", "")
    if "value" in traced:
        output = find_output(view, parts.context, traced["value"])
    return Found(traced, reasons, _key_heads(traced), output)


def _key_heads(traced: Mapping[str, Traced]) -> np.ndarray | None:
    """The key head that every query head meets, alike at all sizes."""
    if not {"query", "key"} <= traced.keys():
        return None
    pairs = zip(traced["query"].landings, traced["key"].landings, strict=True)
    first, *others = [partners(query.heads, key.heads) for query, key in pairs]
    if first is None:
        return None
    same = all(other is not None and np.array_equal(first, other) for other in others)
    return first if same else None


def _refusals(parts: Parts, found: Found) -> dict[Axis, str]:
    """Why an axis cannot be cut exactly, for those that cannot."""
    refused: dict[Axis, str] = {}
    operands = [item for item in (parts.query, parts.key, parts.value) if item is not None]
    if len({id(item.tensor) for item in operands}) < len(operands):
        one = "queries, keys and values are not three different tensors"
        return {"qk": one, "vo": one}
    across = found.reasons.get("value", "").endswith(CHANNELS_ATTEND)
    reasons = [
        found.reasons["value"] if across else parts.bent,
        found.reasons.get("query"),
        found.reasons.get("key"),
        _turned_apart(found.traced),
    ]
    reason = next((reason for reason in reasons if reason), None)
    if reason or found.key_heads is None:
        refused["qk"] = reason or "the query is shared by several key heads"
    if isinstance(found.output, str):
        refused["vo"] = found.output
    return refused


def _turned_apart(traced: Mapping[str, Traced]) -> str | None:
    """Whether queries and keys are turned in other pairs; None if alike, or not at all."""
    pairs = [
        np.zeros((0, 2)) if rotation is None else rotation.pairs
        for role in _ROLES["qk"]
        if role in traced
        for rotation in [traced[role].route.rotation]
    ]
    same = all(np.array_equal(pairs[0], other) for other in pairs)
    return None if same else "queries and keys are turned in other pairs of channels"


def _fans(
    view: View, parts: Parts, traced: Mapping[str, Traced], refused: dict[Axis, str]
) -> list[Fan]:
    """Where the projections of an attention end; refuse an axis if one cannot be written anew."""
    operands = {item.path.target.name: item for item in traced.values()}
    names = {scalar.node for scalar in parts.frozen}
    served = {id(node) for node in view.graph.nodes if node.name in names}
    fans: dict[str, Fan | str] = {}
    for axis, roles in _ROLES.items():
        for item in (traced[role] for role in roles if role in traced and axis not in refused):
            source = item.path.source
            if source.name not in fans:
                fans[source.name] = fan_of(view, source, operands, served)
            fan = fans[source.name]
            reason = (
                f"it is packed with what cannot be written anew: {fan}"
                if isinstance(fan, str)
                else other_reader(view, item, fan, parts.products)
            )
            if reason:
                refused.setdefault(axis, reason)
    return [fan for fan in fans.values() if isinstance(fan, Fan)]


def _heads(routes: Mapping[str, Route], output: Output | None) -> tuple[int, int]:
    """How many heads there are, and how many of keys or values."""
    counts = {role: len(route.channels) for role, route in routes.items()}
    mixed = len(output.value_heads) if output else counts.get("value", 0)
    heads = counts.get("query") or mixed or counts.get("key", 0)
    return heads, counts.get("key") or counts.get("value") or heads


def _width(view: View, operand: Operand | None) -> int:
    """How many channels a head of an operand has, whatever it comes from."""
    shape = view.shape(operand.tensor) if operand else None
    if operand is None or shape is None:
        return 0
    return shape[operand.axis] // (operand.inner or 1)


def _crosses(view: View, parts: Parts) -> bool:
    """Whether queries and keys are of different tokens: their layers read nothing of one origin."""
    if parts.query is None or parts.key is None:
        return False
    layers = [layers_above(view, operand.tensor) for operand in (parts.query, parts.key)]
    read, keys_read = ({view.linears[one.name].input for one in each} for each in layers)
    if not read.isdisjoint(keys_read):
        return False
    above, above_keys = (_above(view, each) for each in layers)
    return above.isdisjoint(above_keys)


def _above(view: View, layers: Sequence[gs.Tensor]) -> set[str]:
    """The layers above some layers."""
    entries = [value for layer in layers for value in layer.inputs[0].inputs]
    return {name for e in entries if view.known(e) is None for name in sources_of(view, e)}


def _padding(parts: Parts, heads: int, routes: Mapping[str, Route]) -> Mask | None:
    """The mask, and how its axes compare with those of the activations."""
    if parts.mask is None:
        return None
    layout = next(iter(routes.values())).layout
    tokens = [axis for axis in layout.perm if axis < layout.tokens]
    return replace(parts.mask, heads=heads, tokens_first=tokens == [1, 0])
