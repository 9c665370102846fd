"""Cut an exported ONNX transformer to half its width in one shot, and repair it in closed form."""

from __future__ import annotations
