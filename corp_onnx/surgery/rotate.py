"""The rotation of queries and keys by their position, written anew for the pairs that are left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Int64

from corp_onnx.blocks.rotations import CHANNELS, Rotation, Table
from corp_onnx.surgery.theatre import Theatre

PAD_INPUTS = 11
"""The opset since which Pad reads its sizes from an input."""


@dataclass(frozen=True, slots=True, eq=False)
class Rotator:
    """Turns heads ``[t0, …, tk, g…, r]``, in which the first channels of pairs come first.

    Attributes:
        theatre: The graph.
        rotation: How all channels of a head were turned.
        positions: Of these, the one by whose angle each channel is turned.
        sorted: Whether channels are sorted by their positions afterwards.
        tokens: How many token axes there are.
        rows: How many axes of heads.
    """

    theatre: Theatre
    rotation: Rotation
    positions: Int64[np.ndarray, " r"]
    sorted: bool
    tokens: int
    rows: int

    def turned(self, y: gs.Variable) -> gs.Variable:
        """``y cos + swap(y) sin``, as exporters write it, with ``swap(a | b) = -b | a``."""
        emit, half = self.theatre.emit, len(self.positions) // 2
        axis, cosine, sine = self.tokens + self.rows, self.rotation.cosine, self.rotation.sine
        if np.dtype(y.dtype).name != cosine.dtype:
            y = emit.cast(y, cosine.dtype)
        dtype = y.dtype
        first, second = emit.split(y, [half, half], axis, self.theatre.opset)
        minus = emit.node("Neg", [second], dtype=dtype)
        swapped = emit.node("Concat", [minus, first], dtype=dtype, attrs={"axis": axis})
        terms = [
            emit.node("Mul", [term, self._spread(table, idle)], dtype=dtype)
            for term, table, idle in ((y, cosine, 1.0), (swapped, sine, 0.0))
        ]
        turned = emit.node("Add", terms, dtype=dtype)
        order = np.argsort(self.positions)
        if not self.sorted or np.array_equal(order, np.arange(len(order))):
            return turned
        index = emit.integers("order", order.tolist())
        return emit.node("Gather", [turned, index], dtype=dtype, attrs={"axis": axis})

    def _spread(self, table: Table, idle: float) -> gs.Tensor:
        """`Rotation.spread` in the graph."""
        emit, opset = self.theatre.emit, self.theatre.opset
        if table.value is not None:
            laid = self.rotation.spread(
                table, table.value, self.positions, self.tokens, self.rows, idle=idle
            )
            return emit.constant("angles", laid)
        made, dtype = self.theatre.tensors[table.tensor], table.dtype
        taken = [(table.axes.index(CHANNELS), table.channels[self.positions])]
        taken += [(axis, np.asarray(0)) for axis in reversed(table.single)]
        for axis, channels in taken:
            index = emit.constant("channels", channels.astype(np.int64))
            made = emit.node("Gather", [made, index], dtype=dtype, attrs={"axis": axis})
        if table.order != tuple(range(len(table.order))):
            perm = list(table.order)
            made = emit.node("Transpose", [made], dtype=dtype, attrs={"perm": perm})
        made = emit.unsqueeze(made, table.absent(self.tokens, self.rows), opset)
        return made if self.rotation.skipped is None else self._padded(made, dtype, idle)

    def _padded(self, table: gs.Tensor, dtype: str, idle: float) -> gs.Tensor:
        """A table with entries for the tokens before the first that is turned."""
        assert self.rotation.skipped is not None, "some are skipped"
        emit, rank = self.theatre.emit, self.tokens + self.rows + 1
        axis, count = self.rotation.skipped
        pads = [count if place == axis else 0 for place in range(2 * rank)]
        if self.theatre.opset < PAD_INPUTS:
            attrs = {"pads": pads, "value": idle}
            return emit.node("Pad", [table], dtype=dtype, attrs=attrs)
        value = emit.constant("idle", np.asarray(idle, dtype=dtype))
        return emit.node("Pad", [table, emit.integers("pads", pads), value], dtype=dtype)
