"""Einsum of two operands as a matrix product, with the axes turned and merged around it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.canonical.rewriting import Bench, Outputs

_EQUATION = re.compile(r"^([A-Za-z]*),([A-Za-z]*)(?:->([A-Za-z]*))?$")


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


def einsum_as_matmul(node: gs.Node, bench: Bench) -> Outputs | None:
    """``Einsum`` as MatMul: with a constant weight a linear layer, else a product of activations.

    Left alone are sums of one operand, of three, over diagonals or over an axis of one operand,
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
