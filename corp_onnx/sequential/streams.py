"""The residual stream behind every block: what its branch is added to, found in the graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Float, Float64

from corp_onnx.blocks import Attention, Block, Mlp
from corp_onnx.blocks.records import Linear
from corp_onnx.blocks.view import constant_value
from corp_onnx.calibration.moments import read_only
from corp_onnx.graph.facts import Facts
from corp_onnx.graph.model import Model

SILENT_OPS = frozenset({"Identity", "Dropout", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
"""What changes no number and no order of numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Where the output ``y`` of a block's last layer ends up: ``stream = rest + gain · y``.

    ``gain`` holds a LayerScale, if there is one. Where the branch joins nothing that can be
    followed, the stream is the layer's own output.
    """

    block: str
    linear: Linear | None
    """The last layer; None where a block has none that is known, and the stream is its product."""
    tensor: str
    gain: Float64[np.ndarray, " o"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "gain", read_only(self.gain))

    @property
    def ends(self) -> tuple[str, ...]:
        """What has to be computed to know the stream and the branch."""
        return (self.tensor,) if self.linear is None else (self.tensor, self.linear.output)

    def last(self, tensor: np.ndarray) -> Float[np.ndarray, "... o"]:
        """The stream, or the branch, with its channels on the last axis."""
        return np.moveaxis(tensor, -1 if self.linear is None else self.linear.axis, -1)

    def vectors(self, tensor: np.ndarray) -> Float[np.ndarray, "n o"]:
        """The same as one vector per token."""
        last = self.last(tensor)
        vectors: np.ndarray = last.reshape(-1, last.shape[-1]).astype(np.float32, copy=False)
        return vectors


def last_layer(block: Block) -> Linear | None:
    """The layer that a block ends in; None for an attention whose output was not found."""
    if isinstance(block, Mlp):
        return block.down
    return block.output.linear if isinstance(block, Attention) and block.output else None


def end_of(model: Model, block: Block) -> str:
    """The output of a block's last layer, or of its last product where that layer is not known."""
    last = last_layer(block)
    if last is not None:
        return last.output
    assert isinstance(block, Attention), "an MLP ends in a linear layer"
    product = next(node for node in model.graph.nodes if node.name == block.products[-1])
    return str(product.outputs[0].name)


def stream_behind(model: Model, facts: Facts, block: Block) -> Stream:
    """Follow the output of a block's last layer to where the next nonlinear reader takes it.

    On the way it may be scaled by constants and added to other tensors of its own shape: to the
    stream, to the branch of a parallel block, to both. The walk ends at the first tensor that has
    several readers, is an output, or enters anything else; that tensor is the stream if something
    was added.
    """
    linear = last_layer(block)
    if linear is None:
        return Stream(block.id, None, end_of(model, block), np.ones(1))
    tensor: gs.Tensor = model.graph.tensors()[linear.output]
    gain = np.ones(linear.width_out)
    found, joined = Stream(block.id, linear, linear.output, gain), False
    while (node := _only_reader(model.graph, tensor)) is not None:
        step = _step(node, tensor, linear, facts, model.fingerprint.opset)
        if step is None:
            break
        factor, joins = step
        gain, tensor, joined = gain * factor, node.outputs[0], joined or joins
        if joined:
            found = Stream(block.id, linear, tensor.name, gain)
    return found


def _only_reader(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    if len(tensor.outputs) != 1 or any(tensor is output for output in graph.outputs):
        return None
    return tensor.outputs[0]


def _step(
    node: gs.Node, tensor: gs.Tensor, linear: Linear, facts: Facts, opset: int
) -> tuple[np.ndarray | float, bool] | None:
    """By what a node scales the branch, and whether it joins it with another activation."""
    before, after = facts.shape(tensor), facts.shape(node.outputs[0])
    if before is None or after is None or before[linear.axis] != after[linear.axis]:
        return None
    if node.op in SILENT_OPS:
        return (1.0, False) if linear.axis == -1 or before == after else None
    if node.op not in {"Add", "Mul", "Div"} or before != after:
        return None
    others = [other for other in node.inputs if other is not tensor]
    value = constant_value(others[0], opset) if len(others) == 1 else None
    if node.op == "Add":
        return (1.0, value is None) if others else None
    if value is None or (node.op == "Div" and node.inputs[0] is not tensor):
        return None
    factor = _per_channel(value, linear, len(before))
    if factor is None:
        return None
    return (factor if node.op == "Mul" else 1.0 / factor), False


def _per_channel(value: np.ndarray, linear: Linear, rank: int) -> np.ndarray | None:
    """A constant as one nonzero factor per channel, or None if it is something else."""
    axis = linear.axis % rank - rank  # counted from the end, as broadcasting does
    whole = value.reshape((1,) * (rank - value.ndim) + value.shape)
    if whole.size not in {1, whole.shape[axis]} or not np.all(whole):
        return None
    return np.broadcast_to(whole.reshape(-1).astype(np.float64), linear.width_out)
