"""Which axis of a projection counts the tokens of one sequence, and what is left of it centred."""

from __future__ import annotations

import numpy as np

from corp_onnx.blocks.records import Route


def sequence_axis(route: Route) -> int | None:
    """The axis of a projection ``[t0, …, tk, d]`` along which its operand's rows lie.

    A row of logits runs over it. None where the rows are made of several axes, or of a part of one:
    then sequences cannot be told apart without following the movement.
    """
    layout = route.layout
    rank = len(layout.groups)
    if layout.split is not None or rank < 2:
        return None
    rows = rank - 2 if route.axis % rank == rank - 1 else rank - 1
    first = sum(layout.groups[:rows])
    atoms = layout.perm[first : first + layout.groups[rows]]
    return atoms[0] if len(atoms) == 1 and atoms[0] < layout.tokens else None


def centred(
    heads: np.ndarray, seen: np.ndarray | slice, shape: tuple[int, ...], axis: int | None
) -> np.ndarray:
    """Vectors ``[n, h, e]`` of the seen tokens, less their mean over each sequence.

    Args:
        heads: The vectors of the tokens that are seen, in order.
        seen: Which of all tokens these are.
        shape: Sizes of the token axes, all tokens together.
        axis: The one that counts within a sequence; None makes one sequence of all.
    """
    if axis is None:
        return heads - heads.mean(axis=0, keepdims=True) if len(heads) else heads
    if isinstance(seen, slice):
        apart = np.moveaxis(heads.reshape(*shape, *heads.shape[1:]), axis, 0)
        apart = apart - apart.mean(axis=0, keepdims=True)
        ordered: np.ndarray = np.moveaxis(apart, 0, axis).reshape(heads.shape)
        return ordered
    numbers = np.arange(int(np.prod(shape)) // shape[axis])
    rest = tuple(size for place, size in enumerate(shape) if place != axis)
    of_token = np.broadcast_to(np.expand_dims(numbers.reshape(rest), axis), shape).reshape(-1)
    sequence = of_token[seen]
    counts = np.bincount(sequence, minlength=len(numbers)).clip(min=1)
    sums = np.zeros((len(numbers), *heads.shape[1:]), np.float64)
    np.add.at(sums, sequence, heads)
    means = sums / counts.reshape(-1, *[1] * (heads.ndim - 1))
    result: np.ndarray = heads - means[sequence].astype(heads.dtype)
    return result
