"""A torch module as an ONNX file; the only module that knows torch, timm and transformers."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import onnx

from corp_onnx.errors import (
    BackendUnavailable,
    DataError,
    GraphError,
    PlanError,
    VerificationError,
)
from corp_onnx.graph import LARGEST_PROTOBUF_BYTES, require_writable
from corp_onnx.preprocessing import Preprocessing
from corp_onnx.session import open_session

_log = logging.getLogger(__name__)

Exporter = Literal["torchscript", "dynamo"]

OPSETS: Mapping[str, range] = {"torchscript": range(13, 21), "dynamo": range(18, 24)}
"""The opsets that each exporter writes."""

DEFAULT_OPSET: Mapping[str, int] = {"torchscript": 17, "dynamo": 18}

PARITY = 1e-4
"""Largest relative error of any output; rounding leaves about 1e-6 in a float32 network."""

PARITY_BATCHES = (1, 3)
IMAGE, TOKENS, MASK = "pixel_values", "input_ids", "attention_mask"
TRACED_BATCH, TRACED_TOKENS = 2, 12
CONTAINERS = ("state_dict", "model", "module")
"""Keys under which training scripts keep the weights of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Export:
    """An ONNX file that computes what a torch module computes.

    Attributes:
        path: The model.
        source: What it was made from, as it was asked for.
        opset: Version of the standard operator set.
        exporter: Which of torch's two exporters wrote it.
        parameters: Number of weights of the module.
        inputs: Shape of every input, dynamic axes by name.
        parity: Largest relative error ``|onnx - torch| / |torch|`` of any output, over two batch
            sizes that were not traced.
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


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the weights come from: a file, a seed-less draw, or else the source itself."""

    checkpoint: Path | None
    random: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Loaded:
    """A module in evaluation mode that takes its named examples by position."""

    module: Any
    examples: Mapping[str, Any]
    recipe: Preprocessing | None = None


def export(
    source: str,
    output: Path,
    *,
    checkpoint: Path | None = None,
    random_weights: bool = False,
    exporter: Exporter = "torchscript",
    opset: int | None = None,
) -> Export:
    """Write a torch module as float32 ONNX with a dynamic batch, checked against torch.

    Sources are ``timm:NAME``; ``hf:FOLDER`` (or a name on the hub), loaded as the class that its
    config names; and ``script.py:function``, where the function returns a module and its example
    inputs, a tuple or a dict, every one with the batch first. Whole-number inputs ``[b, t]`` get a
    dynamic sequence as well.

    Args:
        source: What to export.
        output: Where the ONNX file goes; it appears whole, by rename, or not at all.
        checkpoint: Weights to load, ``.safetensors`` or ``.pth``; every key must fit.
        random_weights: Export the architecture with freshly drawn weights.
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
    loaded = _load(source, Weights(checkpoint, random_weights))
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        draft = Path(folder) / output.name
        _write(loaded, draft, opset=opset, exporter=exporter)
        _gather_weights(draft)
        parity = _parity(loaded, draft)
        inputs = _input_shapes(draft)
        recipe = _publish(draft, output, loaded.recipe)
    parameters = sum(weight.numel() for weight in loaded.module.parameters())
    return Export(output, source, opset, exporter, parameters, inputs, parity, recipe)


def _package(name: str) -> ModuleType:
    """A package of the export extra, or an error that says how to get it."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torch and torchvision do not match
        raise BackendUnavailable(
            f"exporting needs {name}, which cannot be imported ({error}); install it with "
            "`pip install 'corp_onnx[export]'`"
        ) from error


def _opset(exporter: Exporter, opset: int | None) -> int:
    if exporter not in OPSETS:
        raise PlanError(f"exporter {exporter!r} is unknown; use one of {', '.join(OPSETS)}")
    known = OPSETS[exporter]
    if opset is not None and opset not in known:
        raise PlanError(
            f"the {exporter} exporter writes opset {known[0]} to {known[-1]}, not {opset}"
        )
    return opset or DEFAULT_OPSET[exporter]


# Loading a module ------------------------------------------------------------------------------


def _load(source: str, weights: Weights) -> _Loaded:
    """The module that a source names, with its weights, in float32 and evaluation mode."""
    kind, _, name = source.partition(":")
    if name and kind == "timm":
        loaded = _from_timm(name, weights)
    elif name and kind == "hf":
        loaded = _from_transformers(name, weights)
    else:
        loaded = _from_script(source, weights)
    loaded.module.float().eval()
    return loaded


def _from_timm(name: str, weights: Weights) -> _Loaded:
    timm, torch = _package("timm"), _package("torch")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise GraphError(
            f"timm {timm.__version__} has no model {name!r}; "
            + (f"close names: {', '.join(close)}" if close else "see timm.list_models()")
        )
    state = None if weights.checkpoint is None else _state(weights.checkpoint)
    try:
        module = timm.create_model(
            name, pretrained=state is None and not weights.random, **_classes(timm, name, state)
        )
    except OSError as error:
        raise BackendUnavailable(_no_weights(f"the weights of {name}", error)) from error
    except RuntimeError as error:
        raise GraphError(_no_weights(f"the weights of {name}", error)) from error
    if state is not None:
        _fill(module, state, weights.checkpoint)
    config = timm.data.resolve_data_config(model=module)
    image = torch.randn(TRACED_BATCH, *config["input_size"], generator=_generator())
    return _Loaded(module, {IMAGE: image}, _timm_recipe(config))


def _classes(timm: ModuleType, name: str, state: Mapping[str, Any] | None) -> dict[str, int]:
    """The number of classes of a checkpoint's head, where it has one."""
    head = timm.get_pretrained_cfg(name).classifier
    heads = [head] if isinstance(head, str) else list(head or ())
    found = [state[f"{h}.weight"] for h in heads if f"{h}.weight" in state] if state else []
    return {"num_classes": len(found[0])} if found else {}
