"""What simplifiers and converters make of a model, in memory, and where they change too much."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import onnxruntime
from onnx import version_converter

Shapes = Mapping[str, list[int]]
"""Of every input, for tools that are told to fix them."""

BASIC = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
EXTENDED = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED

HALF_STATIC = (
    "onnxsim leaves an input dynamic although everything behind it has the fixed size: the file "
    "runs at one size only and does not say so"
)
LEARNED = "the query of the pooling head is a constant once the batch is: learned queries"
ONE_TOKEN = "Softmax over a single token is 1: the query and key of the last stage are gone"

DIFFERENT: Mapping[tuple[str, str], str] = {
    ("timm_levit.dynamo18", "onnxsim"): ONE_TOKEN,
    ("timm_levit.dynamo18", "onnxsim_static"): ONE_TOKEN,
    ("timm_levit.ts17", "onnxsim_static"): ONE_TOKEN,
    **{
        (f"hf_siglip.{form}", f"{tool}_static"): LEARNED
        for form in ("ts17", "dynamo18", "dynamo23")
        for tool in ("onnxslim", "onnxsim")
    },
    **{
        (name, "onnxsim_static"): HALF_STATIC
        for name in (
            "hf_clip_text.dynamo18",
            "hf_clip_text.dynamo23",
            "hf_gpt2.dynamo18",
            "hf_gpt2.dynamo23",
            "hf_opt.dynamo18",
        )
    },
}
"""By model and tool: why its blocks are not those of the truth, or not all of them."""


FAILING: Mapping[tuple[str, str], str] = {
    ("hf_dinov3.ts17", tool): "onnxsim takes an If apart and leaves its nodes out of order"
    for tool in ("onnxsim", "onnxsim_static")
}
"""By model and tool: why the tool itself gives up."""


def convert(model: onnx.ModelProto, tool: str, shapes: Shapes) -> onnx.ModelProto:
    """What a tool makes of a model; ``shapes`` matter to tools that fix sizes."""
    with contextlib.redirect_stdout(io.StringIO()):
        return TOOLS[tool](model, shapes)


def is_static(tool: str) -> bool:
    """Whether a tool fixes the sizes of all inputs."""
    return tool.endswith("_static")


def _onnxslim(model: onnx.ModelProto, _: Shapes) -> onnx.ModelProto:
    import onnxslim

    return onnxslim.slim(model)


def _onnxslim_static(model: onnx.ModelProto, shapes: Shapes) -> onnx.ModelProto:
    import onnxslim

    given = [f"{name}:{','.join(map(str, shape))}" for name, shape in shapes.items()]
    return onnxslim.slim(model, input_shapes=given)


def _onnxsim(model: onnx.ModelProto, _: Shapes) -> onnx.ModelProto:
    import onnxsim

    simplified, same = onnxsim.simplify(model)
    assert same
    return simplified


def _onnxsim_static(model: onnx.ModelProto, shapes: Shapes) -> onnx.ModelProto:
    import onnxsim

    simplified, same = onnxsim.simplify(model, overwrite_input_shapes=dict(shapes))
    assert same
    return simplified


def _to_opset(version: int) -> Callable[[onnx.ModelProto, Shapes], onnx.ModelProto]:
    return lambda model, _: version_converter.convert_version(model, version)


def _optimised(level: object) -> Callable[[onnx.ModelProto, Shapes], onnx.ModelProto]:
    def optimise(model: onnx.ModelProto, _: Shapes) -> onnx.ModelProto:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 4
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimised.onnx"
            options.optimized_model_filepath = str(path)
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            return onnx.load(path)

    return optimise


TOOLS: Mapping[str, Callable[[onnx.ModelProto, Shapes], onnx.ModelProto]] = {
    "onnxslim": _onnxslim,
    "onnxsim": _onnxsim,
    "opset24": _to_opset(24),
    "onnxslim_static": _onnxslim_static,
    "onnxsim_static": _onnxsim_static,
    "ort_basic": _optimised(BASIC),
    "ort_extended": _optimised(EXTENDED),
}
