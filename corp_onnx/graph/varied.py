"""What is known of a graph at several sizes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph.facts import Facts
from corp_onnx.graph.shapes import evaluator, tensor_count
from corp_onnx.graph.sizes import DEFAULT_PIXELS, Sizes, input_sizes, stretched, traced_sequences

PROBED_SIZES = (((2, 5), (3, 7)), ((2, 64), (3, 96)), ((2, 4000), (3, 6000)), ((1, 5), (1, 7)))
"""Pairs of (batch, sequence) at which data movement is run; the next where one does not fit.

Last comes a batch of one, which is all that some exporters leave possible.
"""

STRETCHES = 2.0, 0.5
"""How many times as many pixels a side the second probe has where they are open, and how many
times as long it is in all else that is open in shapes that the caller gives: the first of these
that the model admits."""

LONG_SEQUENCES, LONG_STRETCH = (16, 800, 4), 4.0
"""How many times as long as the first a third probe is: the first of these that tells something.
800 times are 4,000 samples of sound, for convolutions alone. The other is for pixels, and for
shapes that the caller gives."""

LONGEST, LONGEST_PLAIN = 64_000, 2048
"""No probe is longer than the first, nor than the second where nothing shrinks it."""

SHRINKING = frozenset({"AveragePool", "Conv", "MaxPool"})

_Place = tuple[int, int]
"""A batch and a sequence."""

_Probe = Callable[[_Place, float], Facts]
"""Facts at a place, and at so many times the other open sizes."""


def probed(graph: gs.Graph, sizes: Sizes | None = None) -> tuple[Facts, ...]:
    """Facts at two batches, two lengths and two sizes of pictures, small ones first.

    Of the pairs of lengths it is the one at which most shapes can be inferred; a model that runs
    at one length only is looked at there. Dimensions that the caller gives, but for the batch, are
    those of his data at first. Where strides leave as many tokens of both lengths, or a single
    one, which does not tell where tokens lie, a third probe is longer.
    """
    probe, count = _probe(graph, sizes), tensor_count(graph)
    best: tuple[Facts, ...] = ()
    start = PROBED_SIZES[0][0]
    for small, large in _pairs(graph):
        probes = _pair(probe, small, large)
        if not best or probes[0].filled > best[0].filled:
            best, start = probes, small
        if all(facts.filled >= count for facts in probes):
            break
    return (*best, *_longer(graph, probe, start, best))


def _pairs(graph: gs.Graph) -> Iterator[tuple[_Place, _Place]]:
    yield from PROBED_SIZES
    for length in traced_sequences(graph):
        yield (2, length), (3, length)


def _probe(graph: gs.Graph, sizes: Sizes | None) -> _Probe:
    evaluated = evaluator(graph)

    def probe(place: _Place, stretch: float) -> Facts:
        batch, sequence = place
        by_place = input_sizes(graph, batch=batch, sequence=sequence)
        given = {
            name: (*(by_place.get(name) or (batch,))[:1], *shape[1:])
            for name, shape in stretched(graph, sizes or {}, stretch).items()
        }
        pixels = int(DEFAULT_PIXELS * stretch)
        return evaluated(
            input_sizes(graph, batch=batch, sequence=sequence, pixels=pixels, given=given)
        )

    return probe


def _pair(probe: _Probe, small: _Place, large: _Place) -> tuple[Facts, Facts]:
    """Both probes; the second with other open sizes stretched, unless the model does not admit it.

    Sizes that are open in the file may be fixed by weights, such as those of places.
    """
    first = probe(small, 1)
    for stretch in STRETCHES:
        second = probe(large, stretch)
        if second.filled >= first.filled:
            return first, second
    return first, probe(large, 1)


def _longer(
    graph: gs.Graph, probe: _Probe, place: _Place, probes: Sequence[Facts]
) -> tuple[Facts, ...]:
    """A longer probe, if something differs there that is the same at all others."""
    batch, sequence = place
    shrinks = any(node.op in SHRINKING for node in graph.nodes)
    limit = LONGEST if shrinks else LONGEST_PLAIN
    for times in LONG_SEQUENCES:
        if times * sequence > limit:
            continue
        facts = probe((batch, times * sequence), LONG_STRETCH)
        if facts.filled >= probes[0].filled and _tells_more(facts, probes):
            return (facts,)
    return ()


def _tells_more(facts: Facts, probes: Sequence[Facts]) -> bool:
    """Whether a size or a value is the same at all probes, and another here."""
    for name, value in facts.values.items():
        before = [probe.values[name] for probe in probes if name in probe.values]
        same = len(before) == len(probes) and all(
            np.array_equal(before[0], other) for other in before[1:]
        )
        if same and not np.array_equal(before[0], value):
            return True
    shapes = ((name, [probe.shapes.get(name, ()) for probe in probes]) for name in facts.shapes)
    return any(
        len(set(before)) == 1 and before[0] != now
        for name, shape in shapes
        for *before, now in zip(*shape, facts.shapes[name], strict=False)
    )
