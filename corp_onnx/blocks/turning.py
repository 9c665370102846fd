"""Where channels are turned by their position (rotary embedding), found by running the graph.

Between a linear layer and a product stand movement, products with tables of cosines and sines, and
sums of two of these. One term of such a sum holds a channel at its place, the other its partner:
which is which is tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import onnx_graphsurgeon as gs

from corp_onnx.blocks.angles import NoRotation, Region, is_same, rotation_of
from corp_onnx.blocks.blockers import is_table
from corp_onnx.blocks.movement import Blocked, Path, carried_inputs, climb
from corp_onnx.blocks.operands import Operand
from corp_onnx.blocks.rotations import Rotation
from corp_onnx.blocks.view import View, producer, serves_only
from corp_onnx.graph.operators import SIZE_OPS

MOST_SUMS = 4
"""Every channel is the sum of two products; exporters write at most two such sums, for halves."""


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """What turns a tensor: the nodes between ``entry`` and an operand of a product.

    Attributes:
        entry: The last tensor that all terms are made of.
        nodes: In order.
        path: From the linear layer through the terms that leave a channel at its place.
        between: The same to every tensor on this way behind ``entry``.
        rotation: What they compute.
    """

    entry: gs.Tensor
    nodes: tuple[gs.Node, ...]
    path: Path
    between: tuple[Path, ...]
    rotation: Rotation


def find_turn(view: View, operand: Operand) -> Turn | str | None:
    """What turns an operand; None if nothing like it does, or why it cannot be narrowed."""
    region = _region(view, operand.tensor)
    above = None if region is None else climb(view, region.entry)
    if region is None or above is None or isinstance(above, Blocked):
        return None
    reason = None
    for slots in product((0, 1), repeat=len(region.sums)):
        straight = dict(zip(region.sums, slots, strict=True))
        try:
            first, *others = (
                rotation_of(view, region, above, operand, straight, facts) for facts in view.probes
            )
        except NoRotation as why:
            reason = reason or str(why)
            continue
        if not all(is_same(first, other) for other in others):
            return "it turns other channels when batch or sequence size changes"
        turn = _turn(view, region, above, straight, first)
        return _read_elsewhere(view, region, turn) or turn
    return reason


def _region(view: View, target: gs.Tensor) -> Region | None:
    """Climb from a tensor through sums of products with tables, until all terms are of one tensor.

    The latest of all open tensors is taken next, so each is looked at once.
    """
    waiting, nodes = {target.name: target}, []
    sums: list[int] = []
    tables: dict[int, gs.Tensor] = {}
    while not (sums and len(waiting) == 1):
        tensor = max(waiting.values(), key=lambda tensor: _place(view, tensor))
        node = producer(tensor)
        if node is None or tensor.name in view.linears:
            return None
        carried, table = _carried(view, node)
        if not carried or len(sums) > MOST_SUMS:
            return None
        nodes.append(node)
        sums += [id(node)] if _adds(node, carried) else []
        tables |= {} if table is None else {id(node): table}
        for made in node.outputs:
            waiting.pop(made.name, None)
        waiting |= {value.name: value for value in carried}
    (entry,) = waiting.values()
    if not tables:
        return None
    return Region(entry, target, tuple(view.in_order(nodes)), tuple(sums), tables)


def _carried(view: View, node: gs.Node) -> tuple[list[gs.Tensor], gs.Tensor | None]:
    """What a node passes on, and the table that it is multiplied with, if it is."""
    for table, other in zip(node.inputs, node.inputs[::-1], strict=True):
        if node.op == "Mul" and prod(view.shape(table) or ()) > 1 and is_table(view, table):
            return [other], table
    carried = carried_inputs(view, node)
    if not carried and node.op in {"Add", "Sub", "Neg"}:
        carried = list(node.inputs)
    return carried, None


def _adds(node: gs.Node, carried: Sequence[gs.Tensor]) -> bool:
    """Whether a node adds two terms up."""
    return node.op in {"Add", "Sub"} and len(carried) > 1


def _place(view: View, tensor: gs.Tensor) -> int:
    """When a tensor is made; inputs and constants are there before all others."""
    node = producer(tensor)
    return -1 if node is None else view.order[id(node)]


def _turn(
    view: View, region: Region, above: Path, straight: Mapping[int, int], rotation: Rotation
) -> Turn:
    """A region, with the way through it that takes the straight term of every sum."""
    waiting, nodes = [region.target], []
    while waiting:
        tensor = waiting.pop()
        node = producer(tensor)
        if tensor is region.entry or node is None:
            continue
        nodes.append(node)
        carried, _ = _carried(view, node)
        waiting += [carried[straight[id(node)]]] if id(node) in straight else carried
    ways = view.in_order([*above.nodes, *nodes])
    turning = frozenset([*region.sums, *region.tables])
    path = Path(above.source, region.target, tuple(ways), turning)
    made = [tensor for node in nodes for tensor in node.outputs if tensor is not region.target]
    between = tuple(replace(path, target=tensor) for tensor in made)
    return Turn(region.entry, region.nodes, path, between, rotation)


def _read_elsewhere(view: View, region: Region, turn: Turn) -> str | None:
    """Who else reads what lies in a region, or enters it; None if nobody does.

    Who asks for the size of what lies on the straight way is answered later.
    """
    inside = {id(node) for node in region.nodes}
    moving = inside - turn.path.turning  # what is multiplied with tables needs these still
    answered = {region.entry.name, *(path.target.name for path in turn.between)}
    made = [tensor for node in region.nodes for tensor in node.outputs]
    for tensor in (region.entry, *made):
        if tensor is region.target:
            continue
        if view.is_output(tensor):
            return f"{tensor.name!r} is an output of the model"
        for node in view.readers(tensor):
            asks = node.op in SIZE_OPS
            if asks and (tensor.name in answered or serves_only(node, moving, turn.path.turning)):
                continue
            if id(node) not in inside:
                return f"{tensor.name!r} is also read by {node.op} ({node.name})"
    return None
