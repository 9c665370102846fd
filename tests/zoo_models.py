"""Small models as real exporters wrote them; see ``tools/make_zoo.py``.

The files under ``zoo/`` hold everything but the large weights. These are drawn on loading, from the
name of the parameter that they were in torch, exactly as they were drawn for the export: all
exports of one module compute the same function.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from tests import converted

FOLDER = Path(__file__).parent / "zoo"
TOKENS, VOCABULARY = 12, 100
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.onnx")))
"""Every model: its module, a dot, and the form in which it was written."""

TRUTH = json.loads((FOLDER / "truth.json").read_text()) if (FOLDER / "truth.json").is_file() else {}
"""What every module holds: its blocks, and what of them can be cut."""

DRAWN = "drawn:"
"""How the doc string of a weight that is not in the file begins; its parameter's name follows."""


def load(name: str, folder: Path = FOLDER) -> onnx.ModelProto:
    """A model of the zoo, whole; behind an ``@`` stands the tool that is to convert it."""
    exported, _, tool = name.partition("@")
    model = onnx.load(folder / f"{exported}.onnx")
    for tensor in tensors_of(model):
        if tensor.doc_string.startswith(DRAWN):
            fill(tensor)
    if not tool:
        return model
    shapes = {key: list(value.shape) for key, value in feeds(name, 2).items()}
    return converted.convert(model, tool, shapes)


def module_of(name: str) -> str:
    """The module that a model was made of."""
    return name.partition(".")[0]


def feeds(name: str, batch: int, tokens: int = TOKENS, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of a model; in masks, later samples end earlier."""
    exported, _, _ = name.partition("@")
    graph = onnx.load(FOLDER / f"{exported}.onnx").graph
    sizes = {"batch": batch, "sequence": tokens}
    rng = np.random.default_rng(seed)
    made = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = tuple(sizes.get(dim.dim_param, dim.dim_value) for dim in dims)
        made[value.name] = _feed(rng, value.name, shape, value.type.tensor_type.elem_type)
    return made


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a torch parameter: every one does visible work, and no two are alike.

    Linear layers amplify by 1.5, so that attention is far from uniform; norms are around 1,
    LayerScales around 0.5, and biases are not zero.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    values = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    if len(shape) == 1:
        scaled = _vector(name, values)
    elif "embedding" in name and len(shape) == 2:
        scaled = 0.5 * values
    elif len(shape) in {2, 4}:
        scaled = 1.5 / math.sqrt(math.prod(shape[1:])) * values
    else:
        scaled = 0.3 * values
    return scaled.astype(np.float32)


def mark(tensor: onnx.TensorProto, recipe: str) -> None:
    """Leave a weight out of its file: only its shape, and a recipe to draw it by.

    A recipe is the name and the shape of a parameter, ``name:64,48``, with ``:T`` where it was
    transposed; parameters side by side are joined by ``|``.
    """
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.ClearField("int32_data")
    tensor.doc_string = f"{DRAWN}{recipe}"


def fill(tensor: onnx.TensorProto) -> None:
    """Undo ``mark``."""
    parts = [_drawn(recipe) for recipe in tensor.doc_string.removeprefix(DRAWN).split("|")]
    values = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    whole = np.ascontiguousarray(values).reshape(tuple(tensor.dims)).astype(dtype)
    tensor.CopyFrom(numpy_helper.from_array(whole, tensor.name))


def tensors_of(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Initializers, and the values of Constant nodes, also in functions."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    constants = [
        attribute.t
        for node in nodes
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    return [*model.graph.initializer, *constants]


def _drawn(recipe: str) -> np.ndarray:
    name, shape, *transposed = recipe.split(":")
    values = draw(name, tuple(int(size) for size in shape.split(",")))
    return values.T if transposed else values


def _vector(name: str, values: np.ndarray) -> np.ndarray:
    if name.endswith("running_var"):
        return 0.5 + values**2
    if name.endswith("weight"):
        return 1 + 0.2 * values
    if name.endswith("gamma"):
        return 0.5 + 0.2 * values
    return 0.3 * values


def _feed(rng: np.random.Generator, name: str, shape: tuple[int, ...], kind: int) -> np.ndarray:
    if kind == onnx.TensorProto.FLOAT:
        return rng.standard_normal(shape).astype(np.float32)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    if "mask" in name:
        return (np.arange(shape[1]) < shape[1] - np.arange(shape[0])[:, None] % 4).astype(dtype)
    return rng.integers(0, VOCABULARY, shape).astype(dtype)
