"""What stands between a projection and a product, in words that a user understands."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from corp_onnx.blocks.movement import MOVING_OPS, PASSING_OPS, Blocked
from corp_onnx.blocks.view import View, follows_data, layers_above, producer, reduced_axes
from corp_onnx.graph.operators import SIZE_OPS

NORMS = frozenset(
    """BatchNormalization GroupNormalization InstanceNormalization LayerNormalization
    LpNormalization MeanVarianceNormalization RMSNormalization SimplifiedLayerNormalization
    SkipLayerNormalization SkipSimplifiedLayerNormalization ReduceL1 ReduceL2 ReduceMean ReduceSum
    ReduceSumSquare""".split()
)
"""Operators that norms are, or that they are written out with."""

NEIGHBOURS = frozenset(
    {"Conv", "AveragePool", "MaxPool", "GlobalAveragePool", "ReduceMax", "Resize"}
)
REDUCTIONS = frozenset({"ReduceMean", "ReduceSum"})
"""Part of norms, and over tokens of pooling."""

CACHES = frozenset({"ScatterElements", "ScatterND", "TensorScatter"})
TABLE_OPS = frozenset({"Add", "Sub", "Mul", "Neg", "Pad", "Where"})
"""What may be done to a table of angles after its sines and cosines are taken."""

ROTATED = "is rotated by its position (rotary embedding)"
HINT = ": see --rotary"
NORMALISED = "is normalised between the projection and the product"
CACHED = "is kept in a cache (graph input or output)"


def why_blocked(view: View, path: Blocked, target: gs.Tensor) -> str:
    """Why no linear layer leads to ``target`` by movement and scaling, as the end of a sentence."""
    region = list(_region(view, target))
    turning = next((node for node in region if _is_rotation(view, node)), None)
    if turning is not None:
        return f"{ROTATED} ({turning.name})" + _hint(view, turning)
    if path.node is None:
        return _without_layer(view, path, target)
    if path.node.op in CACHES:
        return f"{CACHED} ({path.node.op} {path.node.name})"
    if path.node.op == "Conv" and path.node.attrs.get("group", 1) > 1:
        return (
            f"comes from a convolution in {path.node.attrs['group']} groups ({path.node.name}), "
            "which is not one linear layer"
        )
    norm = next((node for node in region if _is_norm(view, node, target)), None)
    if norm is not None:
        return f"{NORMALISED} ({norm.op} {norm.name})"
    if path.node.op in NEIGHBOURS or _over_tokens(view, path.node):
        return f"is mixed with neighbouring tokens by {path.node.op} ({path.node.name})"
    return (
        f"does not come from one linear layer by movement and scaling alone: {path.node.op} "
        f"{path.node.name!r} stands in between"
    )


def _hint(view: View, turning: gs.Node) -> str:
    """What to do about it, or why nothing can be done."""
    if turning.op == "RotaryEmbedding":
        return ": inside an operator, which stays as it is"
    return "" if view.rotary else HINT


def _without_layer(view: View, path: Blocked, target: gs.Tensor) -> str:
    """What is said of a path that ends at an input or a constant."""
    joined = any(node.op == "Concat" for node in _region(view, target))
    given = any(path.tensor == tensor.name for tensor in view.graph.inputs)
    if joined and given:
        return f"{CACHED}: {path.tensor!r} is joined to it"
    return f"comes from {path.tensor!r}, an input or a constant, not from a linear layer"


def _region(view: View, target: gs.Tensor) -> Iterator[gs.Node]:
    """Everything between linear layers and ``target``, the nearest first."""
    waiting, seen = [target], set()
    while waiting:
        tensor = waiting.pop(0)
        node = producer(tensor)
        if node is None or node.op in SIZE_OPS or tensor.name in view.linears or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        waiting.extend(value for value in node.inputs if view.known(value) is None)


def _is_norm(view: View, node: gs.Node, target: gs.Tensor) -> bool:
    """Whether a node is part of a norm of the layer that ``target`` mostly comes from."""
    if node.op not in NORMS or _over_tokens(view, node):
        return False
    return sources_of(view, target)[:1] == sources_of(view, node.inputs[0])[:1]


def _over_tokens(view: View, node: gs.Node) -> bool:
    """Whether a node sums up along axes whose sizes depend on the inputs, as channels never do."""
    shapes = [facts.shape(node.inputs[0]) for facts in view.probes]
    axes = reduced_axes(view, node) if node.op in REDUCTIONS else []
    return bool(axes) and all(len({shape[axis] for shape in shapes if shape}) > 1 for axis in axes)


def _is_rotation(view: View, node: gs.Node) -> bool:
    """Whether a node rotates pairs of channels, by an operator or as ``x · cos ± y · sin``."""
    if node.op == "RotaryEmbedding":
        return True
    if node.op not in {"Add", "Sub"} or any(view.known(value) is not None for value in node.inputs):
        return False
    factors = [_factors(view, value) for value in node.inputs]
    return bool(factors[0]) and factors[0] == factors[1]


def _factors(view: View, tensor: gs.Tensor) -> list[str]:
    """The linear layer whose channels are multiplied with a table of positions, if it is that."""
    node = producer(tensor)
    while node is not None and node.op in PASSING_OPS | MOVING_OPS - {"Concat"} | {"Neg"}:
        node = producer(node.inputs[0])
    if node is None or node.op != "Mul":
        return []
    for mine, table in (node.inputs, node.inputs[::-1]):
        sources = sources_of(view, mine)
        if len(sources) == 1 and is_table(view, table):
            return sources
    return []


def sources_of(view: View, tensor: gs.Tensor) -> list[str]:
    """Names of `layers_above`."""
    return [layer.name for layer in layers_above(view, tensor)]


def is_table(view: View, tensor: gs.Tensor) -> bool:
    """Whether a tensor holds sines or cosines, or anything else that no data decide."""
    waiting, seen = [tensor], set()
    while waiting:
        current = waiting.pop()
        node = producer(current)
        if current.name in seen or (node is not None and node.op in {"Sin", "Cos"}):
            continue
        seen.add(current.name)
        if view.known(current) is not None or not follows_data(current):
            continue
        if node is None or node.op not in PASSING_OPS | MOVING_OPS | TABLE_OPS:
            return False
        waiting.extend(node.inputs[:1] if node.op == "Gather" else node.inputs)
    return True
