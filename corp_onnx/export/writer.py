"""Trace a torch module, write it as ONNX, and publish it if it computes the same."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from corp_onnx.data.preprocessing import keep_beside
from corp_onnx.errors import GraphError, PlanError, VerificationError
from corp_onnx.export.backend import FAILURES, first_line, package, root
from corp_onnx.export.module import Module, is_tokens
from corp_onnx.export.sources import load_module
from corp_onnx.files import require_writable, whole
from corp_onnx.graph.model import LARGEST_PROTOBUF_BYTES
from corp_onnx.session import open_session

OPSETS: Mapping[str, range] = {"torchscript": range(13, 21), "dynamo": range(18, 24)}
"""The opsets that each exporter writes."""

DEFAULT_OPSET: Mapping[str, int] = {"torchscript": 17, "dynamo": 18}

PARITY = 1e-4
"""Largest relative error of an output; rounding leaves about 1e-6 in twelve float32 blocks."""

PARITY_BATCHES = (1, 3)
"""Batch sizes of the comparison; the trace has another one."""


@dataclass(frozen=True, slots=True)
class Export:
    """An ONNX file that computes what a torch module computes.

    Attributes:
        path: The model.
        source: What it was made from, as it was asked for.
        opset: Version of the standard operator set.
        exporter: Which of torch's two exporters wrote it.
        parameters: Number of weights of the module.
        inputs: Shape of every input; dynamic axes by name.
        parity: Largest relative error ``|onnx - torch| / |torch|`` of any output, at two batch
            sizes that were not traced, with padding first and padding last. Outputs at padding,
            tokens that an ``attention_mask`` hides, are not compared.
        preprocessing: The recipe for pictures that lies beside the model, if there is one.
    """

    path: Path
    source: str
    opset: int
    exporter: str
    parameters: int
    inputs: Mapping[str, tuple[str | int, ...]]
    parity: float
    preprocessing: Path | None


def export(
    source: str,
    output: Path,
    *,
    checkpoint: Path | None = None,
    random_weights: bool = False,
    exporter: str = "torchscript",
    opset: int | None = None,
) -> Export:
    """Write a torch module as float32 ONNX with a dynamic batch, checked against torch.

    Sources are ``timm:NAME``; ``hf:FOLDER`` (or a name on the hub), loaded as the class that its
    config names; and ``script.py:function``, where the function returns a module and its example
    inputs, a tuple or a dict of tensors, each with the batch first. Whole-number inputs ``[b, t]``
    get a dynamic sequence as well; those of another length get one of their own.

    Args:
        source: What to export.
        output: Where the ONNX file goes; it appears whole, by rename, or not at all. Weights
            beyond protobuf's 2 GB go into ``<output>.data`` beside it.
        checkpoint: Weights to load, ``.safetensors`` or ``.pth``; every key must fit.
        random_weights: Draw the weights of a timm or transformers model, with a fixed seed.
        exporter: ``torchscript`` (opset 13 to 20) or ``dynamo`` (18 to 23).
        opset: Version of the operator set; by default 17 and 18.

    Raises:
        PlanError: If the options contradict each other.
        GraphError: If the source or the checkpoint is not usable, or cannot be exported.
        BackendUnavailable: If a package is missing, or weights cannot be downloaded.
        VerificationError: If the ONNX file does not compute what the module computes.
        OutputError: If the output cannot be written.
    """
    opset = _opset(exporter, opset)
    if checkpoint is not None and random_weights:
        raise PlanError("a checkpoint and random weights exclude each other; give one of them")
    require_writable(output)
    module = load_module(source, checkpoint=checkpoint, random_weights=random_weights)
    with whole(output) as draft:
        _write(source, module, draft, exporter=exporter, opset=opset)
        _gather_weights(draft)
        parity = _parity(module, draft)
        if not parity <= PARITY:  # also when it is not a number
            raise VerificationError(
                f"the export of {source} is not written: its outputs differ from torch's by "
                f"{parity:.1e} (limit {PARITY:.0e}) at batch sizes {PARITY_BATCHES}; the module "
                "may depend on the batch it was traced with: try the other exporter"
            )
        inputs = _input_shapes(draft)
    recipe = keep_beside(module.recipe, output)
    parameters = sum(weight.numel() for weight in module.module.parameters())
    return Export(output, source, opset, exporter, parameters, inputs, parity, recipe)


def _opset(exporter: str, opset: int | None) -> int:
    if exporter not in OPSETS:
        raise PlanError(f"there is no exporter {exporter!r}; choose {' or '.join(OPSETS)}")
    known = OPSETS[exporter]
    if opset is not None and opset not in known:
        raise PlanError(f"the {exporter} exporter writes opset {known[0]} to {known[-1]}")
    return opset or DEFAULT_OPSET[exporter]


def _write(source: str, module: Module, draft: Path, *, exporter: str, opset: int) -> None:
    """Let torch write the file; its warnings are about its own code, not for our user."""
    torch = package("torch")
    axes = _input_axes(module)
    dynamic: dict[str, Any]
    if exporter == "dynamo":
        package("onnxscript")
        shapes = tuple(axes.values())
        dynamic = {"dynamic_shapes": (shapes,) if module.is_variadic else shapes, "verbose": False}
    else:
        dynamic = {"dynamic_axes": axes | _output_axes(module)}
        torch._C._jit_set_onnx_log_output_stream("stderr")  # it prints graphs that it cannot write
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                module.module,
                tuple(module.examples.values()),
                str(draft),
                input_names=list(module.examples),
                output_names=list(module.outputs),
                opset_version=opset,
                dynamo=exporter == "dynamo",
                external_data=_size_bytes(module) > LARGEST_PROTOBUF_BYTES // 2,
                **dynamic,
            )
        except FAILURES as error:
            raise GraphError(
                f"the {exporter} exporter of torch {torch.__version__} cannot export {source}: "
                f"{first_line(root(error))}; try the other exporter"
            ) from error


def _input_axes(module: Module) -> dict[str, dict[int, str]]:
    return {
        name: {0: "batch", 1: module.lengths[len(e[0])]} if is_tokens(e) else {0: "batch"}
        for name, e in module.examples.items()
    }


def _output_axes(module: Module) -> dict[str, dict[int, str]]:
    """The axes of outputs that change with the inputs', by what they follow."""
    batch = module.batch
    before = module.run(module.examples)
    after = module.run(module.inputs(batch + 1))
    return {
        name: {
            axis: "batch"
            if (old, new) == (batch, batch + 1)
            else module.lengths.get(old, f"{name}_{axis}")
            for axis, (old, new) in enumerate(zip(value.shape, after[name].shape, strict=True))
            if old != new
        }
        for name, value in before.items()
    }


def _size_bytes(module: Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.module.parameters())


def _gather_weights(draft: Path) -> None:
    """Bring weights that an exporter scattered over many files into one beside the model."""
    scattered = [path for path in draft.parent.iterdir() if path != draft]
    if scattered:
        proto = onnx.load(draft)
        for path in scattered:
            path.unlink()
        onnx.save(proto, draft, save_as_external_data=True, location=_data(draft).name)


def _data(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _parity(module: Module, draft: Path) -> float:
    """The largest relative error of an output: other batches, padding first and padding last."""
    session = open_session(draft)
    worst = 0.0
    for batch, is_reversed in product(PARITY_BATCHES, (True, False)):
        tensors = module.inputs(batch, is_reversed=is_reversed)
        got = session.run({name: tensor.numpy() for name, tensor in tensors.items()})
        counted = module.counted(tensors)
        errors = [
            _error(got[name], value, counted.get(name, ...))
            for name, value in module.run(tensors).items()
        ]
        worst = float(np.max([worst, *errors]))  # unlike max, it keeps what is not a number
    return worst


def _error(got: np.ndarray, wanted: np.ndarray, counted: Any) -> float:  # noqa: ANN401 (an index)
    """``|got - wanted| / |wanted|`` of what counts; infinite if the shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    exact = wanted[counted].astype(np.float64)
    scale = float(np.linalg.norm(exact)) or 1.0
    return float(np.linalg.norm(got[counted].astype(np.float64) - exact)) / scale


def _input_shapes(draft: Path) -> dict[str, tuple[str | int, ...]]:
    graph = onnx.load(draft, load_external_data=False).graph
    return {
        value.name: tuple(
            dim.dim_param or int(dim.dim_value) for dim in value.type.tensor_type.shape.dim
        )
        for value in graph.input
    }
