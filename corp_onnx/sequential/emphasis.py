"""The tokens that a model's output is read from, and how much an error in them matters."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int64

from corp_onnx.blocks.records import Mask
from corp_onnx.calibration.masks import seen_rows
from corp_onnx.data.batching import Batch, samples_in
from corp_onnx.graph.extracts import exposed, extract
from corp_onnx.graph.model import Model
from corp_onnx.sequential.streams import Stream
from corp_onnx.session import Runtime, Session, open_session

log = logging.getLogger(__name__)

PROBED, PASSES = 4, 0.5
"""Samples on which it is seen what a disturbance does: fewer, if together that took longer than so
many passes over all samples."""

SLIGHT, STRONG = 0.1, 10.0
"""Disturbances of a stream, over how much the branch that joins it varies, channel by channel: to
see how far the output moves, and whether it does."""

UNMOVED = 1e-10
"""Relative squared change of the output below which it is rounding."""

GLANCES = 3
"""Tokens that are tried first: if all of them move the output, it is read from everywhere."""

FEW = 4
"""Emphasised are tokens of which there are at most one in so many."""


@dataclass(frozen=True, slots=True)
class Emphasis:
    """Tokens at the same few places of every sequence, which count more than they would by number.

    Attributes:
        axis: Of the stream ``[b, t, o]`` or ``[t, b, o]``, the one that counts tokens.
        places: Where they are along it.
        weight: What all of them count together, over what all tokens count.
    """

    axis: int
    places: tuple[int, ...]
    weight: float

    @property
    def share(self) -> float:
        """Of the whole weight, what they count beside all tokens."""
        return self.weight / (1.0 + self.weight)

    def rows(self, shape: Sequence[int], seen: Int64[np.ndarray, " s"]) -> Int64[np.ndarray, " r"]:
        """Of the tokens that are seen, in a tensor with these token axes, those at the places."""
        if len(shape) <= self.axis:
            return seen[:0]
        numbers = np.moveaxis(np.arange(np.prod(shape)).reshape(shape), self.axis, 0)
        places = [place for place in self.places if place < len(numbers)]
        rows: np.ndarray = np.intersect1d(seen, numbers[places])
        return rows


def emphasised(
    model: Model,
    streams: Sequence[Stream],
    batches: Iterable[Batch],
    samples: int,
    *,
    padding: Mask | None = None,
    runtime: Runtime | None = None,
    seed: int = 0,
) -> Mapping[str, Emphasis]:
    r"""How much the tokens that the output is read from count in the fit of every block.

    A classifier that reads a class token alone makes nothing of an error in the others but by what
    later attentions take over from them. With ``s_R`` what a small random disturbance of the stream
    in the tokens read does to the output, ``s_O`` what one as strong does in all others, and ``d``
    the width of what the layer reads::

        weight = min(s_R / s_O, samples · |R| / d)

    The first makes a sum over tokens of what the error of the output is: ``Σ_t s_t ‖e_t‖²``. The
    second keeps a fit from trusting a token of which there are few: all of them count at most as
    much as they are tokens for every channel.

    Nothing is emphasised where every output is read from every token, or one of them in one batch
    from other places than in the next. Of several outputs the relative errors are added up.

    Source: ours; docs/adr/0013-tokens-that-are-read-count-more.md.

    Args:
        model: The dense model.
        streams: Behind its blocks, in the order of the graph.
        batches: Some calibration batches.
        samples: How many samples there are to fit to.
        padding: What says which tokens of the last stream are none: the output reads no padding,
            and yet may be read from everywhere.
        runtime: How models are run.
        seed: Of the disturbance.

    Returns:
        By block.
    """
    if not streams:
        return {}
    some = [_few(model, batch, int(PASSES * samples / len(streams))) for batch in batches]
    places: _Places | None = None
    for batch in some:
        read = _Probe.of(model, streams[-1:], batch, runtime, seed, padding).places_read(padding)
        if read is None or places not in {None, read}:
            return {}
        places = read
    assert places is not None, "there are batches"
    weights = dict(_Probe.of(model, streams, some[0], runtime, seed).weights(places))
    tokens = samples * len(places.at)
    width = {stream.block: stream.linear.width_in for stream in streams if stream.linear}
    found = {
        block: Emphasis(places.axis, places.at, min(weight, tokens / width[block]))
        for block, weight in weights.items()
    }
    for block, emphasis in found.items():
        log.info("%s: tokens %s count %.2f times all", block, places.at, emphasis.weight)
    return found


def _few(model: Model, batch: Batch, most: int) -> Batch:
    """Some of the samples, if the model takes any number of them."""
    fixed = any(tensor.shape and isinstance(tensor.shape[0], int) for tensor in model.graph.inputs)
    count = samples_in(batch) if fixed else max(1, min(PROBED, most))
    return {name: tensor[:count] for name, tensor in batch.items()}


@dataclass(frozen=True, slots=True)
class _Places:
    """Some tokens of every sequence, along one axis."""

    axis: int
    at: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Probe:
    """A batch, what flows through the dense model for it, and streams of tokens in there."""

    model: Model
    streams: Sequence[Stream]
    batch: Batch
    dense: Batch
    outputs: Sequence[str]
    runtime: Runtime | None
    seed: int

    @staticmethod
    def of(
        model: Model,
        streams: Sequence[Stream],
        batch: Batch,
        runtime: Runtime | None,
        seed: int,
        padding: Mask | None = None,
    ) -> _Probe:
        ends = [name for stream in streams for name in stream.ends]
        ends += [padding.tensor] if padding else []
        outputs = [tensor.name for tensor in model.graph.outputs]
        dense = open_session(exposed(model, [*ends, *outputs]), runtime).run(batch)
        behind = _made_of(model, streams[-1].tensor)
        numbers = [
            name
            for name in outputs
            if name in behind and np.issubdtype(dense[name].dtype, np.floating)
        ]
        return _Probe(model, streams, batch, dense, numbers, runtime, seed)

    def places_read(self, padding: Mask | None) -> _Places | None:
        """The tokens behind the last stream that outputs are read from which read but a few.

        An output with a row for every token is taken to be read from all of them. Of padding
        nothing is asked: tokens are tried that no sample has it in place of.
        """
        stream, samples = self.streams[-1], samples_in(self.batch)
        tokens = self.dense[stream.tensor]
        shape = tokens.shape
        asked = [name for name in self.outputs if self.dense[name].shape[:-1] != shape[:-1]]
        if not (asked and self._is_of_tokens(stream) and samples in shape[:2]):
            return None
        axis, tail = 1 if shape[0] == samples else 0, replace(self, outputs=asked).tail(stream)
        seen = np.zeros(shape[:-1], bool)
        seen.reshape(-1)[seen_rows(padding, tokens, self.dense)] = True
        common = np.flatnonzero(seen.all(axis=1 - axis))
        of_outputs = (tail.alone(name).few(axis, common, self.seed) for name in asked)
        places = sorted({place for few in of_outputs for place in few})
        return _Places(axis, tuple(places)) if places else None

    def weights(self, read: _Places) -> Iterator[tuple[str, float]]:
        """Of every stream of these tokens, ``s_R / s_O``."""
        tokens = self.dense[self.streams[-1].tensor].shape[:-1]
        others = np.setdiff1d(np.arange(tokens[read.axis]), read.at)
        for stream in self.streams:
            if self._is_of_tokens(stream) and self.dense[stream.tensor].shape[:-1] == tokens:
                tail = self.tail(stream)
                own, apart = (tail.moved(read.axis, at) for at in (np.array(read.at), others))
                if own > 0.0:
                    yield stream.block, own / apart if apart > UNMOVED * own else np.inf

    def tail(self, stream: Stream) -> _Tail:
        """The model behind a stream."""
        assert stream.linear is not None, "a stream of tokens"
        part = extract(self.model, [stream.tensor], self.outputs, self.dense)
        tensor, branch = self.dense[stream.tensor], self.dense[stream.linear.output]
        spread = (stream.gain * stream.vectors(branch)).std(axis=0)
        noise = np.random.default_rng(self.seed).standard_normal(tensor.shape)
        return _Tail(
            open_session(part, self.runtime),
            {**self.batch, stream.tensor: tensor},
            stream.tensor,
            spread * noise,
            {name: self.dense[name].astype(np.float64) for name in self.outputs},
        )

    def _is_of_tokens(self, stream: Stream) -> bool:
        """Whether it has samples, tokens and channels, in this order or the first two swapped."""
        rank = self.dense[stream.tensor].ndim
        return rank == 3 and stream.linear is not None and stream.linear.axis % rank == rank - 1


def _made_of(model: Model, name: str) -> set[str]:
    """The names of all that follows from a tensor."""
    found: set[str] = set()
    stack = [model.graph.tensors()[name]]
    while stack:
        made = [tensor for node in stack.pop().outputs for tensor in node.outputs]
        stack += [tensor for tensor in made if tensor.name not in found]
        found |= {tensor.name for tensor in made}
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Tail:
    """What is behind a stream, ready to see what a disturbance of some tokens does."""

    session: Session
    inputs: Batch
    tensor: str
    noise: Float[np.ndarray, "..."]
    dense: Batch

    def alone(self, output: str) -> _Tail:
        """With one output."""
        return replace(self, dense={output: self.dense[output]})

    def few(self, axis: int, among: Int64[np.ndarray, " n"], seed: int) -> tuple[int, ...]:
        """The places, among some, of the tokens that the output depends on, if these are few."""
        glances = np.random.default_rng(seed).permutation(among)[:GLANCES]
        if all(self.reads(axis, glances[at : at + 1]) for at in range(len(glances))):
            return ()
        places = tuple(self.places(axis, among))
        return places if len(places) <= len(among) / FEW else ()

    def places(self, axis: int, among: Int64[np.ndarray, " n"]) -> Iterator[int]:
        """Those of some neighbours that the output depends on, by halving."""
        if not self.reads(axis, among):
            return
        if len(among) == 1:
            yield int(among[0])
            return
        for half in np.array_split(among, 2):
            yield from self.places(axis, half)

    def reads(self, axis: int, places: Int64[np.ndarray, " n"]) -> bool:
        """Whether the output depends on any of some tokens."""
        return self.moved(axis, places, STRONG) > UNMOVED

    def moved(self, axis: int, places: Int64[np.ndarray, " n"], strength: float = SLIGHT) -> float:
        """By how much the outputs move, relative and squared, when tokens are disturbed."""
        stream = self.inputs[self.tensor].copy()
        at = (slice(None),) * axis + (places,)
        stream[at] += (strength * self.noise[at]).astype(stream.dtype)
        found = self.session.run({**self.inputs, self.tensor: stream})
        return sum(_moved(found[name], dense) for name, dense in self.dense.items())


def _moved(found: np.ndarray, dense: Float[np.ndarray, "..."]) -> float:
    """Relative squared difference, of what is finite."""
    finite = np.isfinite(dense) & np.isfinite(found)
    energy = float(np.square(dense[finite]).sum())
    return float(np.square(found[finite] - dense[finite]).sum()) / energy if energy else 0.0
