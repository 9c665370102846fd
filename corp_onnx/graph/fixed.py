"""Values that are the same at all sizes, and not only at those that were probed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph.facts import Facts
from corp_onnx.graph.operators import SIZE_OPS

PART_OPS = frozenset({"Gather", "GatherElements", "GatherND", "Slice", "Split"})
"""Operators that give a part of their first input."""


def fixed_value(
    probes: Sequence[Facts], tensor: gs.Tensor, memory: dict[str, bool]
) -> np.ndarray | None:
    """The value of a tensor that is the same for all data and sizes, else None.

    A factor that follows from sizes may be the same at those that were probed, and another where a
    bound is passed: it has to be made of what is the same itself, or is picked from a shape. Whole
    numbers say how data are moved, which is tried at all probes.

    Args:
        probes: What is known of the graph, at every size that was probed.
        tensor: One of its tensors.
        memory: Filled with the names of those that were looked at; of one graph.
    """
    value = probes[0].value(tensor)
    if value is None or isinstance(tensor, gs.Constant):
        return value
    if value.dtype.kind in "iub":
        return value if _is_same(probes, tensor) else None
    return value if _is_fixed(probes, tensor, memory) else None


def _is_same(probes: Sequence[Facts], tensor: gs.Tensor) -> bool:
    """Whether a tensor has the same value at all sizes that were probed."""
    first, *others = (facts.value(tensor) for facts in probes)
    return first is not None and all(
        other is not None and np.array_equal(first, other) for other in others
    )


def _is_fixed(probes: Sequence[Facts], tensor: gs.Tensor, memory: dict[str, bool]) -> bool:
    """Whether a value and all that it is made of is the same."""
    if isinstance(tensor, gs.Constant):
        return True
    if tensor.name not in memory:
        node = tensor.inputs[0] if tensor.inputs else None
        read = [] if node is None or node.op in SIZE_OPS else node.inputs
        rest = read[1 if node is not None and node.op in PART_OPS else 0 :]
        memory[tensor.name] = _is_same(probes, tensor) and all(
            _is_fixed(probes, value, memory) for value in rest if value.name
        )
    return memory[tensor.name]
