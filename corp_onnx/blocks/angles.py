"""What turns channels by their position, read off runs on element numbers.

One term of every sum in a region of such nodes holds a channel at its place, the other its partner.
So the region is run on element numbers once with the one term of every sum and once with the other,
and likewise on the element numbers of the tables that the terms are multiplied with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.movement import AFFINE_OPS, Path, apply, element_numbers, move
from corp_onnx.blocks.operands import Operand
from corp_onnx.blocks.rotations import CHANNELS, Rotation, Table
from corp_onnx.blocks.view import View
from corp_onnx.graph.facts import Facts

TABLE_SPAN = 40
"""Bits of an element number within a table; those above them tell the tables apart."""

MOVED = "it is moved by sizes that depend on the data"
SEVERAL = "several tables of angles turn it"
UNEVEN = "it is scaled or shifted while it is turned"
NO_PAIRS = "it is turned by something else than pairs of channels"


class NoRotation(Exception):
    """Why a region turns no pairs of channels, as the end of a sentence."""


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Everything between ``entry`` and ``target``."""

    entry: gs.Tensor
    target: gs.Tensor
    nodes: tuple[gs.Node, ...]
    sums: tuple[int, ...]
    """Sums of two terms, by ``id``."""
    tables: Mapping[int, gs.Tensor]
    """What the factors of these terms are multiplied with, by ``id`` of the product."""


def rotation_of(
    view: View,
    region: Region,
    above: Path,
    operand: Operand,
    straight: Mapping[int, int],
    facts: Facts,
) -> Rotation:
    """What a region computes at some sizes.

    Args:
        view: The graph.
        region: The nodes.
        above: The movement from a linear layer to where the region begins.
        operand: What the region makes.
        straight: Which of its two terms leaves a channel at its place, by ``id`` of every sum.
        facts: What is known at these sizes.

    Raises:
        NoRotation: If it is nothing that turns pairs, or this is not the straight term.
    """
    shape, axis = facts.shape(above.source), view.linears[above.source.name].axis
    if shape is None:
        raise NoRotation(MOVED)
    moved = move(above, element_numbers(shape, axis), facts, view.opset, scaled=False)
    if moved is None:
        raise NoRotation(MOVED)
    run = _Run(region, straight, facts, view.opset)
    start = moved[region.entry.name] + 1
    signs = operand.rows(_signs(run, start.shape))
    placed, swapped = (operand.rows(run.numbers(start, crossed=side)) for side in (False, True))
    entries = [operand.rows(run.entries(start.shape, crossed=side)) for side in (False, True)]
    turned = (entries[0] != 0).all(axis=-1)
    if any(((each != 0) != turned[..., None]).any() for each in entries):
        raise NoRotation("only a part of the channels of a head is turned")
    pairs = _pairs(placed[turned], swapped[turned], signs[turned])
    tokens = tuple(np.delete(shape, axis).tolist())
    coordinates = list(np.unravel_index((placed[..., 0] - 1) // shape[axis], tokens))
    skipped = _skipped(turned, coordinates)
    if skipped is not None:
        coordinates[skipped[0]] = coordinates[skipped[0]] - skipped[1]
    places = [place[turned] for place in coordinates]
    cosine, sine = (_table(view, run, each[turned], places) for each in entries)
    rotation = Rotation(pairs, cosine, sine, skipped)
    _require_one_angle(rotation)
    return rotation


def is_same(one: Rotation, other: Rotation) -> bool:
    """Whether two rotations, read at different sizes, are one."""
    tables = zip((one.cosine, one.sine), (other.cosine, other.sine), strict=True)
    return (
        one.skipped == other.skipped
        and np.array_equal(one.pairs, other.pairs)
        and all(
            (a.tensor, a.dtype, a.axes) == (b.tensor, b.dtype, b.axes)
            and np.array_equal(a.channels, b.channels)
            for a, b in tables
        )
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """A region at some sizes, with one choice of the straight terms."""

    region: Region
    straight: Mapping[int, int]
    facts: Facts
    opset: int

    def numbers(self, start: np.ndarray, *, crossed: bool) -> np.ndarray:
        """Where elements go, by their numbers."""
        return self._through(start, crossed=crossed)

    def gains(self, start: np.ndarray, *, crossed: bool) -> np.ndarray:
        """What is made of elements where all tables hold ones, their sign included."""
        return self._through(start, crossed=crossed, scaled=True)

    def entries(self, shape: tuple[int, ...], *, crossed: bool) -> np.ndarray:
        """Which entry of which table, from 1, every element is multiplied with; 0 for none."""
        names = self.names
        numbers: dict[int, np.ndarray] = {}
        for node, tensor in self.region.tables.items():
            sizes = self.facts.shape(tensor)
            if sizes is None:
                raise NoRotation(MOVED)
            first = (names.index(tensor.name) << TABLE_SPAN) + 1
            numbers[node] = np.arange(first, first + prod(sizes)).reshape(sizes)
        nothing = np.zeros(shape, dtype=np.int64)
        return self._through(nothing, crossed=crossed, tables=numbers)

    @property
    def names(self) -> list[str]:
        """The tables."""
        return list(dict.fromkeys(tensor.name for tensor in self.region.tables.values()))

    def _through(
        self,
        start: np.ndarray,
        *,
        crossed: bool,
        scaled: bool = False,
        tables: Mapping[int, np.ndarray] | None = None,
    ) -> np.ndarray:
        """What becomes of ``start``; of entries of tables, where these are given."""
        arrays = {self.region.entry.name: start}
        for node in self.region.nodes:
            shape = self.facts.shape(node.outputs[0])
            if shape is None:
                raise NoRotation(MOVED)
            value = self._passed(node, arrays, crossed=crossed, scaled=scaled)
            if tables and id(node) in tables:
                if np.any(value):
                    raise NoRotation(SEVERAL)
                value = tables[id(node)]
            if value is not None:
                arrays[node.outputs[0].name] = np.broadcast_to(value, shape)
            elif not apply(node, arrays, self.facts, self.opset):
                raise NoRotation(MOVED)
        return arrays[self.region.target.name]

    def _passed(
        self, node: gs.Node, arrays: Mapping[str, np.ndarray], *, crossed: bool, scaled: bool
    ) -> np.ndarray | None:
        """What a node passes on, where gains are asked for with its sign; None if it moves it."""
        sums, turns = id(node) in self.straight, id(node) in self.region.tables
        slot = self.straight[id(node)] ^ crossed if sums else 0
        if not (sums or turns or node.op == "Neg" or (node.op in AFFINE_OPS and not scaled)):
            return None
        table = self.region.tables.get(id(node))
        carried = [t for t in node.inputs if t.name in arrays and t is not table]
        value: np.ndarray = arrays[carried[slot].name]
        minus = node.op == "Neg" or (node.op == "Sub" and slot == 1)
        return -value if minus and scaled else value


def _signs(run: _Run, shape: tuple[int, ...]) -> np.ndarray:
    """Whether the crossed term is added or subtracted, of a straight term that is added.

    Raises:
        NoRotation: If not one factor is multiplied for all, or something is added.
    """
    ones, zeros = np.ones(shape), np.zeros(shape)
    straight, crossed = (run.gains(ones, crossed=side) for side in (False, True))
    nothing = [run.gains(zeros, crossed=side) for side in (False, True)]
    first = straight.flat[0] if straight.size else 0.0
    if not first or any(array.any() for array in nothing):
        raise NoRotation(UNEVEN)
    signs: np.ndarray = crossed / first
    if not np.allclose(straight / first, 1.0) or not np.allclose(np.abs(signs), 1.0):
        raise NoRotation(UNEVEN)
    rounded: np.ndarray = np.sign(signs).astype(np.int64)
    return rounded


def _pairs(placed: np.ndarray, swapped: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Pairs of positions ``[p, 2]`` from rows of both terms, the one that loses first."""
    if not placed.size:
        raise NoRotation(NO_PAIRS)
    partner = np.argmax(placed[0] == swapped[0][:, None], axis=1)
    sign, own = signs[0], np.arange(len(partner))
    alike = (swapped == placed[:, partner]).all() and (signs == sign).all()
    mutual = (partner[partner] == own).all() and not (partner == own).any()
    if not alike or not mutual or (sign[partner] != -sign).any():
        raise NoRotation(NO_PAIRS)
    first = np.flatnonzero(sign < 0)
    return np.stack([first, partner[first]], axis=1)


def _skipped(turned: np.ndarray, coordinates: Sequence[np.ndarray]) -> tuple[int, int] | None:
    """The token axis along which the first few are not turned, and how many; None if all are."""
    if turned.all():
        return None
    for axis, place in enumerate(coordinates):
        count = int(place[turned].min()) if turned.any() else 0
        if count and np.array_equal(turned, place >= count):
            return axis, count
    raise NoRotation("tokens are left as they are among others that are turned")


def _table(view: View, run: _Run, entries: np.ndarray, coordinates: Sequence[np.ndarray]) -> Table:
    """The table of which rows ``[n, e]`` hold entries, by number; of tokens at some coordinates."""
    which = np.unique((entries - 1) >> TABLE_SPAN)
    if len(which) != 1:
        raise NoRotation(SEVERAL)
    name = run.names[which[0]]
    tensor = next(tensor for tensor in run.region.tables.values() if tensor.name == name)
    shape = run.facts.shape(tensor) or ()
    axes: list[int | None] = []
    channels = None
    places = np.unravel_index((entries - 1) & ((1 << TABLE_SPAN) - 1), shape)
    for size, place in zip(shape, places, strict=True):
        along = [axis for axis, at in enumerate(coordinates) if (place == at[:, None]).all()]
        token = next((axis for axis in along if axis not in axes), None)
        if size > 1 and token is None:
            if channels is not None or (place != place[0]).any():
                raise NoRotation("its angles do not follow from the token and the channel alone")
            channels = place[0]
            token = CHANNELS
        axes.append(token if size > 1 else None)
    if channels is None:
        raise NoRotation("all its channels are turned by one angle")
    dtype = str(run.facts.dtype(tensor))
    return Table(name, view.known(tensor), dtype, tuple(axes), channels)


def _require_one_angle(rotation: Rotation) -> None:
    """See that both channels of a pair are turned by one angle, as far as tables are known."""
    tables = (rotation.cosine, rotation.sine)
    skipped = rotation.skipped
    if tables[0].tensor == tables[1].tensor or (
        skipped and any(skipped[0] not in table.axes for table in tables)
    ):
        raise NoRotation("its cosines and sines cannot be told apart")
    for table in tables:
        if table.value is not None:
            values = np.moveaxis(table.value, table.axes.index(CHANNELS), -1)[..., table.channels]
            i, j = rotation.pairs.T
            if not np.array_equal(values[..., i], values[..., j]):
                raise NoRotation("both channels of a pair are turned by angles of their own")
