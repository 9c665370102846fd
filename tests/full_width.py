"""Folds that keep every channel, and narrow ones with a twin of full width that computes the same.

What surgery does wrong shows at full width already, where the right result is the dense model: the
basis of every head is changed by ``A`` and ``B`` with ``A Bᵀ = I``, hidden channels are shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime

from corp_onnx.blocks import Attention, Catalog, Mlp, axes_of
from corp_onnx.blocks.linear import bias_of, weight_of
from corp_onnx.graph.model import Model
from corp_onnx.solve.folds import (
    EXACT,
    Fold,
    MlpFold,
    QueryKeyFold,
    Solution,
    ValueOutputFold,
)

Bases = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""From heads and width to ``A, B [h, e, e]`` with ``A Bᵀ = I``."""

Outputs = Mapping[str, np.ndarray]


def unchanged(model: Model, catalog: Catalog) -> Solution:
    """Ratio 0: every map is the identity."""

    def bases(heads: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        return (np.stack([np.eye(width)] * heads),) * 2

    return _solution(model, catalog, bases, np.arange)


def turned(model: Model, catalog: Catalog, seed: int = 0) -> Solution:
    """Another basis for every head, another order of every hidden axis."""
    rng = np.random.default_rng(seed)

    def bases(heads: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        shape = (heads, width, width)
        left, right = (np.linalg.qr(rng.standard_normal(shape))[0] for _ in range(2))
        stretch = rng.uniform(0.5, 2, (heads, 1, width))
        return left * stretch @ right, left / stretch @ right

    return _solution(model, catalog, bases, rng.permutation)


def narrowed(solution: Solution, share: float) -> Solution:
    """Only the first part of every axis of a full-width solution."""
    return Solution("narrowed", tuple(_narrow(fold, share) for fold in solution.folds))


def padded(solution: Solution, share: float) -> Solution:
    """The same function at full width: zeros where the narrow solution has nothing."""
    return Solution("padded", tuple(_pad(fold, share) for fold in solution.folds))


def run(model: Model | onnx.ModelProto, *feeds: Mapping[str, np.ndarray]) -> list[Outputs]:
    """Outputs of a model by name for every set of inputs, computed in one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = model.proto() if isinstance(model, Model) else model
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    return [dict(zip(names, session.run(names, given), strict=True)) for given in feeds]


def squared_error(actual: Outputs, expected: Outputs) -> float:
    """``‖actual - expected‖² / ‖expected‖²`` of the worst output."""
    assert actual.keys() == expected.keys()
    return max(
        float(
            np.linalg.norm(actual[name].astype(float) - y) ** 2
            / np.linalg.norm(y.astype(float)) ** 2
        )
        for name, y in expected.items()
    )


def _solution(
    model: Model, catalog: Catalog, bases: Bases, order: Callable[[int], np.ndarray]
) -> Solution:
    nodes = {node.name: node for node in model.graph.nodes}
    opset = model.fingerprint.opset
    folds: list[Fold] = []
    for block in catalog.blocks:
        if isinstance(block, Mlp):
            weight, bias = weight_of(nodes, block.down, opset), bias_of(nodes, block.down, opset)
            kept = order(block.width)
            folds.append(MlpFold(block.id, kept, weight[kept], bias, EXACT))
            continue
        if "qk" in axes_of(block):
            query, key = bases(len(block.key.channels), block.head_width)
            folds.append(QueryKeyFold(block.id, query[block.key_heads], key, EXACT))
        if "vo" in axes_of(block):
            value, inverse = bases(len(block.value.channels), block.value_width)
            back = inverse.transpose(0, 2, 1)[block.output.value_heads]
            rows = back @ _rows(model, block)
            bias = bias_of(nodes, block.output.linear, opset)
            folds.append(ValueOutputFold(block.id, value, rows, bias, EXACT))
    return Solution("full width", tuple(folds))


def _rows(model: Model, block: Attention) -> np.ndarray:
    """The weight of the output projection by head and position, ``[h, e, o]``."""
    nodes = {node.name: node for node in model.graph.nodes}
    weight = weight_of(nodes, block.output.linear, model.fingerprint.opset)
    heads = len(block.output.value_heads)
    rows = np.zeros((heads, block.value_width, weight.shape[1]))
    head, position = block.output.places.T
    rows[head, position] = weight
    return rows


def _narrow(fold: Fold, share: float) -> Fold:
    if isinstance(fold, MlpFold):
        kept = round(share * len(fold.kept))
        return replace(fold, kept=fold.kept[:kept], weight=fold.weight[:kept])
    if isinstance(fold, QueryKeyFold):
        kept = round(share * fold.query.shape[2])
        return replace(fold, query=fold.query[..., :kept], key=fold.key[..., :kept])
    kept = round(share * fold.value.shape[2])
    return replace(fold, value=fold.value[..., :kept], weight=fold.weight[:, :kept])


def _pad(fold: Fold, share: float) -> Fold:
    narrow = _narrow(fold, share)
    if isinstance(fold, MlpFold):
        return replace(fold, weight=_zeros(narrow.weight, fold.weight))
    if isinstance(fold, QueryKeyFold):
        return replace(
            fold, query=_zeros(narrow.query, fold.query), key=_zeros(narrow.key, fold.key)
        )
    return replace(
        fold, value=_zeros(narrow.value, fold.value), weight=_zeros(narrow.weight, fold.weight)
    )


def _zeros(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """``values`` in the corner of an array of zeros that is as large as ``like``."""
    filled = np.zeros(like.shape)
    filled[tuple(slice(size) for size in values.shape)] = values
    return filled
