"""Projections written anew: one linear layer, one Reshape, one Transpose."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Float64, Int64

from corp_onnx.blocks.linear import bias_of, dtype_of, weight_of
from corp_onnx.blocks.records import Layout, Linear, Route
from corp_onnx.blocks.view import constant_value
from corp_onnx.surgery.rotate import Rotator
from corp_onnx.surgery.theatre import Theatre


def kept_rows(route: Route, kept: Int64[np.ndarray, " k"]) -> Route:
    """A route of single channels, less those that are not kept."""
    return replace(
        route,
        channels=route.channels[kept],
        gain=route.gain[kept],
        offset=route.offset[kept],
        layout=replace(route.layout, rows=(len(kept),)),
    )


def project(
    theatre: Theatre,
    route: Route,
    role: str,
    mapping: Float64[np.ndarray, "g e r"] | None = None,
    positions: Int64[np.ndarray, " r"] | None = None,
) -> gs.Variable:
    """A new projection with ``mapping`` folded in, laid out as the route's operand.

    A head's columns become ``W_h A_h`` and its bias ``b_h A_h``; without a mapping they stay what
    they were. A scale that is the same for all channels stays outside the weights, as a constant.

    Args:
        theatre: The graph.
        route: What the projection was.
        role: For names.
        mapping: From all channels of a head to those that it is to have.
        positions: The position within a head by whose angle each of these is turned, where the
            route turns them.
    """
    linear = theatre.now(route.linear)
    dtype = dtype_of(theatre.nodes, linear, theatre.opset)
    first = route.gain.flat[0]
    scale = first if first and (route.gain == first).all() else 1.0
    gain, offset = route.gain / scale, route.offset / scale
    columns = weight_of(theatre.nodes, linear, theatre.opset)[:, route.channels] * gain
    vector = bias_of(theatre.nodes, linear, theatre.opset)[route.channels] * gain + offset
    rotator = None
    if route.rotation is not None:
        every = route.rotation.order
        rotator = Rotator(
            *(theatre, route.rotation, every if positions is None else positions, mapping is None),
            *(route.layout.tokens, _rows(route.layout)),
        )
        if mapping is None:
            columns, vector = columns[..., every], vector[..., every]
    if mapping is not None:
        columns = np.einsum("ihe,her->ihr", columns, mapping)
        vector = np.einsum("he,her->hr", vector, mapping)
    has_bias = theatre.has_bias(linear) or bool(offset.any())
    y = _multiply(
        theatre,
        linear,
        role,
        columns.reshape(len(columns), -1).astype(dtype),
        vector.reshape(-1).astype(dtype) if has_bias else None,
    )
    shape = len(route.channels), vector.shape[1]
    operand = _lay_out(theatre, y, route.layout, shape, rotator)
    if route.dtype != np.dtype(operand.dtype).name:
        operand = theatre.emit.cast(operand, route.dtype)
    if scale == 1.0:
        return operand
    constant = theatre.emit.constant(f"{role}_scale", np.asarray(scale, dtype=route.dtype))
    return theatre.emit.node("Mul", [operand, constant], dtype=route.dtype)


def _multiply(
    theatre: Theatre, linear: Linear, role: str, columns: np.ndarray, vector: np.ndarray | None
) -> gs.Variable:
    """``x W + b``, channels last, by the kind of node that the layer had: MatMul or Conv."""
    emit, x, dtype = theatre.emit, theatre.tensors[linear.input], columns.dtype
    vectors = [] if vector is None else [theatre.as_bias(linear, vector)]
    bias = [emit.constant(f"{role}_bias", each) for each in vectors]
    node = theatre.nodes[linear.node]
    if node.op == "Conv":
        old = constant_value(node.inputs[1], theatre.opset)
        assert old is not None, f"{linear.node} has no constant weight"
        points = old.ndim - 2
        kernel = columns.T.reshape(*columns.T.shape, *[1] * points)
        inputs = [x, emit.constant(f"{role}_weight", kernel), *bias]
        y = emit.node("Conv", inputs, dtype=dtype, attrs=node.attrs)
        last = [0, *range(2, points + 2), 1]
        return emit.node("Transpose", [y], dtype=dtype, attrs={"perm": last})
    y = emit.node("MatMul", [x, emit.constant(f"{role}_weight", columns)], dtype=dtype)
    return emit.node("Add", [y, *bias], dtype=dtype) if bias else y


def _rows(layout: Layout) -> int:
    """How many axes hold heads before these are copied."""
    return 1 if layout.copies else len(layout.rows)


def _lay_out(
    theatre: Theatre,
    y: gs.Variable,
    layout: Layout,
    shape: tuple[int, int],
    rotator: Rotator | None = None,
) -> gs.Variable:
    """Reshape and permute a projection ``[t0, …, tk, g·r]`` into an operand of a product.

    Heads and their width are given by ``shape``; they are turned by their position on the way.
    """
    emit, tokens = theatre.emit, layout.tokens
    heads, width = shape
    last = (width,) if layout.width else ()
    in_order = layout.perm == tuple(range(len(layout.perm)))
    is_flat = in_order and not layout.copies and not layout.split and _is_flat(layout)
    if is_flat and rotator is None:
        return y
    apart = (heads,) if layout.copies else layout.rows
    if apart or layout.split is not None:
        y = emit.node("Reshape", [y, _target(theatre, layout, (*apart, *last))], dtype=y.dtype)
    if rotator is not None:
        y = rotator.turned(y)
    if layout.copies:
        index = emit.integers("heads", layout.copies)
        y = emit.node("Gather", [y, index], dtype=y.dtype, attrs={"axis": tokens})
    if layout.copies and len(layout.rows) != 1:
        sizes = emit.integers("target", [*[0] * tokens, *layout.rows, *last])
        y = emit.node("Reshape", [y, sizes], dtype=y.dtype)
    if not in_order:
        y = emit.node("Transpose", [y], dtype=y.dtype, attrs={"perm": list(layout.perm)})
    if all(count == 1 for count in layout.groups):
        return y
    return emit.node(
        "Reshape", [y, _merged(theatre, y, layout, (*layout.rows, *last))], dtype=y.dtype
    )


def _is_flat(layout: Layout) -> bool:
    """Whether token axes stay apart and all channels stay together, as a projection has them."""
    channels = len(layout.perm) - layout.tokens
    return layout.groups == (*[1] * layout.tokens, channels)


def _target(theatre: Theatre, layout: Layout, channels: tuple[int, ...]) -> gs.Tensor:
    """The target that splits channels, and token axes where a Reshape did."""
    emit = theatre.emit
    if layout.split is None:
        return emit.integers("target", [*[0] * layout.tokens, *channels])
    sizes, named = theatre.nodes[layout.split].inputs[1], layout.tokens - layout.rest
    tokens: gs.Tensor | list[int] = (
        [int(size) for size in sizes.values[:named]]
        if isinstance(sizes, gs.Constant)
        else emit.part(sizes, 0, named)
    )
    return emit.join([tokens, [-1] * layout.rest, channels])


def _merged(
    theatre: Theatre, y: gs.Variable, layout: Layout, channels: tuple[int, ...]
) -> gs.Tensor:
    """The target that merges neighbouring axes as the layout's groups say.

    Sizes of heads and channels are known, those of tokens copied, computed, or left open once.
    """
    known = dict(enumerate(channels, layout.tokens))
    pieces: list[gs.Tensor | list[int]] = []
    axis, is_open = 0, False
    for place, count in enumerate(layout.groups):
        atoms = layout.perm[axis : axis + count]
        if all(atom in known for atom in atoms):
            pieces.append([prod(known[atom] for atom in atoms)])
        elif count == 1 and axis == place:
            pieces.append([0])
        elif not is_open:
            pieces.append([-1])
            is_open = True
        else:
            pieces.append(theatre.size(y, axis, count))
        axis += count
    return theatre.emit.join(pieces)
