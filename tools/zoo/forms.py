"""The forms in which one module is written: two exporters, several opsets, two optimisers."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import torch
from onnx import version_converter

from corp_onnx.export import export
from corp_onnx.export.module import is_tokens
from corp_onnx.export.sources import load_module
from tools.zoo.sample import TIMM_HEADS, TRANSFORMERS_HEADS, WIDTH

Step = Callable[[onnx.ModelProto, str], onnx.ModelProto]
"""From a model, and the name of its module, to another model of the same function."""

EXPORTERS: Mapping[str, tuple[str, int]] = {
    "ts13": ("torchscript", 13),
    "ts17": ("torchscript", 17),
    "dynamo18": ("dynamo", 18),
    "dynamo20": ("dynamo", 20),
    "dynamo23": ("dynamo", 23),
}

ORT_KINDS: Mapping[str, tuple[str, int, int]] = {
    "hf_bert": ("bert", TRANSFORMERS_HEADS, WIDTH),
    "hf_gpt2": ("gpt2", 4, 48),
    "hf_vit": ("vit", TRANSFORMERS_HEADS, WIDTH),
    "timm": ("vit", TIMM_HEADS, WIDTH),
}
"""What ONNX Runtime's optimiser must be told, by the beginning of a module's name.

It finds the attention of BERT alone; of the others it fuses norms and activations.
"""


def write(source: str, form: str) -> onnx.ModelProto:
    """A module in one form, with all its weights.

    Args:
        source: ``script.py:function``.
        form: A name of EXPORTERS, or one of them and what is done to it, as in ``ts17+ort``.
    """
    exporter, *after = form.split("+")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if exporter == "ts11":
            _write_old(source, path)
        else:
            kind, opset = EXPORTERS[exporter]
            export(source, path, exporter=kind, opset=opset)
        model = onnx.load(path)
    for step in after:
        model = STEPS[step](model, source.rpartition(":")[2])
    return model


def _write_old(source: str, path: Path) -> None:
    """Let torch write opset 11, which is older than what this project exports, and still reads."""
    module = load_module(source, checkpoint=None, random_weights=False)
    axes = {
        name: {0: "batch", 1: "sequence"} if is_tokens(example) else {0: "batch"}
        for name, example in module.examples.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.module,
            tuple(module.examples.values()),
            str(path),
            input_names=list(module.examples),
            output_names=list(module.outputs),
            opset_version=11,
            dynamo=False,
            dynamic_axes=axes | {name: {0: "batch"} for name in module.outputs},
        )


def _convert(opset: int) -> Step:
    def convert(model: onnx.ModelProto, _: str) -> onnx.ModelProto:
        return version_converter.convert_version(model, opset)

    return convert


def _fused(*, separate: bool) -> Step:
    """What ONNX Runtime's offline optimiser makes of it: operators of com.microsoft."""

    def fuse(model: onnx.ModelProto, module: str) -> onnx.ModelProto:
        from onnxruntime.transformers import fusion_options, optimizer

        begin = next(begin for begin in ORT_KINDS if module.startswith(begin))
        kind, heads, width = ORT_KINDS[begin]
        options = fusion_options.FusionOptions(kind)
        options.use_multi_head_attention = separate
        made = optimizer.optimize_model(
            model,
            model_type=kind,
            num_heads=heads,
            hidden_size=width,
            opt_level=0,
            optimization_options=options,
        ).model
        if all(entry.domain != "com.microsoft" for entry in made.opset_import):
            made.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        return made

    return fuse


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


def _four_bits(model: onnx.ModelProto, _: str) -> onnx.ModelProto:
    """Weights in blocks of numbers of four bits, inside ONNX Runtime's MatMulNBits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantiser = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=False)
    quantiser.process()
    made: onnx.ModelProto = quantiser.model.model
    return made


def _slim(model: onnx.ModelProto, _: str) -> onnx.ModelProto:
    """What onnxslim makes of it."""
    import onnxslim

    made: onnx.ModelProto = onnxslim.slim(model)
    return made


def _half(model: onnx.ModelProto, _: str) -> onnx.ModelProto:
    """Weights and activations in float16; inputs and outputs stay as they are."""
    from onnxruntime.transformers import float16, onnx_model

    made: onnx.ModelProto = float16.convert_float_to_float16(model, keep_io_types=True)
    onnx_model.OnnxModel(made).topological_sort()
    return made


STEPS: Mapping[str, Step] = {
    "opset24": _convert(24),
    "fused": _fused(separate=False),
    "mha": _fused(separate=True),
    "ort": _optimised,
    "nbits": _four_bits,
    "slim": _slim,
    "fp16": _half,
}
