"""Which nodes stay in float32, each with the reason: by operator, by place, by value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph.rounding import MOST_SQUARED_ERROR, squared_error
from corp_onnx.precision.slots import Types, is_in

NORMS = frozenset(
    """BatchNormalization GroupNormalization InstanceNormalization LayerNormalization
    LpNormalization LRN MeanVarianceNormalization RMSNormalization""".split()
)

REDUCTIONS = frozenset(
    """GlobalAveragePool GlobalLpPool ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean
    ReduceProd ReduceSum ReduceSumSquare""".split()
)
"""Sums over many numbers; a largest or smallest one is as exact as its input."""

WIDE_RANGE = frozenset("CumSum Det Exp Log LogSoftmax Pow Softmax Softplus".split())

ANGLES = frozenset("Cos Sin Tan".split())

STATES = frozenset("GRU LSTM RNN".split())

STEPS = frozenset("Abs Add Clip Div Max Min Mul Neg Reciprocal Sqrt Sub".split())
"""What is done with a sum, as the root and the quotient of a norm."""

MOVEMENT = frozenset("Flatten Identity Reshape Slice Split Squeeze Transpose Unsqueeze".split())
"""What makes no number larger, so that the range of its input is enough to know."""

SPREAD = MOVEMENT | {"Expand"}
"""What leaves every number as it is: a sum that went through is a sum still."""

WEIGHTED = frozenset("Conv ConvTranspose Gemm MatMul".split())
"""Operators whose second input holds weights, where it is constant."""

HEADROOM = 4.0
"""How far below the largest number of the type values on calibration data have to stay."""

Reasons = Mapping[str, str]
"""Why a node stays in float32, by its name."""


def kept_by_structure(graph: gs.Graph, types: Types) -> dict[str, str]:
    """What can be said without running the model; the first reason of a node counts."""
    kept: dict[str, str] = {}
    for rule in STRUCTURE:
        for node, reason in rule(graph, types):
            kept.setdefault(node.name, reason)
    return kept


def measured_tensors(graph: gs.Graph, types: Types, kept: Reasons) -> list[str]:
    """Tensors that would become narrow, whose range therefore matters."""
    names: dict[str, None] = {}
    for node in graph.nodes:
        if node.name in kept:
            continue
        wanted = [node.inputs[slot] for slot in types.narrow_inputs(node)]
        wanted += [node.outputs[slot] for slot in types.narrow_outputs(node)]
        names |= {t.name: None for t in wanted if not isinstance(t, gs.Constant)}
    return list(names)


def moved_from(graph: gs.Graph) -> dict[str, str]:
    """For a tensor that only rearranges another, or a part of it, the name of that other."""
    origin: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in MOVEMENT and not isinstance(node.inputs[0], gs.Constant):
            first = node.inputs[0].name
            origin |= {tensor.name: origin.get(first, first) for tensor in node.outputs}
    return origin


def kept_by_range(graph: gs.Graph, types: Types, peaks: Mapping[str, float]) -> dict[str, str]:
    """Nodes that make or read a tensor whose values come too close to the end of the type."""
    largest = types.format.largest
    wide = {name for name, peak in peaks.items() if peak > largest / HEADROOM}
    kept = {}
    for node in graph.nodes:
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name in wide and node.name not in kept:
                kept[node.name] = (
                    f"{tensor.name!r} reaches {peaks[tensor.name]:.3g} on calibration data, beyond "
                    f"1/{HEADROOM:.0f} of the range of {types.format.name}"
                )
    return kept


def _foreign(graph: gs.Graph, types: Types) -> Iterator[tuple[gs.Node, str]]:
    """Operators whose types are not known or not for us to choose."""
    for node in graph.nodes:
        if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
            yield node, "it holds a graph of its own"
        elif not is_in(node, types.opset):
            yield node, f"an operator of {node.domain or 'an unknown domain'}"
        elif any(t.name and types.known(t) is None for t in (*node.inputs, *node.outputs)):
            yield node, "the types around it are not known"


def _not_allowed(graph: gs.Graph, types: Types) -> Iterator[tuple[gs.Node, str]]:
    """Operators that do not exist in the type, and those that make numbers of a stated type."""
    for node in graph.nodes:
        if not is_in(node, types.opset):
            continue
        if not types.allows(node):
            yield node, f"opset {types.opset} has no {types.format.name} {node.op}"
        elif types.float_outputs(node) and not types.float_inputs(node) and node.op != "Cast":
            yield node, "it makes float32 of nothing"


def _sensitive(graph: gs.Graph, types: Types) -> Iterator[tuple[gs.Node, str]]:
    """Operators that need range, or sum up rounding."""
    groups = {
        "a normalisation": NORMS,
        "it sums many numbers": REDUCTIONS,
        "its values span a wide range": WIDE_RANGE,
        "an angle must be exact": ANGLES,
        "it carries a state": STATES,
    }
    for node in graph.nodes:
        for reason, ops in groups.items():
            if node.op in ops and types.float_inputs(node):
                yield node, reason


def _around_reductions(graph: gs.Graph, types: Types) -> Iterator[tuple[gs.Node, str]]:
    """What leads to a sum only (its squares), and what is done with it (its root, the quotient)."""
    sums = [node for node in graph.nodes if node.op in REDUCTIONS and types.float_inputs(node)]
    for node in sums:
        for tensor in node.inputs:
            if len(tensor.outputs) == 1 and tensor.inputs and tensor.inputs[0].op == "Mul":
                yield tensor.inputs[0], "it leads to a sum only"
    behind = [reader for node in sums for reader in _readers(node)]
    while behind:
        node = behind.pop()
        if node.op in STEPS | SPREAD:
            yield node, "it works on a sum"
            if node.op in SPREAD or _is_scalar_step(node):
                behind += _readers(node)


def _from_whole_numbers(graph: gs.Graph, types: Types) -> Iterator[tuple[gs.Node, str]]:
    """What is computed from whole numbers alone: positions, sizes, masks."""
    exact: set[int] = set()
    for node in graph.nodes:
        floats = [node.inputs[slot] for slot in types.float_inputs(node)]
        computed = [tensor for tensor in floats if not isinstance(tensor, gs.Constant)]
        starts = _reads_whole_numbers(node, types) and types.float_outputs(node)
        follows = computed and all(id(tensor) in exact for tensor in computed)
        if starts or (follows and not _has_weight(node)):
            exact |= {id(node.outputs[slot]) for slot in types.float_outputs(node)}
            yield node, "it is computed from whole numbers, such as positions or sizes"


def _with_lost_constants(graph: gs.Graph, types: Types) -> Iterator[tuple[gs.Node, str]]:
    """Readers of a constant that the type cannot hold."""
    seen: dict[int, str | None] = {}
    for node in graph.nodes:
        if not is_in(node, types.opset):
            continue
        for slot in types.narrow_inputs(node):
            tensor = node.inputs[slot]
            if isinstance(tensor, gs.Constant):
                if id(tensor) not in seen:
                    seen[id(tensor)] = why_lost(np.asarray(tensor.values), types)
                reason = seen[id(tensor)]
                if reason is not None:
                    yield node, f"{tensor.name!r} {reason}"


def why_lost(values: np.ndarray, types: Types) -> str | None:
    """What of an array would not survive rounding; None if all of it does."""
    error = squared_error(values, types.format.dtype)
    if error <= MOST_SQUARED_ERROR:
        return None
    peak = float(np.abs(values[np.isfinite(values)]).max())
    if np.isinf(error):
        return f"holds {peak:.3g}, beyond {types.format.name}"
    return f"holds nothing above {peak:.3g}, too small for {types.format.name}"


def _readers(node: gs.Node) -> Iterable[gs.Node]:
    return [reader for tensor in node.outputs for reader in tensor.outputs]


def _is_scalar_step(node: gs.Node) -> bool:
    """Whether a node changes every number by itself: the result is as small as what it reads."""
    others = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    return len(node.inputs) - len(others) == 1 and all(np.size(t.values) == 1 for t in others)


def _reads_whole_numbers(node: gs.Node, types: Types) -> bool:
    if node.op not in {"Cast", "CastLike"}:
        return False
    kind = types.known(node.inputs[0])
    return kind is not None and kind.kind in "iub"


def _has_weight(node: gs.Node) -> bool:
    return node.op in WEIGHTED and isinstance(node.inputs[1], gs.Constant)


Rule = Callable[[gs.Graph, Types], Iterator[tuple[gs.Node, str]]]

STRUCTURE: tuple[Rule, ...] = (
    _foreign,
    _not_allowed,
    _sensitive,
    _around_reductions,
    _from_whole_numbers,
    _with_lost_constants,
)
"""In the order in which they give their reasons."""
