"""From a linear layer to an operand of the attention products: which channel lands where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Float64, Int64

from corp_onnx.blocks.blockers import ROTATED, why_blocked
from corp_onnx.blocks.layouts import Target, find_layout
from corp_onnx.blocks.movement import (
    AFFINE_OPS,
    Blocked,
    Path,
    climb,
    element_numbers,
    move,
    pattern,
)
from corp_onnx.blocks.operands import Operand
from corp_onnx.blocks.records import Layout, Linear, Route
from corp_onnx.blocks.turning import Turn, find_turn
from corp_onnx.blocks.view import OPEN_SIZE, View
from corp_onnx.graph.facts import Facts

CHANNELS_ATTEND = "holds channels where tokens are expected: channels attend to channels"


@dataclass(frozen=True, slots=True, eq=False)
class Landing:
    """Where the elements of a projection lie in an operand, read off one run of the movement."""

    heads: Int64[np.ndarray, "..."]
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
    turn: Turn | None = None
    """What turns the operand by its position."""


def trace(view: View, operand: Operand, *, name: str, turned: bool = False) -> Traced | str:
    """How a linear layer's channels reach an operand.

    Args:
        view: The graph.
        operand: What enters the product.
        name: Of the operand in reasons, such as "the query".
        turned: Whether it may be turned by its position on the way.

    Returns:
        The route, or the reason why there is none, with ``name`` as its subject.
    """
    turn = find_turn(view, operand) if turned else None
    if isinstance(turn, str):
        return f"{name} {ROTATED}: {turn}"
    return _trace(view, operand.tensor, operand, name, turn)


def trace_fragment(view: View, tensor: gs.Tensor) -> Traced | str:
    """The same for a tensor in which single channels lie, whatever they mean."""
    return _trace(view, tensor, None, repr(tensor.name))


def _trace(
    view: View,
    tensor: gs.Tensor,
    operand: Operand | None,
    name: str,
    turn: Turn | None = None,
) -> Traced | str:
    path = turn.path if turn else climb(view, tensor)
    if isinstance(path, Blocked):
        return f"{name} {why_blocked(view, path, tensor)}"
    linear = view.linears[path.source.name]
    found: dict[int, Landing] = {}
    like = None
    for facts in sorted(view.probes, key=lambda facts: -_size(facts, path.source)):
        landing = _land_once(view, path, linear, facts, operand, like)
        if isinstance(landing, str):
            return f"{name} {landing}"
        found[id(facts)] = landing
        like = landing.layout
    landings = [found[id(facts)] for facts in view.probes]
    first = landings[0]
    if any(not np.array_equal(landing.channels, first.channels) for landing in landings):
        return f"{name} takes other channels when batch or sequence size changes"
    if first.layout is None or any(landing.layout != first.layout for landing in landings):
        return f"{name} is laid out in a way that one Reshape and one Transpose cannot write"
    if turn is not None and first.layout.split is not None:
        return f"{name} {ROTATED}: its tokens are split over other axes on the way"
    route = Route(
        linear,
        first.channels,
        first.gain,
        first.offset,
        tensor.name,
        first.layout,
        operand.axis if operand else 0,
        str(view.probes[0].dtype(tensor)),
        turn.rotation if turn else None,
    )
    return Traced(route, path, tuple(landings), turn)


def _size(facts: Facts, tensor: gs.Tensor) -> int:
    return prod(facts.shape(tensor) or ())


def _land_once(
    view: View,
    path: Path,
    linear: Linear,
    facts: Facts,
    operand: Operand | None,
    like: Layout | None,
) -> Landing | str:
    """What `_land` says, from memory where the same movement was run before."""
    seen_as = None if operand is None else (operand.axis, operand.inner)
    names = [node.name for node in path.nodes]
    wanted = like and replace(like, split=like.split and str(names.index(like.split)))
    key = ("landing", pattern(path, facts), linear.axis, seen_as, wanted)
    if key not in view.memory:
        view.memory[key] = _land(path, linear, facts, view.opset, operand, like), names
    landing: Landing | str
    landing, before = view.memory[key]
    if isinstance(landing, str) or landing.layout is None or landing.layout.split is None:
        return landing
    split = names[before.index(landing.layout.split)]
    return replace(landing, layout=replace(landing.layout, split=split))


def _land(
    path: Path,
    linear: Linear,
    facts: Facts,
    opset: int,
    operand: Operand | None,
    like: Layout | None,
) -> Landing | str:
    """Run a path's movement on element numbers and read off what landed where.

    Of several layouts that would do at these sizes it is that of other sizes, ``like``.
    """
    shape = facts.shape(path.source)
    if shape is None or facts.shape(path.target) is None:
        return f"cannot be followed: its {OPEN_SIZE}"
    moved = move(path, element_numbers(shape, linear.axis), facts, opset, scaled=False)
    scales = _scales(path, shape, facts, opset)
    if moved is None or scales is None:
        return "is moved by sizes that depend on the data"
    numbers, width = moved[path.target.name], shape[linear.axis]
    if not numbers.size:
        return "holds no channel"
    tokens = tuple(np.delete(shape, linear.axis).tolist())
    if operand is None:
        rows = numbers[..., None, None]
        gain, offset = (array[..., None, None] for array in scales)
    else:
        rows, (gain, offset) = operand.rows(numbers), (operand.rows(array) for array in scales)
    channels, places = rows % width, rows // width
    reason = _mixed(channels, places) or _uneven(gain, offset)
    if reason:
        return reason
    heads, first = _heads(channels[..., 0, :])
    table = channels[..., 0, :].reshape(-1, rows.shape[-1])[first]
    if len(np.unique(table)) != table.size or (channels[..., 0, :] != table[heads]).any():
        return "has a channel that lands in two places"
    gains, offsets = (
        array[..., 0, :].reshape(-1, rows.shape[-1])[first] for array in (gain, offset)
    )
    reason = _unequal(gain, gains, heads) or _unequal(offset, offsets, heads)
    if reason:
        return reason
    target = _target(numbers, width, table, operand)
    layout = find_layout(target, path, moved, facts, tokens, like)
    return Landing(heads, table, gains, offsets, layout)


def _scales(
    path: Path, shape: tuple[int, ...], facts: Facts, opset: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Gain and offset of every element of a path's target."""
    if all(node.op not in AFFINE_OPS for node in path.nodes):
        target = facts.shape(path.target) or ()
        return np.ones(target), np.zeros(target)
    zeros = move(path, np.zeros(shape), facts, opset, scaled=True)
    ones = move(path, np.ones(shape), facts, opset, scaled=True)
    if zeros is None or ones is None:
        return None
    offset = zeros[path.target.name].astype(np.float64)
    return ones[path.target.name].astype(np.float64) - offset, offset


def _mixed(channels: np.ndarray, tokens: np.ndarray) -> str | None:
    """Whether channels change where tokens should, or tokens where channels should."""
    turned = (channels != channels[..., :1, :]).any(), (tokens != tokens[..., :1]).any()
    if all(turned) and not (channels != channels[..., :1]).any():
        return CHANNELS_ATTEND
    return "mixes tokens and channels" if any(turned) else None


def _uneven(gain: np.ndarray, offset: np.ndarray) -> str | None:
    if (gain != gain[..., :1, :]).any() or (offset != offset[..., :1, :]).any():
        return "is scaled or shifted differently from token to token"
    return None


def _unequal(scale: np.ndarray, of_heads: np.ndarray, heads: np.ndarray) -> str | None:
    if np.array_equal(scale[..., 0, :], of_heads[heads]):
        return None
    return "is scaled or shifted differently from sample to sample, or from copy to copy"


def _target(numbers: np.ndarray, width: int, table: np.ndarray, operand: Operand | None) -> Target:
    """What the layout has to reproduce."""
    heads, size = table.shape
    head, position = np.zeros(width, dtype=int), np.zeros(width, dtype=int)
    head[table] = np.arange(heads)[:, None]
    position[table] = np.arange(size)
    channel = numbers % width
    axis = operand.axis if operand else None
    return Target(numbers // width, head[channel], position[channel], heads, size, axis)


def _heads(channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number rows ``[…, e]`` by their first channel in the order of appearance, and the first rows.

    Rows that begin alike must be alike: that is for the caller to check.
    """
    leads = channels[..., 0].reshape(-1)
    place = np.full(leads.max() + 1, leads.size)
    place[leads[::-1]] = np.arange(leads.size)[::-1]
    first = np.sort(place[place < leads.size])
    number = np.empty_like(place)
    number[leads[first]] = np.arange(first.size)
    return number[leads].reshape(channels.shape[:-1]), first
