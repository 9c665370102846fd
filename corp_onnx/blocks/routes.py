"""From a linear layer to an operand of the attention products: which channel lands where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Float64, Int64

from corp_onnx.blocks.movement import Blocked, Path, climb, move
from corp_onnx.blocks.records import Layout, Route
from corp_onnx.blocks.view import OPEN_SIZE, View
from corp_onnx.shapes import Facts

BLOCKERS = {
    "LayerNormalization": "is normalised between the projection and the product",
    "RMSNormalization": "is normalised between the projection and the product",
    "SimplifiedLayerNormalization": "is normalised between the projection and the product",
    "LpNormalization": "is normalised between the projection and the product",
    "RotaryEmbedding": "is rotated by its position (rotary embedding)",
}

SHARED = "is shared by several query heads"


@dataclass(frozen=True, slots=True, eq=False)
class Landing:
    """Where the elements of a projection lie in an operand, read off one run of the movement."""

    heads: Int64[np.ndarray, " l"]
    """Head at every leading index of the operand."""
    channels: Int64[np.ndarray, "h e"]
    gain: Float64[np.ndarray, "h e"]
    offset: Float64[np.ndarray, "h e"]
    layout: Layout | None


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """A route with the run of movement that showed it."""

    route: Route
    path: Path
    landings: tuple[Landing, ...]
    """One for every probed set of sizes."""


def trace(view: View, operand: gs.Tensor, *, axis: int, name: str) -> Traced | str:
    """How a linear layer's channels reach ``operand``, whose ``axis`` holds a head's channels.

    Returns:
        The route, or the reason why there is none, with ``name`` ("the query") as its subject.
    """
    path = climb(view, operand)
    if isinstance(path, Blocked):
        return f"{name} {_why(path)}"
    landings = []
    for facts in view.probes:
        landing = land(path, facts, view.opset, axis=axis)
        if isinstance(landing, str):
            return f"{name} {landing}"
        landings.append(landing)
    first = landings[0]
    if any(not np.array_equal(landing.channels, first.channels) for landing in landings):
        return f"{name} takes other channels when batch or sequence size changes"
    if first.layout is None or any(landing.layout != first.layout for landing in landings):
        return f"{name} is laid out in a way that one Reshape and one Transpose cannot write"
    linear = view.linears[path.source.name]
    route = Route(
        linear,
        first.channels,
        first.gain,
        first.offset,
        operand.name,
        first.layout,
        axis,
        str(view.probes[0].dtype(operand)),
    )
    return Traced(route, path, tuple(landings))


def land(path: Path, facts: Facts, opset: int, *, axis: int) -> Landing | str:
    """Run a path's movement on element numbers and read off what landed where."""
    shape = facts.shape(path.source)
    if shape is None or facts.shape(path.target) is None:
        return f"cannot be followed: its {OPEN_SIZE}"
    numbers = np.arange(np.prod(shape)).reshape(shape)
    moved = move(path, numbers, facts, opset, scaled=False)
    zeros = move(path, np.zeros(shape), facts, opset, scaled=True)
    ones = move(path, np.ones(shape), facts, opset, scaled=True)
    if moved is None or zeros is None or ones is None:
        return "is moved by sizes that depend on the data"
    target = path.target.name
    rows, offset, reach = (_rows(result[target], axis) for result in (moved, zeros, ones))
    gain = reach - offset
    channels, tokens = rows % shape[-1], rows // shape[-1]
    if (channels != channels[:, :1]).any() or (tokens != tokens[:, :, :1]).any():
        return "mixes tokens and channels"
    if (gain != gain[:, :1]).any() or (offset != offset[:, :1]).any():
        return "is scaled or shifted differently from token to token"
    heads, first = _heads(channels[:, 0])
    table = channels[first, 0]
    if len(np.unique(table)) != table.size:
        return "has a channel that lands in two places"
    if rows.size > np.prod(shape[:-1]) * table.size:
        return SHARED
    layout = _layout(path, moved, table, shape)
    return Landing(heads, table, gain[first, 0], offset[first, 0], layout)


def arrange(layout: Layout, projection: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Lay ``projection [t0, …, tk, h, r]`` out as an operand of the given shape."""
    return projection.transpose(layout.perm).reshape(shape)


def _layout(
    path: Path, moved: dict[str, np.ndarray], table: np.ndarray, shape: tuple[int, ...]
) -> Layout | None:
    """The plain layout that puts every element where the path put it; None if there is none."""
    target = moved[path.target.name]
    for split, sizes in _token_axes(path, moved, shape):
        layout = _fit(target, split, sizes, table, shape[-1])
        if layout is not None:
            return layout
    return None


def _token_axes(
    path: Path, moved: dict[str, np.ndarray], shape: tuple[int, ...]
) -> list[tuple[str | None, tuple[int, ...]]]:
    """Ways to see the token axes: as the projection has them, or as a Reshape splits them."""
    ways: list[tuple[str | None, tuple[int, ...]]] = [(None, shape[:-1])]
    tokens = int(np.prod(shape[:-1]))
    for node in path.nodes:
        if node.op == "Reshape":
            output = moved[node.outputs[0].name]
            (ends,) = np.nonzero(np.cumprod(output.shape) == tokens)
            in_order = (np.diff(output.reshape(-1)) == 1).all()
            if in_order and ends.size and output.shape[: ends[-1] + 1] != shape[:-1]:
                ways.append((node.name, output.shape[: ends[-1] + 1]))
            break
    return ways


def _fit(
    target: np.ndarray, split: str | None, sizes: tuple[int, ...], table: np.ndarray, width: int
) -> Layout | None:
    """Find the operand axis and stride of every token axis, the head and the position; check it."""
    head, position = np.zeros(width, dtype=int), np.zeros(width, dtype=int)
    head[table] = np.arange(len(table))[:, None]
    position[table] = np.arange(table.shape[1])
    channel, token = target % width, target // width
    coordinates = [*np.unravel_index(token, sizes), head[channel], position[channel]]
    spots = [_spot(coordinate) for coordinate in coordinates]
    placed = [spot for spot in spots if spot is not None]
    if len(placed) != len(spots):
        return None
    perm = tuple(sorted(range(len(placed)), key=lambda atom: (placed[atom][0], -placed[atom][1])))
    axes = [axis for axis, _ in placed]
    groups = tuple(axes.count(axis) for axis in range(target.ndim))
    layout = Layout(split, len(sizes), perm, groups)
    plain = np.arange(np.prod(sizes) * width).reshape(*sizes, width)[..., table]
    if plain.size != target.size or not np.array_equal(
        arrange(layout, plain, target.shape), target
    ):
        return None
    return layout


def _spot(coordinate: np.ndarray) -> tuple[int, int] | None:
    """The one axis along which a coordinate changes, and how many steps it stays the same there."""
    axes = [axis for axis in range(coordinate.ndim) if np.diff(coordinate, axis=axis).any()]
    if not axes:
        return 0, coordinate.size
    if len(axes) > 1:
        return None
    line = np.moveaxis(coordinate, axes[0], -1).reshape(-1, coordinate.shape[axes[0]])[0]
    return axes[0], int(np.argmax(line != line[0]))


def _rows(array: np.ndarray, axis: int) -> np.ndarray:
    """An operand as ``[leading, rows, head's channels]``."""
    last = np.moveaxis(array, axis, -1)
    return last.reshape(-1, *last.shape[-2:])


def _heads(channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the different rows of ``[l, e]`` by first appearance: number per row, first rows."""
    _, first, inverse = np.unique(channels, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return np.argsort(order)[inverse.reshape(-1)], first[order]


def _why(path: Blocked) -> str:
    """Why a path is blocked, as the end of a sentence."""
    node = path.node
    if node is None:
        return f"comes from {path.tensor!r}, an input or a constant, not from a linear layer"
    known = BLOCKERS.get(node.op)
    if known is not None:
        return f"{known} ({node.name})"
    return (
        f"does not come from one linear layer by movement and scaling alone: {node.op} "
        f"{node.name!r} stands in between"
    )
