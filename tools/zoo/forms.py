"""The forms in which one module is written: two exporters, several opsets, two optimisers."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
from onnx import version_converter

from corp_onnx.export import export

EXPORTERS: Mapping[str, tuple[str, int]] = {
    "ts13": ("torchscript", 13),
    "ts17": ("torchscript", 17),
    "dynamo18": ("dynamo", 18),
    "dynamo20": ("dynamo", 20),
    "dynamo23": ("dynamo", 23),
}

ORT_NAMES: Mapping[str, str] = {"hf_bert": "bert", "timm": "vit", "hf_vit": "vit", "hf_gpt2": "gpt2"}
"""What ONNX Runtime's optimiser calls the architectures, by the beginning of a module's name."""


def write(source: str, form: str, path: Path) -> onnx.ModelProto:
    """A module in one form, with all its weights.

    Args:
        source: ``script.py:function``.
        form: A name of EXPORTERS, or one of them and what is done to it, as in ``ts17+ort``.
        path: Where files may be written.
    """
    exporter, *after = form.split("+")
    kind, opset = EXPORTERS[exporter]
    export(source, path, exporter=kind, opset=opset)
    model = onnx.load(path)
    for step in after:
        model = STEPS[step](model, source.rpartition(":")[2])
    return model


def _convert(opset: int) -> Callable[[onnx.ModelProto, str], onnx.ModelProto]:
    def convert(model: onnx.ModelProto, _: str) -> onnx.ModelProto:
        return version_converter.convert_version(model, opset)

    return convert


def _fused(model: onnx.ModelProto, module: str) -> onnx.ModelProto:
    """What ONNX Runtime's offline optimiser makes of it: operators of com.microsoft."""
    from onnxruntime.transformers import optimizer

    logging.disable(logging.WARNING)
    kind = next(kind for begin, kind in ORT_NAMES.items() if module.startswith(begin))
    made = optimizer.optimize_model(model, model_type=kind, opt_level=0, verbose=False)
    return made.model


def _optimised(model: onnx.ModelProto, module: str) -> onnx.ModelProto:
    """What ONNX Runtime itself writes at its extended level, before anything of the machine."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/{module}.onnx"
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return onnx.load(options.optimized_model_filepath)


def _slim(model: onnx.ModelProto, _: str) -> onnx.ModelProto:
    """What onnxslim makes of it; it is not among this project's dependencies."""
    import onnxslim

    made: onnx.ModelProto = onnxslim.slim(model)
    return made


STEPS: Mapping[str, Callable[[onnx.ModelProto, str], onnx.ModelProto]] = {
    "opset11": _convert(11),
    "opset24": _convert(24),
    "fused": _fused,
    "ort": _optimised,
    "slim": _slim,
}
