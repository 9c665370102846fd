"""What is read of one block while calibrating, summed up batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np

from corp_onnx.blocks import Attention, Axis, Block, Mlp, axes_of
from corp_onnx.blocks.padding import masks_of
from corp_onnx.blocks.records import Linear, Mask, Output, Route
from corp_onnx.calibration.masks import seen_rows
from corp_onnx.calibration.moments import Collector, Moments
from corp_onnx.calibration.sequences import centred, sequence_axis
from corp_onnx.data.batching import Batch
from corp_onnx.device import HOST, Device
from corp_onnx.errors import DataError


@dataclass(frozen=True, slots=True)
class Thinning:
    """Which of a batch's tokens count: one in ``step``, evenly spaced, from a place before that."""

    step: float = 1.0
    first: int = 0

    @staticmethod
    def drawn(step: float, seed: int, samples: int) -> Thinning:
        """Where to begin follows from the seed and from how many samples came before the batch."""
        return Thinning(step, int(step * np.random.default_rng((seed, samples)).random()))

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The rows that count: at least one, if there are any."""
        first = min(self.first, max(len(rows) - 1, 0))
        counted: np.ndarray = rows[np.arange(first, len(rows), self.step).astype(int)]
        return counted


ALL = Thinning()


def precision_of(block: Block) -> type[np.floating] | None:
    """What products of a block's activations are taken in; None for their own precision.

    Roots of the moments of heads are inverted, down to directions of which float32 says nothing. A
    ridge keeps those of an MLP, which are many times as large, away from such directions.
    """
    return np.float64 if isinstance(block, Attention) else None


class Site:
    """Sums up the activations of one block; mutable, as the sums that it holds."""

    __slots__ = ("_device", "_products", "_sums", "axes", "block", "tokens")

    def __init__(
        self, block: Block, axes: Sequence[Axis] | None = None, *, device: Device = HOST
    ) -> None:
        """Start with no batch; all axes that can be cut are read, unless some are named."""
        self.block = block
        self.axes = axes_of(block) if axes is None else tuple(axes)
        self.tokens = 0
        self._device = device
        self._sums: dict[str, Collector] = {}
        self._products: np.ndarray | None = None

    def tensors(self) -> tuple[str, ...]:
        """The tensors to read."""
        mask = masks_of(self.block)
        if isinstance(self.block, Mlp):
            return (self.block.hidden, *mask)
        heads = _query_and_key(self.block) if "qk" in self.axes else ()
        context = [_output(self.block).linear.input] if "vo" in self.axes else []
        return (*read_of(heads), *context, *mask)

    def add(self, tensors: Batch, thinning: Thinning = ALL) -> None:
        """Add one batch of activations, or of its tokens those that count."""
        with self._named(), np.errstate(over="ignore", invalid="ignore"):  # an error anyway
            if isinstance(self.block, Mlp):
                self._add_vectors("hidden", self.block.hidden, self.block.down, tensors, thinning)
                return
            if "qk" in self.axes:
                self._add_heads(self.block, tensors, thinning)
            if "vo" in self.axes:
                linear = _output(self.block).linear
                self._add_vectors("context", linear.input, linear, tensors, thinning)

    def moments(self) -> dict[str, Moments]:
        """Everything so far, by site name."""
        with self._named():
            return {f"{self.block.id}.{role}": sums.moments() for role, sums in self._sums.items()}

    def energy(self) -> np.ndarray:
        """The mean of ``q_j² k_j²`` per head."""
        assert self._products is not None, "only read once there are tokens"
        return self._products / self.tokens

    def _add_vectors(
        self, role: str, name: str, linear: Linear, tensors: Batch, thinning: Thinning
    ) -> None:
        """What a linear layer reads."""
        vectors = np.moveaxis(tensors[name], linear.axis, -1)
        rows = _rows(self.block.padding, vectors, tensors, thinning)
        self._sum(role, vectors.reshape(-1, vectors.shape[-1])[rows])

    def _add_heads(self, block: Attention, tensors: Batch, thinning: Thinning) -> None:
        values = []
        masks = (block.padding, block.key_padding)
        for role, route, mask in zip(("query", "key"), _query_and_key(block), masks, strict=True):
            tokens = channels_last(route, tensors[route.linear.output])
            rows = _rows(mask, tokens, tensors, thinning)
            heads = operand(route, tokens, tensors)[rows]
            self._sum(role, heads)
            values.append(heads)
            if role == "key":
                apart = centred(heads, rows, tokens.shape[:-1], sequence_axis(route))
                self._sum("centred_key", apart)
        query, key = (np.square(heads, dtype=np.float32) for heads in values)
        if query.shape[1:] != key.shape[1:] or (np.diff(block.key_heads) != 1).any():
            query = _pooled(query, block.key_heads, key.shape[1])
        energy = (
            np.einsum("nhe,nhe->he", query, key, dtype=np.float64)
            if len(query) == len(key)
            else np.mean(query, axis=0) * np.sum(key, axis=0, dtype=np.float64)
        )
        self._products = energy if self._products is None else self._products + energy
        self.tokens += len(key)

    def _sum(self, role: str, vectors: np.ndarray) -> None:
        if role not in self._sums:
            precision = precision_of(self.block)
            self._sums[role] = Collector(vectors.shape[1:], self._device, precision)
        self._sums[role].add(vectors)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say of an error where it was found."""
        try:
            yield
        except DataError as error:
            where = f"{', '.join(self.tensors())} of {self.block.id}"
            raise DataError(f"at {where}: {error}") from error


def _rows(
    mask: Mask | None, tokens: np.ndarray, tensors: Batch, thinning: Thinning
) -> np.ndarray | slice:
    """Which tokens are no padding, and of these the ones that count."""
    seen = seen_rows(mask, tokens, tensors)
    if thinning.step == 1:
        return seen
    return thinning.of(np.arange(np.prod(tokens.shape[:-1]))[seen])


def channels_last(route: Route, projection: np.ndarray) -> np.ndarray:
    """The output of a projection with its channels on the last axis."""
    return np.moveaxis(projection, route.linear.axis, -1)


def _pooled(squares: np.ndarray, key_heads: np.ndarray, groups: int) -> np.ndarray:
    """Squared queries ``[n, h, e]`` added up over the heads that read one key head."""
    reads = (key_heads[:, None] == np.arange(groups)).astype(squares.dtype)
    total: np.ndarray = np.einsum("nhe,hg->nge", squares, reads, optimize=True)
    return total


def read_of(routes: Sequence[Route]) -> list[str]:
    """The tensors that `operand` needs: outputs of projections, and the tables that turn them."""
    tables = [route.rotation.tensors if route.rotation else () for route in routes]
    return [*(route.linear.output for route in routes), *chain.from_iterable(tables)]


def operand(route: Route, projection: np.ndarray, tensors: Batch) -> np.ndarray:
    """A projection ``[..., d]`` as the vectors ``[n, h, e]`` that enter the product.

    The tables that turn them, if any do, are among ``tensors``.
    """
    heads = _scaled(route, projection)
    if route.rotation is None:
        return heads
    return route.rotation.turn(heads, projection.shape[:-1], tensors)


def _scaled(route: Route, projection: np.ndarray) -> np.ndarray:
    """The heads of a projection, as far as no position matters."""
    rows = projection.reshape(-1, projection.shape[-1])
    start, size = route.channels.flat[0], route.channels.size
    if np.array_equal(route.channels.reshape(-1), np.arange(start, start + size)):
        heads = rows[:, start : start + size].reshape(-1, *route.channels.shape)  # no copy
    else:
        heads = rows[:, route.channels]
    if (route.gain != 1).any():
        heads = heads * route.gain.astype(heads.dtype)
    return heads + route.offset.astype(heads.dtype) if route.offset.any() else heads


def _output(block: Attention) -> Output:
    assert block.output is not None, f"{block.id} offers its values"
    return block.output


def _query_and_key(block: Attention) -> tuple[Route, Route]:
    assert block.query is not None, f"{block.id} offers its queries"
    assert block.key is not None, f"{block.id} offers its keys"
    return block.query, block.key
