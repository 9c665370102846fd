"""What the recognisers say: blocks that can be cut, and refusals with their reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

from corp_onnx.blocks.rotations import Rotation
from corp_onnx.graph.sizes import Sizes

Axis = Literal["mlp", "qk", "vo"]
"""MLP hidden channels, query-key width of every head, value-output width of every head."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A product with a constant matrix, ``y = x W + b``, however it is written, by name."""

    node: str
    bias_node: str | None
    """The Add behind a MatMul that adds a constant vector; a Gemm holds its bias itself."""
    input: str
    output: str
    """The tensor after the bias."""
    width_in: int
    width_out: int
    axis: int = -1
    """The axis of input and output that holds the channels: 1 for a convolution."""
    strided: bool = False
    """Whether it leaves tokens out."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A linear layer that feeds a hidden axis: its channel ``channels[j]`` is hidden ``j``."""

    linear: Linear
    channels: Int64[np.ndarray, " d"]
    tensor: str
    """Where they are first in order: ``whole``, or a tensor split off from it."""
    whole: str
    """Where all channels of the layer are: its output, or the same with tokens on other axes."""


@dataclass(frozen=True, slots=True)
class Vector:
    """A constant with an entry per hidden channel, on ``axis``, that ``node`` reads at ``slot``."""

    node: str
    slot: int
    axis: int


@dataclass(frozen=True, slots=True)
class Target:
    """An entry of a Reshape's target that says how many channels there are."""

    node: str
    axis: int
    rank: int
    """How many entries the target has."""
    multiple: int
    """The entry is this many times the width of the axis."""


@dataclass(frozen=True, slots=True)
class Mask:
    """A tensor that says which tokens nobody may attend to: padding counts in no statistic."""

    tensor: str
    kind: Literal["added", "keeps", "drops", "counts"]
    """Added to the logits; true where a token is seen; true where it is masked; or how many of the
    first tokens of every sample are seen."""
    heads: int = 1
    """How many heads share a sample where the first axis of a 3-D mask counts both."""
    tokens_first: bool = False
    """Whether activations are ``[t, b, d]``; the first axis of a mask always counts samples."""


@dataclass(frozen=True, slots=True)
class SizeReader:
    """A Shape node that reads a tensor whose width will change, and what it must go on saying."""

    node: str
    sizes: tuple[int | str, ...]
    """Per axis a number, or ``"t<j>"``: the size of axis ``j`` of ``like``."""
    like: str
    """A tensor that stays, or takes the place of another, with the same token axes."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A scale that ``node`` reads at ``slot``: computed at run time, yet always of this value."""

    node: str
    slot: int
    value: float
    dtype: str


@dataclass(frozen=True, slots=True)
class Layout:
    """How a plain projection is laid out as the operand of a product.

    The projection ``[t0, …, tk, g·r]`` is reshaped to ``[t0, …, tk, g, r]``, heads are copied and
    split over axes (``copies``, ``rows``), the axes permuted, and neighbours merged (``groups``).
    Where single channels are moved and not heads, ``g`` counts channels, without a last axis.
    """

    split: str | None
    """Reshape node whose leading targets split the token axes first; None where none are split."""
    rest: bool
    """Whether it names all of these but the last, which it merges with heads."""
    tokens: int
    """How many token axes there are after that split."""
    rows: tuple[int, ...]
    """Sizes of the axes that hold heads (or single channels); none where there is one head."""
    copies: tuple[int, ...]
    """The head that every row holds, where heads are repeated; else empty."""
    width: bool
    """Whether a last axis holds the channels of a head."""
    perm: tuple[int, ...]
    groups: tuple[int, ...]
    """How many permuted axes each operand axis merges (0 for an axis of one)."""


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """How channels of a linear layer reach an operand of a product.

    Entry ``(h, i)`` of the operand is ``gain[h, i] · y[channels[h, i]] + offset[h, i]``, where
    ``y`` is the layer's output, and then turned by its position if there is a rotation.
    """

    linear: Linear
    channels: Int64[np.ndarray, "h e"]
    gain: Float64[np.ndarray, "h e"]
    offset: Float64[np.ndarray, "h e"]
    operand: str
    """The tensor that enters the product."""
    layout: Layout
    axis: int
    """The operand's axis that holds a head's channels; all of them, if it splits heads itself."""
    dtype: str
    """The operand's type, which a Cast on the way may have changed."""
    rotation: Rotation | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Mlp:
    """A hidden axis between linear layers with nothing but per-channel operators in between."""

    id: str
    sources: tuple[Source, ...]
    hidden: str
    """The tensor that enters the down projection, channels last."""
    vectors: tuple[Vector, ...]
    targets: tuple[Target, ...]
    """What Reshape nodes inside say of the width."""
    down: Linear
    width: int
    readers: tuple[SizeReader, ...] = ()
    fragments: tuple[Route, ...] = ()
    """Where the movement ends of layers that compute more than hidden channels, these among them.

    Such a layer is taken apart: hidden channels get one of their own, and so does all else.
    """
    depthwise: tuple[str, ...] = ()
    """Convolutions inside of every channel by itself, whose ``group`` is the width."""
    twins: tuple[str, ...] = ()
    """All blocks of the same weights, in the order of the graph; none if there is no other."""
    padding: Mask | None = None
    refused: Mapping[Axis, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """The way from mixed values to the output projection, whose input ``j`` is ``places[j]``."""

    linear: Linear
    places: Int64[np.ndarray, "d 2"]
    """Head and position within the head, for every input channel of the layer."""
    value_heads: Int64[np.ndarray, " h"]
    """The value head that every head mixes."""
    targets: tuple[Target, ...]
    """What Reshape nodes on the way say of the value width."""
    readers: tuple[SizeReader, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """Scaled dot-product attention, anchored at its Softmax or at an Attention operator."""

    id: str
    anchor: str
    products: tuple[str, ...]
    """The nodes that multiply queries with keys and probabilities with values."""
    query: Route | None
    key: Route | None
    value: Route | None
    output: Output | None
    heads: int
    kv_heads: int
    head_width: int
    value_width: int
    key_heads: Int64[np.ndarray, " h"]
    """The key head that every query head reads."""
    fragments: tuple[Route, ...] = ()
    """Where the movement of a projection ends, operands of the products among them.

    What is packed with a part that is cut is written anew with it, as it was.
    """
    frozen: tuple[Scalar, ...] = ()
    """Scales of the logits that are computed from shapes: surgery writes their dense value."""
    readers: tuple[SizeReader, ...] = ()
    twins: tuple[str, ...] = ()
    """All blocks of the same weights, in the order of the graph; none if there is no other."""
    padding: Mask | None = None
    """Of the tokens that ask, which are those of the block's output."""
    key_padding: Mask | None = None
    """Of the tokens that are attended to: the same in self-attention."""
    crosses: bool = False
    """Whether these are other tokens than those that ask."""
    refused: Mapping[Axis, str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Channels of all query heads together."""
        return self.heads * self.head_width

    @property
    def rotation(self) -> Rotation | None:
        """What turns queries and keys by their position, in the same pairs of channels."""
        return self.query.rotation if self.query else None


Block = Mlp | Attention


@dataclass(frozen=True, slots=True)
class Refusal:
    """A node that looked prunable and is not, with a reason that a user understands."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Catalog:
    """Every block of a model in the order of the graph, and every refusal."""

    blocks: tuple[Block, ...]
    refusals: tuple[Refusal, ...]
    sizes: Sizes
    macs: int
    params: int
    macs_by_block: Mapping[str, int]
    """Of a block's linear layers and, in attention, of both products."""
    uncounted: tuple[str, ...] = ()
    """Nodes that multiply and are in none of these numbers: their sizes are not known."""
    rotary: bool = False
    """Whether rotated queries and keys are offered."""

    @property
    def macs_prunable(self) -> int:
        """MACs of the blocks that have an axis to cut."""
        return sum(self.macs_by_block[block.id] for block in self.blocks if axes_of(block))


def leader_of(block: Block) -> str:
    """The first of the blocks that share a block's weights; mostly the block itself."""
    return block.twins[0] if block.twins else block.id


def axes_of(block: Block) -> tuple[Axis, ...]:
    """The axes of a block that can be cut."""
    axes: tuple[Axis, ...] = ("mlp",) if isinstance(block, Mlp) else ("qk", "vo")
    return tuple(axis for axis in axes if axis not in block.refused)


def width_of(block: Block, axis: Axis) -> int:
    """The dense width of an axis: hidden channels, or channels per head."""
    if isinstance(block, Mlp):
        return block.width
    return block.head_width if axis == "qk" else block.value_width


def linears_of(block: Block) -> tuple[Linear, ...]:
    """The linear layers of a block: those that feed its axes and the one that they end in."""
    if isinstance(block, Mlp):
        return tuple(dict.fromkeys((*(source.linear for source in block.sources), block.down)))
    parts = (block.query, block.key, block.value, block.output)
    return tuple(dict.fromkeys(part.linear for part in parts if part is not None))
