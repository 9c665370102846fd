"""Who else reads a tensor whose width will change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.blocks.movement import Path, move
from corp_onnx.blocks.records import SizeReader
from corp_onnx.blocks.routes import Traced
from corp_onnx.blocks.view import View, serves_only


def size_readers(
    view: View, traced: Sequence[Traced], inside: set[int], scaled: set[int]
) -> tuple[SizeReader, ...] | str:
    """Shape nodes that read tensors of the paths and stay, or who else reads one of them.

    Nodes in ``inside`` (by ``id``) belong to the block. A Shape node that serves only paths that
    will be replaced, or nodes in ``scaled``, whose scale becomes a constant, is left out.
    """
    readers: dict[str, SizeReader] = {}
    splits = {item.route.layout.split for item in traced}
    old = scaled | {id(n) for item in traced for n in item.path.nodes if n.name not in splits}
    for path in (item.path for item in traced):
        for tensor in _tensors(path):
            if view.is_output(tensor):
                return f"{tensor.name!r} is an output of the model"
            for node in tensor.outputs:
                if id(node) in inside or (node.op == "Shape" and serves_only(node, old)):
                    continue
                reader = _size_reader(view, path, tensor, node) if node.op == "Shape" else None
                if reader is None:
                    return f"{tensor.name!r} is also read by {node.op} ({node.name})"
                readers[node.name] = reader
    return tuple(readers.values())


def readers_below(
    path: Path, moved: Mapping[str, np.ndarray], width: int
) -> tuple[SizeReader, ...] | str:
    """Shape nodes that read mixed values of ``width`` on their way, or who wants their size.

    What only says where these values are to move goes along with them and is left out.
    """
    inside = {id(node) for node in path.nodes}
    readers = []
    for tensor in _tensors(path):
        position = moved[tensor.name] % width
        for node in tensor.outputs:
            if node.op not in {"Shape", "Size"} or serves_only(node, inside):
                continue
            if node.op == "Size":
                return f"the number of elements of {tensor.name!r} is read ({node.name})"
            sizes = [
                size if np.diff(position, axis=axis).any() else f"t{axis}"
                for axis, size in enumerate(position.shape)
            ]
            read = slice(node.attrs.get("start", 0), node.attrs.get("end"))
            readers.append(SizeReader(node.name, tuple(sizes[read]), tensor.name))
    return tuple(readers)


def _tensors(path: Path) -> list[gs.Tensor]:
    """The source and everything that moves on the path."""
    return [path.source, *(tensor for node in path.nodes for tensor in node.outputs)]


def _size_reader(view: View, path: Path, tensor: gs.Tensor, node: gs.Node) -> SizeReader | None:
    """Every axis of the tensor as a number or as a token axis of the projection, or None."""
    sizes: list[int | str] = []
    shapes = [facts.shape(tensor) for facts in view.probes]
    first, source = shapes[0], view.shape(path.source)
    if first is None or source is None:
        return None
    numbers = np.arange(np.prod(source)).reshape(source)
    moved = move(path, numbers, view.probes[0], view.opset, scaled=False)
    assert moved is not None, "the path was traced with the same facts"
    coordinates = np.unravel_index(moved[tensor.name] // source[-1], source[:-1])
    for axis, size in enumerate(first):
        if all(shape is not None and shape[axis] == size for shape in shapes):
            sizes.append(size)
            continue
        found = [
            token
            for token, coordinate in enumerate(coordinates)
            if source[token] == size and np.diff(coordinate, axis=axis).any()
        ]
        if len(found) != 1:
            return None
        sizes.append(f"t{found[0]}")
    read = slice(node.attrs.get("start", 0), node.attrs.get("end"))
    return SizeReader(node.name, tuple(sizes[read]), view.linears[path.source.name].input)
