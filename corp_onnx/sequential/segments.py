"""A model cut into segments, one behind the other, each ending in the stream behind a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from corp_onnx.blocks.view import producer
from corp_onnx.graph.model import Model
from corp_onnx.graph.operators import SIZE_OPS, fixed_nodes
from corp_onnx.sequential.streams import Stream


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a graph between what earlier segments computed and the stream of a block."""

    streams: tuple[Stream, ...]
    """Of its blocks, in the order of the graph: one, or several that are parallel."""
    inputs: tuple[str, ...]
    """What it reads of earlier segments, and of the model's inputs."""
    outputs: tuple[str, ...]
    """What later segments read of it."""
    ends: tuple[str, ...]
    """All that it is computed for: its outputs, its streams, its last layers, its masks."""
    later: tuple[str, ...]
    """What later segments read, of it or of any before it."""


def segments_of(
    model: Model,
    streams: Sequence[Stream],
    masks: Mapping[str, Sequence[str]],
    layers: Mapping[str, Sequence[str]],
) -> tuple[Segment, ...]:
    """Cut a model at its streams, given in the order of the graph.

    A segment is all that its stream needs and no earlier one did, and the masks that say which of
    its tokens count. A block that has a layer within the segment of an earlier one, because its
    branch joins the same stream or because it begins with the other's last layer, belongs there
    too, with all that lies between. Whoever asks a tensor for its size belongs to the segment that
    computes it: the tensor may be narrower afterwards. What lies behind the last stream is in no
    segment.

    Args:
        model: The model.
        streams: Of every block that is to be cut.
        masks: By block, the tensors that say which tokens are padding.
        layers: By block, what its linear layers give.
    """
    drafts: list[_Draft] = []
    tensors = model.graph.tensors()
    done: set[int] = set()
    fixed = fixed_nodes(model.graph)
    for stream in streams:
        wanted = [*stream.ends, *masks.get(stream.block, ())]
        nodes = list(_needed([tensors[name] for name in wanted], done, fixed))
        nodes += list(_size_readers(nodes, done))
        own = {stream.ends[-1], *layers.get(stream.block, ())}
        parts = [place for place, draft in enumerate(drafts) if not draft.made.isdisjoint(own)]
        first = parts[0] if parts else len(drafts)
        draft = _Draft.joined(drafts[first:])
        draft.add(stream, wanted, nodes)
        drafts[first:] = [draft]
    return tuple(draft.segment(drafts[place + 1 :]) for place, draft in enumerate(drafts))


class _Draft:
    """A segment in the making."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.made: set[str] = set()
        self._read: dict[str, None] = {}
        self._ends: dict[str, None] = {}

    @staticmethod
    def joined(drafts: Iterable[_Draft]) -> _Draft:
        """Neighbours as one."""
        whole = _Draft()
        for draft in drafts:
            whole.streams += draft.streams
            whole.made |= draft.made
            whole._read |= draft._read
            whole._ends |= draft._ends
        return whole

    def add(self, stream: Stream, ends: Iterable[str], nodes: Iterable[gs.Node]) -> None:
        """A block, what it has to compute, and the nodes that do."""
        self.streams.append(stream)
        self._ends |= dict.fromkeys(ends)
        for node in nodes:
            self.made |= {tensor.name for tensor in node.outputs}
            self._read |= dict.fromkeys(_variables(node))

    @property
    def inputs(self) -> list[str]:
        """What is not made here, in the order in which it is asked for."""
        return [name for name in (*self._read, *self._ends) if name not in self.made]

    def segment(self, others: Sequence[_Draft]) -> Segment:
        """The segment, given all that come after it."""
        later = {name for other in others for name in other.inputs}
        later -= {name for other in others for name in other.made}
        outputs = tuple(sorted(self.made & later))
        return Segment(
            tuple(self.streams),
            tuple(dict.fromkeys(self.inputs)),
            outputs,
            tuple(dict.fromkeys((*outputs, *self._ends))),
            tuple(sorted(later)),
        )


def _needed(ends: Iterable[gs.Tensor], done: set[int], fixed: set[int]) -> Iterator[gs.Node]:
    """The nodes that compute tensors, less those that are done, which they then are too.

    What is ``fixed`` is done wherever it is needed: a layer is known by its weight.
    """
    stack = [node for tensor in ends if (node := producer(tensor)) is not None]
    seen: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) in done or id(node) in seen:
            continue
        (seen if id(node) in fixed else done).add(id(node))
        yield node
        stack += [maker for tensor in _operands(node) if (maker := producer(tensor)) is not None]


def _size_readers(part: Iterable[gs.Node], done: set[int]) -> Iterator[gs.Node]:
    for node in part:
        for tensor in node.outputs:
            for reader in tensor.outputs:
                if reader.op in SIZE_OPS and id(reader) not in done:
                    done.add(id(reader))
                    yield reader


def _variables(node: gs.Node) -> Iterator[str]:
    """The names of all variables that a node reads."""
    for tensor in _operands(node):
        if isinstance(tensor, gs.Variable) and tensor.name:
            yield tensor.name


def _operands(node: gs.Node) -> Iterator[gs.Tensor]:
    """What a node reads, also from inside its subgraphs."""
    yield from node.inputs
    for subgraph in node.subgraphs(recursive=True):
        own = {id(tensor) for inner in subgraph.nodes for tensor in inner.outputs}
        own |= {id(tensor) for tensor in subgraph.inputs}
        for inner in subgraph.nodes:
            yield from (tensor for tensor in inner.inputs if id(tensor) not in own)
