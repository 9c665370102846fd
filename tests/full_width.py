"""Folds that keep every channel, and narrow ones with a twin of full width that computes the same.

What surgery does wrong shows at full width already, where the right result is the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime

from corp_onnx.blocks import Catalog
from corp_onnx.graph.model import Model
from corp_onnx.solve.folds import (
    Fold,
    MlpFold,
    QueryKeyFold,
    Solution,
)
from corp_onnx.verify.basis import in_basis

Outputs = Mapping[str, np.ndarray]


def unchanged(model: Model, catalog: Catalog) -> Solution:
    """Ratio 0: every map is the identity."""

    def bases(heads: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        return (np.stack([np.eye(width)] * heads),) * 2

    return in_basis(model, catalog, bases, np.arange)


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
