"""What one linear layer is made into by data movement: operands of attention, and all the rest."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.movement import Blocked, Path, carried_inputs, climb
from corp_onnx.blocks.readers import size_readers, tensors_of
from corp_onnx.blocks.records import SizeReader
from corp_onnx.blocks.routes import Traced, trace_fragment
from corp_onnx.blocks.view import View
from corp_onnx.graph.operators import SIZE_OPS


@dataclass(frozen=True, slots=True, eq=False)
class Fan:
    """A linear layer's output, followed down to where its movement ends."""

    ends: tuple[Traced, ...]
    """Every tensor that something else than movement reads, the topmost on its way."""
    readers: tuple[SizeReader, ...]


def fan_of(
    view: View, source: gs.Tensor, operands: Mapping[str, Traced], served: set[int]
) -> Fan | str:
    """Follow a layer's output down; a reason if an end of it cannot be written anew by itself.

    Args:
        view: The graph.
        source: The output of the layer.
        operands: What is known of operands of attention, by name of their tensor.
        served: Nodes, by ``id``, that need no size of these tensors any more.
    """
    turns = [item.turn for item in operands.values() if item.turn]
    moving = {id(node) for turn in turns for node in turn.nodes}
    served = served | moving.difference(*(turn.path.turning for turn in turns))
    descent = _Descent(view, operands, {}, {})
    ends = descent.ends(source)
    if isinstance(ends, str):
        return ends
    unique = tuple({end.path.target.name: end for end in ends}.values())
    names = {end.route.operand for end in unique}
    above = [path for path in descent.paths.values() if names.isdisjoint(_passed(path))]
    readers = size_readers(view, above, unique, served)
    return readers if isinstance(readers, str) else Fan(unique, readers)


def other_reader(
    view: View, operand: Traced, fan: Fan, products: tuple[gs.Node, ...]
) -> str | None:
    """Who reads a projection on its way to a product, or beside it; None if nobody does."""
    ends = {end.path.target.name for end in fan.ends}
    paths = [operand.path, *(end.path for end in fan.ends)]
    inside = {id(node) for path in paths for node in path.nodes}
    target = operand.path.target
    above = [tensor for tensor in tensors_of(operand.path) if tensor.name in ends]
    for tensor in [target] if target.name in ends else above:
        if view.is_output(tensor):
            return f"{tensor.name!r} is an output of the model"
        own = {id(node) for node in products} if tensor is target else inside
        for node in view.readers(tensor):
            if id(node) not in own and node.op not in SIZE_OPS:
                return f"{tensor.name!r} is also read by {node.op} ({node.name})"
    if target.name in ends:
        return _shared(operand, fan)
    return f"{target.name!r} is made of something that is read elsewhere"


def _passed(path: Path) -> set[str]:
    """The tensors between the ends of a path, its source among them."""
    return {tensor.name for node in path.nodes for tensor in node.inputs}


def _shared(operand: Traced, fan: Fan) -> str | None:
    """Which other end of a layer holds channels of an operand: they would be computed twice."""
    for end in fan.ends:
        other = end.path.target.name != operand.path.target.name
        if other and np.isin(end.route.channels, operand.route.channels).any():
            return f"its channels are also read as {end.path.target.name!r}"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class _Descent:
    """A walk down from a layer; every tensor is looked at once."""

    view: View
    operands: Mapping[str, Traced]
    seen: dict[str, "list[Traced] | str"]
    paths: dict[str, Path]
    """To everything that was looked at and is made of the layer by movement."""

    def ends(self, tensor: gs.Tensor) -> list[Traced] | str:
        """The ends below a tensor, each with its route, or why there is none."""
        if tensor.name not in self.seen:
            self.seen[tensor.name] = self._ends(tensor)
        return self.seen[tensor.name]

    def _ends(self, tensor: gs.Tensor) -> list[Traced] | str:
        path = climb(self.view, tensor)
        if isinstance(path, Blocked):
            return f"{tensor.name!r} joins it with something else"
        self.paths[tensor.name] = path
        operand = self.operands.get(tensor.name) or self._turned(tensor)
        if operand is not None:
            between = (*operand.turn.between, operand.path) if operand.turn else ()
            self.paths.update((path.target.name, path) for path in between)
            return [operand]
        readers = [node for node in self.view.readers(tensor) if node.op not in SIZE_OPS]
        carried = all(
            any(tensor is value for value in carried_inputs(self.view, node)) for node in readers
        )
        if carried and not self.view.is_output(tensor):
            below = [self.ends(output) for node in readers for output in node.outputs]
            complete = [found for found in below if not isinstance(found, str)]
            if len(complete) == len(below):
                return self._merged(tensor, list(itertools.chain.from_iterable(complete)))
        made = trace_fragment(self.view, tensor)
        return made if isinstance(made, str) else [made]

    def _turned(self, tensor: gs.Tensor) -> Traced | None:
        """The operand that a tensor becomes by being turned, if it does."""
        found = (item for item in self.operands.values() if item.turn)
        return next((item for item in found if item.turn and item.turn.entry is tensor), None)

    def _merged(self, tensor: gs.Tensor, below: list[Traced]) -> list[Traced]:
        """The ends below a tensor, or itself where they hold the same channels: once is enough."""
        unique = {end.path.target.name: end for end in below}.values()
        held = [channel for end in unique for channel in np.unique(end.route.channels)]
        made = trace_fragment(self.view, tensor) if len(set(held)) < len(held) else ""
        return below if isinstance(made, str) else [made]
