"""What can be cut in a graph, and why the rest cannot."""

from __future__ import annotations

from corp_onnx.blocks.catalog import find_blocks
from corp_onnx.blocks.records import (
    Attention,
    Axis,
    Block,
    Catalog,
    Linear,
    Mlp,
    Refusal,
    axes_of,
    linears_of,
    width_of,
)

__all__ = [
    "Attention",
    "Axis",
    "Block",
    "Catalog",
    "Linear",
    "Mlp",
    "Refusal",
    "axes_of",
    "find_blocks",
    "linears_of",
    "width_of",
]
