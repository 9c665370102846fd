"""What is known of a graph at two batches and two lengths."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from corp_onnx.graph.facts import Facts
from corp_onnx.graph.shapes import evaluator, tensor_count
from corp_onnx.graph.sizes import Sizes, input_sizes, traced_sequences

PROBED_SIZES = (((2, 5), (3, 7)), ((2, 64), (3, 96)), ((2, 4000), (3, 6000)), ((1, 5), (1, 7)))
"""Pairs of (batch, sequence) at which data movement is run; the next where one does not fit.

Last comes a batch of one, which is all that some exporters leave possible.
"""


def probed(graph: gs.Graph, sizes: Sizes | None = None) -> tuple[Facts, ...]:
    """Facts at two batch and two sequence sizes: the pair at which most shapes can be inferred.

    A model that runs at one length only is looked at there. Dimensions that the caller gives are
    those of his data; only their first axis varies.
    """
    best: tuple[Facts, ...] = ()
    evaluated = evaluator(graph)
    for pair in PROBED_SIZES:
        probes = tuple(evaluated(_probe_sizes(graph, *size, sizes)) for size in pair)
        if not best or probes[0].filled > best[0].filled:
            best = probes
        if all(facts.filled >= tensor_count(graph) for facts in probes):
            return best
    for length in traced_sequences(graph):
        two, three = (_probe_sizes(graph, batch, length, sizes) for batch in (2, 3))
        first = evaluated(two)
        if first.filled > best[0].filled:
            best = first, evaluated(three)
    return best


def _probe_sizes(
    graph: gs.Graph, batch: int, sequence: int, given: Sizes | None
) -> dict[str, tuple[int, ...]]:
    by_place = input_sizes(graph, batch=batch, sequence=sequence)
    varied = {
        name: (*(by_place.get(name) or (batch,))[:1], *shape[1:])
        for name, shape in (given or {}).items()
    }
    return input_sizes(graph, batch=batch, sequence=sequence, given=varied)
