"""What is known of every tensor at given input sizes, without running the model.

Small tensors that follow from constants and shapes alone (the shape arithmetic that exporters
write) are computed, up to a size; of all others the shape is inferred.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from corp_onnx.graph.facts import Facts, shape_of, type_of, type_of_constant
from corp_onnx.graph.feasible import runs
from corp_onnx.graph.fused import has_rule, outputs_of, twin_of
from corp_onnx.graph.operators import SIZE_OPS, is_standard
from corp_onnx.graph.reference import run
from corp_onnx.graph.sizes import Sizes, input_sizes, sequences_to_try

log = logging.getLogger(__name__)

LARGEST_KNOWN_VALUE = 1 << 16
"""Elements of the largest tensor whose value is computed rather than only its shape."""

COMPUTED_OPS = frozenset(
    """Abs Add And Cast CastLike Ceil Clip Concat Constant ConstantOfShape Cos CumSum Div Equal
    Erf Exp Expand Flatten Floor Gather Greater GreaterOrEqual Identity Less LessOrEqual Log Max
    Min Mod Mul Neg Not OneHot Or Pow Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum Relu Reshape Round Shape Sigmoid Sign Sin Size Slice Softplus Split Sqrt Squeeze
    Sub Tanh Tile Transpose Trilu Unsqueeze Where""".split()
)
"""Operators that shape arithmetic, positions, scales and masks are made of."""

ROUNDS = frozenset({"Loop", "Scan"})
"""Operators whose body runs as often as the data say."""

LARGEST_SHAPE_OPERAND = 256
"""Elements of the largest constant that shape inference is given the values of."""


def usual_facts(graph: gs.Graph, given: Sizes | None = None) -> Facts:
    """Facts at the sizes used for counting: batch 1, and the first usual sequence that fits.

    Raises:
        PlanError: If ``given`` does not fit the inputs.
    """
    return _usual(graph, given)[1]


def usual_sequence(graph: gs.Graph, given: Sizes | None = None) -> int:
    """The first usual sequence at which the shapes of the model fit together best."""
    return _usual(graph, given)[0]


def _usual(graph: gs.Graph, given: Sizes | None) -> tuple[int, Facts]:
    known: dict[int, Facts] = {}
    evaluated = evaluator(graph)
    for sequence in sequences_to_try(graph):
        known[sequence] = evaluated(input_sizes(graph, sequence=sequence, given=given))
        if known[sequence].filled >= tensor_count(graph):
            break
    best = max(known, key=lambda sequence: known[sequence].filled)  # of equals the first
    return best, known[best]


def tensor_count(graph: gs.Graph) -> int:
    """How many tensors a graph computes or takes in."""
    return len(graph.inputs) + sum(bool(t.name) for node in graph.nodes for t in node.outputs)


def evaluator(graph: gs.Graph) -> Callable[[Sizes], Facts]:
    """`evaluate` for one graph, whose inputs may leave no choice of sizes: once for each."""
    known: dict[tuple[tuple[str, tuple[int, ...]], ...], Facts] = {}

    def evaluated(sizes: Sizes) -> Facts:
        key = tuple(sizes.items())
        if key not in known:
            known[key] = evaluate(graph, sizes)
        return known[key]

    return evaluated


def evaluate(graph: gs.Graph, sizes: Sizes) -> Facts:
    """Shapes and data-independent values of every tensor at the given input sizes.

    A tensor whose shape depends on the data is absent from the result, and so is what follows from
    it. After a Loop, a Scan, and an operator that is known neither to ONNX nor to `fused`, the
    shape that the file declares is taken, if its dimensions are those of inputs.
    """
    named = {
        str(name): size
        for tensor in graph.inputs
        for name, size in zip(tensor.shape or (), sizes[tensor.name], strict=False)
        if not isinstance(name, int)
    }
    facts = Facts(sizes, named=named)
    for tensor in graph.inputs:
        if tensor.shape is not None or sizes[tensor.name]:  # else nothing is known of it
            facts.shapes[tensor.name] = sizes[tensor.name]
            facts.types[tensor.name] = type_of(tensor.dtype, sizes[tensor.name])
    _record_all(graph.nodes, facts, _opsets(graph))
    return facts


def _record_all(nodes: Sequence[gs.Node], facts: Facts, opsets: Mapping[str, int]) -> None:
    """What is known after every node, in the order of the graph."""
    for node in nodes:
        known = _known_inputs(node, facts) if node.op in COMPUTED_OPS else None
        if known is not None:
            _record_values(node, _fitting(node, known, opsets[""]), facts)
        elif node.op == "If":
            _record_choice(node, facts, opsets)
        elif node.op in ROUNDS:
            _record_declared(node, facts)
        else:
            _record_shapes(node, facts, opsets)


def _record_choice(node: gs.Node, facts: Facts, opsets: Mapping[str, int]) -> None:
    """Shapes after an If: those of the body that is chosen, or that both bodies agree on.

    Of values only whole numbers are taken over, which say how data are moved: a factor that is the
    same at all sizes that are probed may be another where the other body is chosen.
    """
    condition = facts.value(node.inputs[0])
    bodies = [node.attrs["then_branch"], node.attrs["else_branch"]]
    if condition is not None and condition.size == 1:
        bodies = [bodies[0] if condition.reshape(()) else bodies[1]]
    ends = []
    for body in bodies:
        inner = facts.copy()
        _record_all(body.nodes, inner, opsets)
        ends.append([(inner.shape(t), inner.kind(t), inner.value(t)) for t in body.outputs])
    for tensor, *made in zip(node.outputs, *ends, strict=True):
        shapes = {shape for shape, *_ in made}
        (shape, kind, value), *others = made
        if len(shapes) == 1 and shape is not None and kind is not None:
            facts.shapes[tensor.name], facts.types[tensor.name] = shape, kind
        if value is not None and not others:
            facts.chosen.add(tensor.name)
            _record_value(tensor, value, facts)


def declared_only(graph: gs.Graph) -> set[str]:
    """Tensors of whose shapes nothing is known but what the file declares.

    Surgery must not forget these: no rule would give them back.
    """
    opsets = _opsets(graph)
    return {
        tensor.name
        for node in graph.nodes
        if node.op in ROUNDS
        or (
            _schema(node.op, opsets.get(node.domain or "", 1), node.domain or "") is None
            and not has_rule(node)
        )
        for tensor in node.outputs
    }


def _opsets(graph: gs.Graph) -> dict[str, int]:
    """The version of every operator set that a graph imports, by domain."""
    return {"": graph.opset} | {item.domain: item.version for item in graph.import_domains or ()}


def _known_inputs(node: gs.Node, facts: Facts) -> dict[str, np.ndarray] | None:
    """Input values by name if all are known and small, for Shape the shape suffices."""
    if not is_standard(node):
        return None
    if node.op in SIZE_OPS:
        shape = facts.shape(node.inputs[0])
        # A view without memory: only its shape is read.
        empty = None if shape is None else np.broadcast_to(np.float32(0), shape)
        return None if empty is None else {node.inputs[0].name: empty}
    known = {}
    for tensor in node.inputs:
        if not tensor.name:
            continue
        if isinstance(tensor, gs.Constant) and np.prod(tensor.shape) > LARGEST_KNOWN_VALUE:
            return None
        value = facts.value(tensor)
        if value is None:
            return None
        known[tensor.name] = value
    return known


def _fitting(node: gs.Node, inputs: Mapping[str, np.ndarray], opset: int) -> tuple[np.ndarray, ...]:
    """The results of an operator; none where the sizes do not fit together."""
    try:
        with np.errstate(all="ignore"):
            return run(node, inputs, opset)
    except (IndexError, ValueError, RuntimeError) as error:
        log.debug("%s does not run at these sizes: %s", node.name, error)
        return ()


def _record_values(node: gs.Node, results: tuple[np.ndarray, ...], facts: Facts) -> None:
    chosen = any(tensor.name in facts.chosen for tensor in node.inputs)
    for tensor, value in zip(node.outputs, results, strict=False):
        facts.shapes[tensor.name] = value.shape
        facts.types[tensor.name] = type_of(value.dtype, value.shape)
        if chosen:
            facts.chosen.add(tensor.name)
        _record_value(tensor, value, facts)


def _record_value(tensor: gs.Tensor, value: np.ndarray, facts: Facts) -> None:
    """Keep a value that is small, and no factor that follows from a choice by sizes."""
    factor = tensor.name in facts.chosen and value.dtype.kind not in "iub"
    if value.size <= LARGEST_KNOWN_VALUE and not factor:
        facts.values[tensor.name] = value


def _record_shapes(node: gs.Node, facts: Facts, opsets: Mapping[str, int]) -> None:
    proto = _standard(node)
    schema = _schema(proto.op_type, opsets.get(proto.domain, 1), proto.domain)
    if schema is None or not schema.has_type_and_shape_inference_function:
        _record_fused(node, facts)  # ONNX leaves the rule out for a few of its own operators
        return
    named = [tensor for tensor in node.inputs if tensor.name in proto.input and tensor.name]
    inputs = {t.name: facts.types.get(t.name) or type_of_constant(t) for t in named}
    if None in inputs.values():
        return
    data = {
        tensor.name: onnx.numpy_helper.from_array(facts.value(tensor), tensor.name)
        for tensor in named
        if tensor.name in facts.values or _is_small(tensor)
    }
    try:
        inferred = onnx.shape_inference.infer_node_outputs(schema, proto, inputs, data)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        log.debug("shape inference failed at %s: %s", node.name, error)
        return
    known = {name: shape_of(kind) for name, kind in inferred.items() if name}
    if not all(runs(node, facts, shape) for shape in known.values()):
        log.debug("%s does not run at these sizes: %s", node.name, known)
        return
    facts.types.update(inferred)
    facts.shapes.update({name: shape for name, shape in known.items() if shape is not None})


def _standard(node: gs.Node) -> onnx.NodeProto:
    """A node as protobuf; one with an activation fused to its end as what it is without."""
    proto = gs.exporters.onnx_exporter.OnnxExporter.export_node(node)
    twin = twin_of(node)
    if twin is not None:
        proto.op_type, proto.domain = twin, ""
        plain = [entry for entry in proto.attribute if not entry.name.startswith("activation")]
        del proto.attribute[:], proto.input[3:]
        proto.attribute.extend(plain)
    return proto


def _record_fused(node: gs.Node, facts: Facts) -> None:
    """What is known after an operator without a schema: by its rule, or else by declaration."""
    made = outputs_of(node, [facts.shape(t) if t.name else None for t in node.inputs])
    kinds = (facts.dtype(t) for t in node.inputs if t.name)
    first = next((kind for kind in kinds if kind is not None), None)
    if made is None or first is None:
        _record_declared(node, facts)
        return
    for tensor, entry in zip(node.outputs, made, strict=False):
        if tensor.name and entry is not None:
            facts.shapes[tensor.name] = entry.shape
            facts.types[tensor.name] = type_of(entry.dtype or first, entry.shape)


def _record_declared(node: gs.Node, facts: Facts) -> None:
    """The shapes that the file states of a node's outputs, as far as they can be relied on."""
    log.debug("no rule for %s.%s: %s keeps what is declared", node.domain, node.op, node.name)
    for tensor in node.outputs:
        if tensor.shape is None or tensor.dtype is None:
            continue
        dims = [facts.named.get(size, size) for size in tensor.shape]
        # All fixed although inputs are not: it may be left over from another batch size.
        doubtful = facts.named and dims == list(tensor.shape)
        if not doubtful and all(isinstance(size, int) and size > 0 for size in dims):
            facts.shapes[tensor.name] = tuple(dims)
            facts.types[tensor.name] = type_of(tensor.dtype, tuple(dims))


def _is_small(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant that may be a shape, an axis or a bound."""
    return isinstance(tensor, gs.Constant) and math.prod(tensor.shape) <= LARGEST_SHAPE_OPERAND


@cache
def _schema(op: str, opset: int, domain: str) -> onnx.defs.OpSchema | None:
    if not onnx.defs.has(op, opset, domain):
        return None
    return onnx.defs.get_schema(op, opset, domain)
