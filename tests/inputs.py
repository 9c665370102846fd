"""Inputs for tiny models: correlated activations, padded texts, data sets in memory."""

from __future__ import annotations

import numpy as np

from corp_onnx.data.arrays import Arrays
from corp_onnx.data.dataset import Dataset
from corp_onnx.data.stores import layout_of
from corp_onnx.graph.model import Model
from corp_onnx.session import open_session
from tests.builders import WIDTH

SAMPLES, TOKENS = 64, 7


def dataset(model: Model, **arrays: np.ndarray) -> Dataset:
    """Arrays in memory as a data set that fits a model."""
    layout, samples = layout_of("memory", arrays)
    specs = open_session(model).inputs
    return Dataset(Arrays(arrays, layout, samples), specs, np.arange(samples), "memory")


def activations(samples: int = SAMPLES, tokens: int = TOKENS, seed: int = 0) -> np.ndarray:
    """Inputs whose channels are correlated, so that there is something to repair from."""
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((samples, tokens, 4))
    mixed = causes @ np.random.default_rng(7).standard_normal((4, WIDTH))
    return (mixed + 0.1 * rng.standard_normal(mixed.shape)).astype(np.float32)


def sentences(rng: np.random.Generator, *, samples: int, length: int) -> dict[str, np.ndarray]:
    """Inputs of the text encoder: every other text is shorter and padded."""
    seen = np.ones((samples, length), np.float32)
    seen[::2, length - 3 :] = 0
    return {"ids": rng.integers(0, 8, (samples, length)), "seen": seen}
