"""The bundled example: a small vision transformer on Fashion-MNIST, with its images.

``tools/train_fashion_vit.py`` makes all of it; ``LICENSE`` beside this file covers it.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "fashion_vit.onnx"
"""Reads ``image`` float32 [b, 1, 28, 28], answers ``logits`` float32 [b, 10]."""

CALIBRATION = FOLDER / "calibration.npz"
"""``image`` uint8 [1024, 1, 28, 28]: training images, the classes in turn."""

TEST = FOLDER / "test.npz"
"""``image`` uint8 [2000, 1, 28, 28] and ``label`` uint8 [2000]: the first of the test split."""
