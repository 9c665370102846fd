"""Engines: a model made ready for one target, by one protocol."""

from corp_onnx.deploy.records import (
    PRECISIONS,
    RECORD,
    Build,
    Engine,
    Precision,
    ShapeRange,
    Target,
)

__all__ = ["PRECISIONS", "RECORD", "Build", "Engine", "Precision", "ShapeRange", "Target"]
