"""Rotary embeddings as records, and what they make of vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

CHANNELS = -1
"""The axis of a table along which the channels of a head lie."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Cosines or sines by token and channel, as the graph holds them."""

    tensor: str
    value: np.ndarray | None
    """What it holds, if that is always the same."""
    dtype: str
    axes: tuple[int | None, ...]
    """Per axis the token axis of the projection along which it varies, `CHANNELS`, or None for an
    axis of one."""
    channels: Int64[np.ndarray, " e"]
    """Which of its channels turns each position within a head."""

    @property
    def single(self) -> tuple[int, ...]:
        """Its axes of one."""
        return tuple(place for place, axis in enumerate(self.axes) if axis is None)

    @property
    def order(self) -> tuple[int, ...]:
        """The other axes in the order of tokens, channels last."""
        axes = [axis for axis in self.axes if axis is not None]
        return tuple(sorted(range(len(axes)), key=lambda at: (axes[at] == CHANNELS, axes[at])))

    def absent(self, tokens: int, rows: int) -> tuple[int, ...]:
        """The axes of ``[t0, …, tk, g…, e]`` along which it does not vary."""
        heads = range(tokens, tokens + rows)
        return (*(axis for axis in range(tokens) if axis not in self.axes), *heads)


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    r"""What turns pairs of channels of every head by an angle that follows from the token.

    With ``(i, j)`` a pair, the same pairs in all heads::

        y_i = x_i cos θ - x_j sin θ        y_j = x_j cos θ + x_i sin θ
    """

    pairs: Int64[np.ndarray, "p 2"]
    """Positions within a head."""
    cosine: Table
    sine: Table
    skipped: tuple[int, int] | None = None
    """A token axis of the projection, and how many of its first tokens are not turned."""

    @property
    def order(self) -> Int64[np.ndarray, " e"]:
        """All positions: the first of every pair, then the second of every pair."""
        order: np.ndarray = self.pairs.T.reshape(-1)
        return order

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tables that are computed."""
        tables = (self.cosine, self.sine)
        return tuple(table.tensor for table in tables if table.value is None)

    def turn(
        self, heads: np.ndarray, tokens: tuple[int, ...], tensors: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Vectors ``[n, h, e]`` of all tokens of a projection, turned.

        Args:
            heads: One vector for every token and head.
            tokens: Sizes of the token axes, ``n`` together.
            tensors: What `tensors` names.
        """
        apart = heads.reshape(*tokens, *heads.shape[1:])
        every = np.arange(heads.shape[-1])
        cosine, sine = (
            self.spread(table, value, every, len(tokens), idle=idle).astype(heads.dtype)
            for table, idle in ((self.cosine, 1.0), (self.sine, 0.0))
            for value in [tensors[table.tensor] if table.value is None else table.value]
        )
        i, j = self.pairs.T
        y = np.empty_like(apart)
        y[..., i] = apart[..., i] * cosine[..., i] - apart[..., j] * sine[..., i]
        y[..., j] = apart[..., j] * cosine[..., j] + apart[..., i] * sine[..., j]
        return y.reshape(heads.shape)

    def spread(
        self,
        table: Table,
        value: np.ndarray,
        positions: Int64[np.ndarray, " r"],
        tokens: int,
        rows: int = 1,
        *,
        idle: float,
    ) -> np.ndarray:
        """What a table holds as ``[t0, …, tk, 1…, r]``, to be multiplied with heads.

        Args:
            table: One of both.
            value: What it holds.
            positions: Within a head; of these.
            tokens: How many token axes there are.
            rows: How many axes of heads.
            idle: For tokens that are not turned.
        """
        some = np.take(value, table.channels[positions], axis=table.axes.index(CHANNELS))
        tall = np.squeeze(some, table.single).transpose(table.order)
        laid: np.ndarray = np.expand_dims(tall, table.absent(tokens, rows))
        if self.skipped is None:
            return laid
        axis, count = self.skipped
        widths = [(count if place == axis else 0, 0) for place in range(laid.ndim)]
        return np.pad(laid, widths, constant_values=idle)
