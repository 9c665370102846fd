"""A torch module as an ONNX file; the only part of the program that knows torch."""

from __future__ import annotations

from corp_onnx.export.writer import Export, export

__all__ = ["Export", "export"]
