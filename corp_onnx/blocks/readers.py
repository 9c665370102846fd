"""Who asks for the size of a tensor whose width will change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.movement import (
    MOVING_OPS,
    PASSING_OPS,
    Path,
    element_numbers,
    move,
)
from corp_onnx.blocks.records import SizeReader
from corp_onnx.blocks.routes import Traced
from corp_onnx.blocks.view import View, serves_only
from corp_onnx.graph.operators import SIZE_OPS


def size_readers(
    view: View, paths: Sequence[Path], ends: Sequence[Traced], served: set[int]
) -> tuple[SizeReader, ...] | str:
    """Shape nodes that read what is made of a layer's output, or who else wants a size of it.

    Nodes in ``served`` (by ``id``) need no size any more, and so do those of the paths, but for
    those that say how tokens are split. What serves only these is left out, and so is what reads
    an end that keeps its shape.

    Args:
        view: The graph.
        paths: From the layer's output to everything that is made of it by movement.
        ends: Those of them that will be made anew.
        served: See above.
    """
    readers: dict[str, SizeReader] = {}
    kept = {end.route.layout.split for end in ends}
    nodes = {id(node): node.name for path in paths for node in path.nodes}
    asking = {node for node, name in nodes.items() if name in kept}
    asking |= {node for path in paths for node in path.turning}  # their tables stay
    old = served | (nodes.keys() - asking)
    unchanged = {end.route.operand for end in ends if not end.route.layout.width}
    for path in paths:
        for node in view.readers(path.target) if path.target.name not in unchanged else ():
            if node.op not in SIZE_OPS or serves_only(node, old, asking):
                continue
            reader = _size_reader(view, path, ends, node)
            if reader is None:
                return f"{path.target.name!r} is also read by {node.op} ({node.name})"
            readers[node.name] = reader
    return tuple(readers.values())


def readers_below(
    view: View, path: Path, moved: Mapping[str, np.ndarray], position: np.ndarray
) -> tuple[SizeReader, ...] | str:
    """Shape nodes that read mixed values on their way, or who wants their size.

    ``position`` is that within a head by element number. What only says where these values are to
    move goes along with them and is left out.
    """
    inside = {id(node) for node in path.nodes}
    readers = []
    for tensor in tensors_of(path):
        places = position[moved[tensor.name]]
        for node in view.readers(tensor):
            if node.op not in SIZE_OPS or serves_only(node, inside):
                continue
            if node.op == "Size":
                return f"the number of elements of {tensor.name!r} is read ({node.name})"
            sizes = [
                size if np.diff(places, axis=axis).any() else f"t{axis}"
                for axis, size in enumerate(places.shape)
            ]
            readers.append(_reader(node, sizes, tensor.name))
    return tuple(readers)


def measured_only(view: View, node: gs.Node) -> list[gs.Node]:
    """The movement from ``node`` down if nobody reads more of it than its size; else nothing."""
    moves = node.op in (PASSING_OPS | MOVING_OPS) - {"Concat"}
    if not moves or any(map(view.is_output, node.outputs)):
        return []
    found = [node]
    for reader in (reader for tensor in node.outputs for reader in view.readers(tensor)):
        if reader.op in SIZE_OPS:
            continue
        below = measured_only(view, reader)
        if not below:
            return []
        found += below
    return found


def tensors_of(path: Path) -> list[gs.Tensor]:
    """The source and everything that moves on the path."""
    return [path.source, *(tensor for node in path.nodes for tensor in node.outputs)]


def _size_reader(
    view: View, path: Path, ends: Sequence[Traced], node: gs.Node
) -> SizeReader | None:
    """Every axis of a path's target as a number, or as that of a tensor that stays or is made anew.

    That is the input of the layer, which has the token axes of its output, or one of the ends. What
    is said of axes whose size nobody takes does not matter.
    """
    tokens = _tokens(view, path)
    if node.op != "Shape":
        return None
    taken = _axes_taken(view, node, tokens.ndim)
    likes = {view.linears[path.source.name].input: Path(path.source, path.source, ())}
    likes |= {end.route.operand: end.path for end in ends}
    for name, like in likes.items():
        sizes = [
            _size_like(view, (path.target, tokens), axis, (like.target, _tokens(view, like)))
            if axis in taken
            else tokens.shape[axis]
            for axis in range(tokens.ndim)
        ]
        found = [size for size in sizes if size is not None]
        if len(found) == len(sizes):
            return _reader(node, found, name)
    return None


def _axes_taken(view: View, node: gs.Node, rank: int) -> set[int]:
    """The axes whose size is taken from what a Shape node says; all, unless some are picked."""
    (sizes,) = node.outputs
    said = range(rank)[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
    picks = [
        view.known(reader.inputs[1])
        if reader.op == "Gather" and reader.inputs[0] is sizes
        else None
        for reader in view.readers(sizes)
    ]
    if view.is_output(sizes) or any(pick is None for pick in picks):
        return set(said)
    return {said[place] for pick in picks if pick is not None for place in pick.reshape(-1)}


def _tokens(view: View, path: Path) -> np.ndarray:
    """The token at every place of a path's target, at the first set of sizes."""
    shape, axis = view.shape(path.source), view.linears[path.source.name].axis
    assert shape is not None, "the path was traced with the same facts"
    numbers = element_numbers(shape, axis)
    moved = move(path, numbers, view.probes[0], view.opset, scaled=False)
    assert moved is not None, "the path was traced with the same facts"
    return moved[path.target.name] // shape[axis]


def _size_like(
    view: View,
    tensor: tuple[gs.Tensor, np.ndarray],
    axis: int,
    like: tuple[gs.Tensor, np.ndarray],
) -> int | str | None:
    """The size of an axis: a number if it is always the same, else which axis of ``like`` it is.

    Tensors come with their tokens: along axes of one meaning these follow each other alike.
    """
    shapes = [facts.shape(tensor[0]) or () for facts in view.probes]
    others = [facts.shape(like[0]) or () for facts in view.probes]
    sizes = {shape[axis] for shape in shapes}
    if len(sizes) == 1:
        return sizes.pop()
    line = _line(tensor[1], axis)
    for other in range(like[1].ndim):
        same = all(a[axis] == b[other] for a, b in zip(shapes, others, strict=True))
        if same and np.array_equal(_line(like[1], other), line):
            return f"t{other}"
    return None


def _line(array: np.ndarray, axis: int) -> np.ndarray:
    """The first line of an array along an axis."""
    line: np.ndarray = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])[0]
    return line


def _reader(node: gs.Node, sizes: Iterable[int | str], like: str) -> SizeReader:
    """What a Shape node says of these sizes, of which it may read a part."""
    read = slice(node.attrs.get("start", 0), node.attrs.get("end"))
    return SizeReader(node.name, tuple(list(sizes)[read]), like)
