"""The plain layout of a projection that puts every element where a movement has put it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from jaxtyping import Int64

from corp_onnx.blocks.movement import Path
from corp_onnx.blocks.records import Layout
from corp_onnx.graph.facts import Facts


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """Where a movement has put the elements of a projection."""

    token: Int64[np.ndarray, "..."]
    """Which token of the projection lies at every place."""
    head: Int64[np.ndarray, "..."]
    position: Int64[np.ndarray, "..."]
    heads: int
    width: int
    width_axis: int | None
    """The axis that holds a head's channels; None where single channels are moved as heads."""


@dataclass(frozen=True, slots=True)
class _Split:
    """Token axes, and the Reshape that makes them of those of a projection, if one does."""

    node: str | None
    sizes: tuple[int, ...]
    rest: bool = False
    """Whether it merges the last of them with heads."""


@dataclass(frozen=True, slots=True)
class _Atom:
    """A factor of an axis: a coordinate of ``size`` values, each ``stride`` steps long."""

    axis: int
    stride: int
    size: int

    @property
    def place(self) -> tuple[int, int]:
        """What sorts factors from the outermost to the innermost."""
        return self.axis, -self.stride


def find_layout(
    target: Target,
    path: Path,
    moved: Mapping[str, np.ndarray],
    facts: Facts,
    tokens: tuple[int, ...],
    like: Layout | None,
) -> Layout | None:
    """The layout with token axes as the projection has them, or as a Reshape splits them.

    Where there is one token of a kind, any place would do for it: a layout that was found where
    there are more is preferred.

    Args:
        target: What is to be reproduced.
        path: The movement.
        moved: Element numbers of the projection at every tensor of the path.
        facts: Of the graph at the sizes of this run.
        tokens: The token axes of the projection.
        like: The layout at other sizes, if it is known.
    """
    if like is not None and _fits(like, target, _sizes(like, path, moved, tokens)):
        return like
    for split in _splits(path, moved, facts, tokens):
        layout = _fit(target, split)
        if layout is not None:
            return layout
    return None


def arrange(layout: Layout, projection: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Lay ``projection [t0, …, tk, g, r]`` out as an operand of the given shape."""
    tokens, width = projection.shape[:-2], projection.shape[-1:] if layout.width else ()
    rows = projection[..., layout.copies, :] if layout.copies else projection
    return rows.reshape(*tokens, *layout.rows, *width).transpose(layout.perm).reshape(shape)


def _splits(
    path: Path, moved: Mapping[str, np.ndarray], facts: Facts, tokens: tuple[int, ...]
) -> list[_Split]:
    """The token axes of a projection, and what Reshapes make of them that keep their order."""
    count = prod(tokens)
    whole, part = [_Split(None, tokens)], []
    for node in path.nodes:
        target = facts.value(node.inputs[1]) if node.op == "Reshape" else None
        if target is None:
            continue
        output, exact = moved[node.outputs[0].name], []
        for axes, size in enumerate(np.cumprod(output.shape).tolist(), 1):
            sizes = output.shape[:axes]
            numbers = output.reshape(size, -1) * size // moved[path.source.name].size
            in_order = (numbers == np.arange(size)[:, None]).all()
            if not in_order or not _stays_true(target, sizes, tokens):
                continue
            if size == count and sizes != tokens:
                exact.append(_Split(node.name, sizes))
            elif 1 < size < count and count % size == 0 and -1 not in target[:axes]:
                part.append(_Split(node.name, (*sizes, count // size), rest=True))
        whole += exact[-1:]
    return [*whole, *part]


def _sizes(
    layout: Layout, path: Path, moved: Mapping[str, np.ndarray], tokens: tuple[int, ...]
) -> tuple[int, ...]:
    """The token axes of a layout that was found at other sizes."""
    if layout.split is None:
        return tokens
    node = next(node for node in path.nodes if node.name == layout.split)
    sizes = moved[node.outputs[0].name].shape[: layout.tokens]
    return (*sizes[:-1], prod(tokens) // prod(sizes[:-1])) if layout.rest else sizes


def _stays_true(target: np.ndarray, sizes: tuple[int, ...], tokens: tuple[int, ...]) -> bool:
    """Whether the target of a Reshape would split the projection itself in the same way.

    A 0 in it copies a size of what enters, which may have been moved before.
    """
    copied = np.flatnonzero(target[: len(sizes)] == 0)
    return all(sizes[axis : axis + 1] == tokens[axis : axis + 1] for axis in copied)


def _fit(target: Target, split: _Split) -> Layout | None:
    """Find what every axis is made of, call the rest of it heads, and check the result."""
    shape, sizes = target.token.shape, split.sizes
    coordinates = np.unravel_index(target.token, sizes)
    atoms = [_atom(values, size) for values, size in zip(coordinates, sizes, strict=True)]
    if target.width_axis is not None:
        single = _Atom(target.width_axis % len(shape), 0, 1)
        atoms.append(_atom(target.position, target.width) if target.width > 1 else single)
    if any(atom is None for atom in atoms):
        return None
    known = [atom for atom in atoms if atom is not None]
    rows = _gaps(shape, known, needed=target.heads > 1)
    if rows is None:
        return None
    layout = _assembled(split, known[: len(sizes)], rows, known[len(sizes) :], len(shape))
    copies = _copies(rows, target.head)
    if copies != tuple(range(target.heads)):
        layout = replace(layout, copies=copies)
    return layout if _fits(layout, target, sizes) else None


def _fits(layout: Layout, target: Target, sizes: tuple[int, ...]) -> bool:
    """Whether a layout puts every element where the movement has put it."""
    plain = np.arange(prod(sizes) * target.heads * target.width)
    plain = plain.reshape(*sizes, target.heads, target.width)
    actual = (target.token * target.heads + target.head) * target.width + target.position
    rows, heads = prod(layout.rows), target.heads
    if rows != (len(layout.copies) or heads) or max(layout.copies, default=0) >= heads:
        return False
    if prod(sizes) * rows * target.width != actual.size:
        return False
    return np.array_equal(arrange(layout, plain, actual.shape), actual)


def _atom(coordinate: np.ndarray, size: int) -> _Atom | None:
    """The one axis along which a coordinate changes, and how many steps it stays the same there."""
    axes = [axis for axis in range(coordinate.ndim) if np.diff(coordinate, axis=axis).any()]
    if not axes:
        return _Atom(0, coordinate.size, 1) if size == 1 else None
    if len(axes) > 1:
        return None
    line = np.moveaxis(coordinate, axes[0], -1).reshape(-1, coordinate.shape[axes[0]])[0]
    return _Atom(axes[0], int(np.argmax(line != line[0])), size)


def _gaps(shape: tuple[int, ...], known: list[_Atom], *, needed: bool) -> list[_Atom] | None:
    """What is left of every axis beside the known factors, outermost first.

    Where nothing is left but one head is ``needed`` no more than that, an axis of one holds it.
    """
    gaps = []
    for axis, length in enumerate(shape):
        end = 1
        taken = [atom for atom in known if atom.axis == axis and atom.size > 1]
        for atom in (*sorted(taken, key=lambda atom: atom.stride), _Atom(axis, length, 1)):
            if atom.stride % end:
                return None
            if atom.stride > end:
                gaps.append(_Atom(axis, end, atom.stride // end))
            end = atom.stride * atom.size
    empty = [axis for axis in range(len(shape)) if all(atom.axis != axis for atom in known)]
    if not gaps and empty:
        return [_Atom(empty[0], 1, 1)]
    return sorted(gaps, key=lambda atom: atom.place) if gaps or not needed else None


def _copies(rows: list[_Atom], head: np.ndarray) -> tuple[int, ...]:
    """The head at every combination of rows, read off at the first token and position."""
    corner = np.zeros((prod(atom.size for atom in rows), head.ndim), dtype=int)
    indices = np.unravel_index(np.arange(len(corner)), tuple(atom.size for atom in rows) or (1,))
    for atom, index in zip(rows, indices, strict=False):
        corner[:, atom.axis] += index * atom.stride
    return tuple(head[tuple(corner.T)].tolist())


def _assembled(
    split: _Split, tokens: list[_Atom], rows: list[_Atom], width: list[_Atom], rank: int
) -> Layout:
    """The layout that sorts factors into the axes that they were found on."""
    atoms = [*tokens, *rows, *width]
    perm = tuple(sorted(range(len(atoms)), key=lambda index: atoms[index].place))
    axes = [atom.axis for atom in atoms]
    groups = tuple(axes.count(axis) for axis in range(rank))
    sizes = tuple(atom.size for atom in rows)
    return Layout(split.node, split.rest, len(tokens), sizes, (), bool(width), perm, groups)
