"""Einsum as matrix products: of more operands pair by pair, with axes turned and merged around."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph.canonical.rewriting import Bench, Outputs, instead
from corp_onnx.graph.emit import Emitter

_EQUATION = re.compile(r"^([A-Za-z]*),([A-Za-z]*)(?:->([A-Za-z]*))?$")
_LONG_EQUATION = re.compile(r"^([A-Za-z,]*)->([A-Za-z]*)$")


@dataclass(frozen=True, slots=True)
class Labels:
    """Letters of a sum of products, by where they occur."""

    left: str
    right: str
    result: str

    @staticmethod
    def read(equation: str) -> Labels | None:
        """The labels of an equation of two operands; None with an ellipsis or a diagonal."""
        found = _EQUATION.match(equation.replace(" ", ""))
        if found is None:
            return None
        left, right, result = found.groups()
        if result is None:
            once = [label for label in left + right if (left + right).count(label) == 1]
            result = "".join(sorted(once))
        if any(len(set(side)) != len(side) for side in (left, right, result)):
            return None
        return Labels(left, right, result)

    def swapped(self) -> Labels:
        """The same sum with its operands in the other order."""
        return Labels(self.right, self.left, self.result)

    @property
    def batch(self) -> str:
        """In both operands and in the result, in the order of the result."""
        return "".join(a for a in self.result if a in self.left and a in self.right)

    @property
    def summed(self) -> str:
        """In both operands only, in the order of the left one."""
        return "".join(a for a in self.left if a in self.right and a not in self.result)

    @property
    def rows(self) -> str:
        """In the left operand and the result."""
        return "".join(a for a in self.result if a not in self.right)

    @property
    def columns(self) -> str:
        """In the right operand and the result."""
        return "".join(a for a in self.result if a not in self.left)

    @property
    def complete(self) -> bool:
        """Whether every label has one of these roles."""
        roles = self.batch + self.summed
        return set(self.left) == {*roles, *self.rows} and set(self.right) == {
            *roles,
            *self.columns,
        }


def in_pairs(graph: gs.Graph) -> None:
    """Write, in place, every Einsum of three operands or more as one of two behind another.

    Two come first that share a label which is summed and of which no other operand knows, so what
    lies between is no larger than it must be; activations before weights.
    """
    long = [node for node in graph.nodes if node.op == "Einsum" and len(node.inputs) > 2]
    if not long:
        return
    emit = Emitter.of(graph)
    for node in long:
        made = _paired(node, emit.under(node.name))
        if made is not None:
            instead(graph, node, [made])
    graph.toposort()


def _paired(node: gs.Node, emit: Emitter) -> gs.Variable | None:
    """The same sum, two operands at a time; None if no two can be summed by themselves."""
    operands = list(node.inputs)
    weights = [isinstance(tensor, gs.Constant) for tensor in operands]
    made = None
    for first, second, equation in _steps(str(node.attrs.get("equation", "")), weights):
        pair = [operands[first], operands.pop(second)]
        made = emit.node("Einsum", pair, dtype=node.outputs[0].dtype, attrs={"equation": equation})
        operands[first] = made
    return made


def _steps(equation: str, weights: Sequence[bool]) -> list[tuple[int, int, str]]:
    """Which operands are summed in turn, the result in place of the first; none if some cannot."""
    sides = _LONG_EQUATION.match(equation.replace(" ", ""))
    terms, result = (sides[1].split(","), sides[2]) if sides else ([], "")
    if len(terms) != len(weights) or any(len(set(term)) != len(term) for term in terms):
        return []
    steps, known = [], list(weights)
    while len(terms) > 2:
        found = [
            (known[one] + known[other], one, other, labels)
            for one, other in combinations(range(len(terms)), 2)
            if (labels := _labels_left(terms, result, one, other)) is not None
        ]
        if not found:
            return []
        _, one, other, labels = min(found)
        steps.append((one, other, f"{terms[one]},{terms[other]}->{labels}"))
        terms[one], known[one] = labels, False
        del terms[other], known[other]
    return [*steps, (0, 1, f"{terms[0]},{terms[1]}->{result}")]


def _labels_left(terms: Sequence[str], result: str, one: int, other: int) -> str | None:
    """Labels that are still needed when two terms are summed; None if they sum none they share."""
    elsewhere = {*result}.union(*(t for i, t in enumerate(terms) if i not in {one, other}))
    if elsewhere.issuperset({*terms[one]} & {*terms[other]}):
        return None
    both = dict.fromkeys(terms[one] + terms[other])
    return "".join(label for label in both if label in elsewhere)


def einsum_as_matmul(node: gs.Node, bench: Bench) -> Outputs | None:
    """``Einsum`` as MatMul: with a constant weight a linear layer, else a product of activations.

    Left alone are sums of one operand, over diagonals or over an axis of one operand,
    and what would need sizes computed at run time.
    """
    labels = Labels.read(str(node.attrs.get("equation", "")))
    if labels is None or len(node.inputs) != 2 or not labels.complete or not labels.summed:
        return None
    left, right = node.inputs
    if isinstance(left, gs.Constant):
        left, right, labels = right, left, labels.swapped()
    if isinstance(left, gs.Constant) or not _agree(labels, left, right, bench):
        return None
    if isinstance(right, gs.Constant) and not labels.batch:
        return _linear(labels, left, right, bench)
    return _product(labels, left, right, bench)


def _agree(labels: Labels, left: gs.Tensor, right: gs.Tensor, bench: Bench) -> bool:
    """Whether shared axes have the same size on both sides, so that none is repeated."""
    sizes = [
        dict(zip(names, shape, strict=True))
        for names, shape in (
            (labels.left, bench.shape(left)),
            (labels.right, bench.shape(right)),
        )
        if shape is not None and len(shape) == len(names)
    ]
    if len(sizes) != 2:
        return False
    one, other = sizes
    return all(one[label] == other[label] for label in labels.batch + labels.summed)


def _linear(labels: Labels, x: gs.Tensor, weight: gs.Constant, bench: Bench) -> Outputs | None:
    """A product with a matrix: merged axes of the weight are constants, those of x follow."""
    sizes = dict(zip(labels.right, weight.shape, strict=True))
    rows = "".join(label for label in labels.left if label in labels.rows)
    if not rows:
        return None
    matrix = np.asarray(weight.values).transpose(
        [labels.right.index(label) for label in labels.summed + labels.columns]
    )
    inner = math.prod(sizes[label] for label in labels.summed)
    outer = math.prod(sizes[label] for label in labels.columns)
    dtype = weight.dtype
    moved = _turned(bench, x, labels.left, rows + labels.summed)
    keep = [0] * len(rows)
    if len(labels.summed) > 1:
        moved = _reshaped(bench, moved, [*keep, inner], dtype)
    constant = bench.emit.constant("weight", matrix.reshape(inner, outer))
    made = bench.emit.node("MatMul", [moved, constant], dtype=dtype)
    if len(labels.columns) != 1:
        made = _reshaped(bench, made, [*keep, *(sizes[a] for a in labels.columns)], dtype)
    return _finished(bench, made, rows + labels.columns, labels.result)


def _product(labels: Labels, left: gs.Tensor, right: gs.Tensor, bench: Bench) -> Outputs | None:
    """A batch of products, if every role is played by one axis at most."""
    if any(len(role) != 1 for role in (labels.rows, labels.columns, labels.summed)):
        return None
    batch, rows, columns, summed = labels.batch, labels.rows, labels.columns, labels.summed
    operands = [
        _turned(bench, left, labels.left, batch + rows + summed),
        _turned(bench, right, labels.right, batch + summed + columns),
    ]
    dtype = bench.dtype(left)
    made = bench.emit.node("MatMul", operands, dtype=dtype)
    return _finished(bench, made, batch + rows + columns, labels.result)


def _turned(bench: Bench, tensor: gs.Tensor, given: str, wanted: str) -> gs.Tensor:
    return bench.turned(tensor, [given.index(label) for label in wanted])


def _reshaped(bench: Bench, tensor: gs.Tensor, target: Sequence[int], dtype: object) -> gs.Variable:
    sizes = bench.emit.integers("target", target)
    return bench.emit.node("Reshape", [tensor, sizes], dtype=dtype)


def _finished(bench: Bench, made: gs.Variable, given: str, wanted: str) -> Outputs:
    turned = _turned(bench, made, given, wanted)
    assert isinstance(turned, gs.Variable), "a computed tensor stays one"
    return [turned]
