"""Parts of a model as models of their own, to be run and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import DTypeLike

from corp_onnx.graph.emit import replace_readers
from corp_onnx.graph.model import Model


def exposed(model: Model, tensors: Iterable[str]) -> Model:
    """The model with intermediate tensors as its only outputs, less what these do not need."""
    graph = model.graph.copy()
    by_name = graph.tensors()
    graph.outputs = [by_name[name] for name in dict.fromkeys(tensors)]
    for tensor in graph.outputs:
        tensor.shape = None
    graph.cleanup(remove_unused_graph_inputs=False)
    return model.with_graph(graph)


def extract(
    model: Model,
    entries: Iterable[str],
    outputs: Iterable[str],
    like: Mapping[str, np.ndarray] | None = None,
) -> Model:
    """The model cut open: ``entries`` are fed from outside instead of being computed.

    Inputs of the model that the outputs still need stay inputs. ``like`` holds what flows into
    entries, which get its types and as many axes; without it they are of type float32, unless the
    file says otherwise. What the model itself makes of an entry is the output ``computed(entry)``.
    """
    graph = model.graph.copy()
    by_name = graph.tensors()
    inputs = list(graph.inputs)
    for name in entries:
        made = by_name[name]
        if not any(made is known for known in inputs):
            made.name = computed(name)  # it stays where it is among its node's outputs
            by_name[made.name] = made
            by_name[name] = _entry(name, made.dtype, (like or {}).get(name))
            replace_readers(made, by_name[name])
            inputs.append(by_name[name])
    graph.inputs = inputs
    graph.outputs = [by_name[name] for name in dict.fromkeys(outputs)]
    for tensor in graph.outputs:
        tensor.shape = None
    graph.cleanup(remove_unused_graph_inputs=True).toposort()
    return model.with_graph(graph)


def computed(entry: str) -> str:
    """The name of what is fed from outside, as the model itself computes it."""
    return f"{entry}/computed"


def _entry(name: str, declared: DTypeLike, like: np.ndarray | None) -> gs.Variable:
    if like is None:
        return gs.Variable(name, declared or np.dtype(np.float32))
    return gs.Variable(name, like.dtype, [f"{name}/{axis}" for axis in range(like.ndim)])
