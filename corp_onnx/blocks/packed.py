"""A hidden axis whose first layer also computes something else: an attention's projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.branches import Branch
from corp_onnx.blocks.fragments import Fan, fan_of
from corp_onnx.blocks.records import Route, SizeReader
from corp_onnx.blocks.routes import Traced, trace_fragment
from corp_onnx.blocks.view import View


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """What is made of layers that compute hidden channels and more than these."""

    fragments: tuple[Route, ...] = ()
    """Where the movement of those layers ends, the hidden channels among them."""
    readers: tuple[SizeReader, ...] = ()
    tensors: frozenset[str] = frozenset()
    """What lies above the fragments, and goes with the layers."""


def packing_of(view: View, branches: Sequence[Branch], region: set[int]) -> Packing | str:
    """What layers compute beside hidden channels; a reason if that cannot be written anew.

    Layers of which nothing but nodes of the ``region`` (by ``id``) reads anything are no such.
    """
    fragments: list[Route] = []
    readers: list[SizeReader] = []
    gone: set[str] = set()
    for source in {branch.source.name: branch.source for branch in branches}.values():
        own = [branch for branch in branches if branch.source is source]
        above = {id(tensor): tensor for branch in own for tensor in branch.above()}
        above = {i: t for i, t in above.items() if all(t is not b.tensor for b in own)}
        if not any(_read_outside(view, tensor, region) for tensor in above.values()):
            continue
        fan = _fan(view, source, own)
        if isinstance(fan, str):
            return fan
        fragments += [end.route for end in fan.ends]
        readers += fan.readers
        gone |= {tensor.name for tensor in above.values()}
    return Packing(tuple(fragments), tuple(readers), frozenset(gone))


def _read_outside(view: View, tensor: gs.Tensor, region: set[int]) -> bool:
    return any(id(node) not in region and node.op != "Shape" for node in view.readers(tensor))


def _fan(view: View, source: gs.Tensor, own: Sequence[Branch]) -> Fan | str:
    """All that is made of a layer, of which the branches are parts that nobody else has."""
    traced: dict[str, Traced] = {}
    for branch in own:
        made = trace_fragment(view, branch.tensor)
        if isinstance(made, str) or not _is_plain(made.route, branch):
            return f"the layer that computes {branch.tensor.name!r} cannot be taken apart"
        traced[branch.tensor.name] = made
    fan = fan_of(view, source, traced, set())
    if isinstance(fan, str):
        return f"it is packed with what cannot be written anew: {fan}"
    mine = np.concatenate([branch.channels for branch in own])
    ends = {end.route.operand: end.route for end in fan.ends}
    for name, route in ends.items():
        if name not in traced and np.isin(route.channels, mine).any():
            return f"its hidden channels are also read as {name!r}"
    assert traced.keys() <= ends.keys(), "no end above one of the branches has channels of it"
    return fan


def _is_plain(route: Route, branch: Branch) -> bool:
    """Whether a fragment is the hidden channels in order, along one axis of their own."""
    return (
        np.array_equal(route.channels[:, 0], branch.channels)
        and route.layout.rows == (len(branch.channels),)
        and not route.layout.copies
    )
