"""Whether an operator runs at sizes at which ONNX infers shapes all the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph.facts import Facts

WINDOWS = frozenset({"AveragePool", "Conv", "ConvInteger", "LpPool", "MaxPool", "QLinearConv"})
"""Operators that slide a window over all axes but the first two."""


def runs(node: gs.Node, facts: Facts, after: tuple[int, ...] | None) -> bool:
    """What inference does not look at: windows, elements of a Reshape, indices of a Gather.

    A window that is larger than what it slides over gives one position there, or fewer than none.

    Args:
        node: A standard operator.
        facts: What is known of its inputs.
        after: The inferred shape of an output.
    """
    before = facts.shape(node.inputs[0]) if node.inputs else None
    if after is not None and min(after, default=0) < 0:
        return False
    if before is None:
        return True
    if node.op == "Reshape" and after is not None:
        return bool(np.prod(before) == np.prod(after))
    if node.op == "Gather":
        indices = facts.value(node.inputs[1])
        return indices is None or bool((indices < before[node.attrs.get("axis", 0)]).all())
    return node.op not in WINDOWS or _window_fits(node, facts, before[2:])


def _window_fits(node: gs.Node, facts: Facts, before: Sequence[int]) -> bool:
    kernel = node.attrs.get("kernel_shape")
    if kernel is None:
        weight = facts.shape(node.inputs[1])
        kernel = [] if weight is None else weight[2:]
    if str(node.attrs.get("auto_pad", "NOTSET")).startswith("SAME"):
        return True
    steps = node.attrs.get("dilations") or [1] * len(before)
    pads = node.attrs.get("pads") or [0] * (2 * len(before))
    sides = zip(before, kernel, steps, pads[: len(before)], pads[len(before) :], strict=False)
    return all(size + begin + end > (wide - 1) * step for size, wide, step, begin, end in sides)
