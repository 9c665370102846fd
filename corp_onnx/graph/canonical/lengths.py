"""How many tokens a sample has, as a mask of its rows."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from corp_onnx.graph.canonical.rewriting import Bench


def whole_rows(
    mask: gs.Tensor | None, keys: gs.Tensor, bench: Bench, *, more: int = 0
) -> gs.Tensor | None:
    """Lengths ``[b]``, and ``more``, as ones and zeros ``[b, t]``; any other mask as it is.

    ``keys`` are ``[b, t, …]``, or ``[b, h, t, e]``.
    """
    rank = len(bench.shape(keys) or ())
    if mask is None or len(bench.shape(mask) or ()) != 1 or rank < 3:
        return mask
    name = f"{mask.name}+{more}"
    if name not in bench.rows:
        emit = bench.emit
        zero, one = (emit.constant("count", np.array(number)) for number in (0, 1))
        axis = emit.constant("axis", np.array(2 if rank == 4 else 1))
        sizes = emit.node("Shape", [keys], dtype=np.int64)
        tokens = emit.node("Gather", [sizes, axis], dtype=np.int64)
        places = emit.node("Range", [zero, tokens, one], dtype=np.int64)
        wide = emit.node("Cast", [mask], dtype=np.int64, attrs={"to": onnx.TensorProto.INT64})
        if more:
            wide = emit.node("Add", [wide, emit.integers("more", [more])], dtype=np.int64)
        column = emit.node("Reshape", [wide, emit.integers("column", [-1, 1])], dtype=np.int64)
        seen = emit.node("Less", [places, column], dtype=np.bool_)
        to = {"to": onnx.TensorProto.INT32}
        bench.rows[name] = emit.node("Cast", [seen], dtype=np.int32, attrs=to)
    return bench.rows[name]
