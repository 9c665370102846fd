"""Tensors that an attention multiplies, seen as heads of rows of channels however they lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """A tensor that enters or leaves a product of attention."""

    tensor: gs.Tensor
    axis: int
    """The axis that holds a head's channels, -1 or -2; the other one holds what is attended."""
    inner: int = 0
    """How many heads the last axis of ``[b, t, h·e]`` holds, if the operator splits it itself."""

    def rows(self, array: np.ndarray) -> np.ndarray:
        """An array of the tensor's shape as ``[…, t, e]``, channels last, heads among the first."""
        if self.inner:
            return array.reshape(*array.shape[:-1], self.inner, -1).swapaxes(-3, -2)
        return np.moveaxis(array, self.axis, -1)

    def lead(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of the axes before tokens and channels."""
        return (shape[0], self.inner) if self.inner else shape[:-2]


def spread(heads: np.ndarray, lead: tuple[int, ...]) -> np.ndarray | None:
    """Heads at every leading index of one operand, seen at those of another; None if they clash.

    An axis of one counts for all, as products broadcast. Fewer heads than the other has serve a
    run of them each, as operators do it.
    """
    shape = (1,) * (len(lead) - heads.ndim) + heads.shape
    if len(shape) != len(lead):
        return None
    heads = heads.reshape(shape)
    for axis, size in enumerate(lead):
        if size % heads.shape[axis]:
            return None
        heads = np.repeat(heads, size // heads.shape[axis], axis=axis)
    return heads


def partners(heads: np.ndarray, others: np.ndarray) -> np.ndarray | None:
    """The one head among ``others`` that meets each of ``heads``; None if one meets several.

    Both give the head at every leading index of their operands.
    """
    lead = np.maximum(
        (1,) * (others.ndim - heads.ndim) + heads.shape,
        (1,) * (heads.ndim - others.ndim) + others.shape,
    )
    mine, theirs = (spread(array, tuple(lead.tolist())) for array in (heads, others))
    if mine is None or theirs is None:
        return None
    first = np.unique(mine, return_index=True)[1]
    met = theirs.reshape(-1)[first]
    return met if np.array_equal(met[mine], theirs) else None
