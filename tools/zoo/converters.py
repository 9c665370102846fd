"""Encoders in the way of the converters that are no part of torch, written by hand.

Paddle's converter splits a packed projection by Slice and Squeeze; TensorFlow's flattens tokens
before every product and adds biases head by head; both put Identity and Constant nodes everywhere.
A third one writes every product as Einsum, weights with an axis for heads included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.zoo_models import VOCABULARY, draw
from tools.zoo.entries import Entry, attention, mlp

WIDTH, HEADS, HEAD, HIDDEN, DEPTH = 48, 3, 16, 112, 2
IMAGE, PATCH, CHANNELS = 32, 8, 3
TOKENS = (IMAGE // PATCH) ** 2

Made = tuple[onnx.ModelProto, list[Entry], dict[str, np.ndarray]]
"""A model, the truth about it, and the parameters it was made of."""


@dataclass(slots=True)
class Draft:
    """A graph being written, one node after the other."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    parameters: dict[str, np.ndarray] = field(default_factory=dict)

    def __call__(self, op: str, *inputs: str, **attributes: object) -> str:
        """Add a node with one output and return the output's name."""
        return self.several(op, 1, *inputs, **attributes)[0]

    def several(self, op: str, outputs: int, *inputs: str, **attributes: object) -> list[str]:
        """Add a node with some outputs and return their names."""
        name = f"{op}_{len(self.nodes)}"
        made = [f"{name}:{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, made, name=name, **attributes))
        return made

    def constant(self, value: object, dtype: type = np.int64) -> str:
        """A Constant node."""
        tensor = numpy_helper.from_array(np.asarray(value, dtype))
        return self("Constant", value=tensor)

    def parameter(self, name: str, *shape: int, form: tuple[int, ...] | None = None) -> str:
        """An initializer; a matrix is drawn as torch has it, and stored transposed."""
        drawn = draw(name, shape)
        self.parameters[name] = drawn
        stored = drawn.T if len(shape) == 2 else drawn
        tensor = numpy_helper.from_array(np.ascontiguousarray(stored.reshape(form or stored.shape)))
        tensor.name = name
        self.initializers.append(tensor)
        return name

    def model(
        self,
        inputs: Mapping[str, tuple[int, tuple[str | int, ...]]],
        output: str,
        *,
        opset: int,
        producer: str,
    ) -> onnx.ModelProto:
        """The whole as a model, checked."""
        given = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
        tokens = next(iter(inputs.values()))[1][1:2]
        shape = ["batch", tokens[0] if len(inputs) > 1 else None, WIDTH]
        made = [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)]
        nodes = [*self.nodes, helper.make_node("Identity", [output], ["output"], name="last")]
        graph = helper.make_graph(nodes, "graph", given, made, self.initializers)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            producer_name=producer,
            ir_version=8,
        )
        onnx.checker.check_model(model, full_check=True)
        return model


def paddle_vit() -> Made:
    """A ViT with a packed projection, norms and GELU written out, in opset 11."""
    net = Draft()
    kernel = net.parameter("patch.weight", WIDTH, CHANNELS, PATCH, PATCH)
    patches = net("Conv", "x", kernel, strides=[PATCH, PATCH], kernel_shape=[PATCH, PATCH])
    tokens = net("Reshape", patches, net.constant([0, WIDTH, TOKENS]))
    x = net("Transpose", net("Identity", tokens), perm=[0, 2, 1])
    for index in range(DEPTH):
        block = f"blocks.{index}"
        y = _norm_written_out(net, f"{block}.norm1", x)
        x = net("Add", x, _packed_by_slices(net, f"{block}.attention", y))
        y = _norm_written_out(net, f"{block}.norm2", x)
        x = net("Add", x, _mlp(net, f"{block}.mlp", y, _gelu))
    x = _norm_written_out(net, "norm", x)
    shape: tuple[str | int, ...] = ("batch", CHANNELS, IMAGE, IMAGE)
    model = net.model({"x": (TensorProto.FLOAT, shape)}, x, opset=11, producer="paddle2onnx")
    return model, [attention(HEADS, HEAD), mlp(HIDDEN)] * DEPTH, net.parameters


def tf_bert() -> Made:
    """A BERT whose products are of matrices only, and whose biases have an axis for heads."""
    net = Draft()
    added = net("Cast", "attention_mask", to=TensorProto.FLOAT)
    added = net("Unsqueeze", added, net.constant([1, 2]))
    added = net("Sub", net.constant(1.0, np.float32), added)
    added = net("Mul", added, net.constant(-1e9, np.float32))
    x = _words(net)
    for index in range(DEPTH):
        block = f"layer.{index}"
        y = net("Add", x, _by_matrices(net, f"{block}.attention", x, added))
        x = _norm_written_out(net, f"{block}.norm1", y)
        y = net("Add", x, _flat_mlp(net, f"{block}.mlp", x))
        x = _norm_written_out(net, f"{block}.norm2", y)
    model = net.model(_text(), x, opset=13, producer="tf2onnx")
    return model, [attention(HEADS, HEAD), mlp(HIDDEN)] * DEPTH, net.parameters


def einsum_encoder() -> Made:
    """Every product is an Einsum."""
    net = Draft()
    seen = net("Cast", "attention_mask", to=TensorProto.BOOL)
    seen = net("Unsqueeze", seen, net.constant([1, 2]))
    x = _words(net)
    for index in range(DEPTH):
        block = f"layer.{index}"
        y = _norm_written_out(net, f"{block}.norm1", x)
        x = net("Add", x, _by_einsum(net, f"{block}.attention", y, seen))
        y = _norm_written_out(net, f"{block}.norm2", x)
        up = net(
            "Einsum", y, net.parameter(f"{block}.up.weight", HIDDEN, WIDTH), equation="btd,df->btf"
        )
        up = net("Relu", net("Add", up, net.parameter(f"{block}.up.bias", HIDDEN)))
        down = net.parameter(f"{block}.down.weight", WIDTH, HIDDEN)
        x = net("Add", x, net("Einsum", up, down, equation="btf,fd->btd"))
    model = net.model(_text(), x, opset=13, producer="by hand")
    return model, [attention(HEADS, HEAD), mlp(HIDDEN)] * DEPTH, net.parameters


MODELS: Mapping[str, Callable[[], Made]] = {
    "paddle_vit": paddle_vit,
    "tf_bert": tf_bert,
    "einsum_encoder": einsum_encoder,
}
"""The models by name."""


def _text() -> dict[str, tuple[int, tuple[str | int, ...]]]:
    kind = (TensorProto.INT64, ("batch", "sequence"))
    return {"input_ids": kind, "attention_mask": kind}


def _words(net: Draft) -> str:
    """Words looked up in a table that is read through an Identity."""
    table = draw("embedding.weight", (VOCABULARY, WIDTH))
    net.parameters["embedding.weight"] = table
    net.initializers.append(numpy_helper.from_array(table, "embedding.weight"))
    return net("Gather", net("Identity", "embedding.weight"), "input_ids", axis=0)


def _linear(net: Draft, name: str, x: str, width_in: int, width_out: int) -> str:
    weight = net("Identity", net.parameter(f"{name}.weight", width_out, width_in))
    return net("Add", net("MatMul", x, weight), net.parameter(f"{name}.bias", width_out))


def _norm_written_out(net: Draft, name: str, x: str) -> str:
    centred = net("Sub", x, net("ReduceMean", x, axes=[-1], keepdims=1))
    square = net("Pow", centred, net.constant(2.0, np.float32))
    variance = net("ReduceMean", square, axes=[-1], keepdims=1)
    deviation = net("Sqrt", net("Add", variance, net.constant(1e-6, np.float32)))
    scaled = net("Mul", net("Div", centred, deviation), net.parameter(f"{name}.weight", WIDTH))
    return net("Add", scaled, net.parameter(f"{name}.bias", WIDTH))


def _gelu(net: Draft, x: str) -> str:
    bell = net("Erf", net("Div", x, net.constant(np.sqrt(2), np.float32)))
    gate = net("Add", bell, net.constant([1.0], np.float32))
    return net("Mul", net("Mul", x, gate), net.constant(0.5, np.float32))


def _mlp(net: Draft, name: str, x: str, activation: Callable[[Draft, str], str]) -> str:
    hidden = activation(net, net("Identity", _linear(net, f"{name}.up", x, WIDTH, HIDDEN)))
    return _linear(net, f"{name}.down", net("Identity", hidden), HIDDEN, WIDTH)


def _packed_by_slices(net: Draft, name: str, x: str) -> str:
    """One projection, cut into three by Slice and a Squeeze with its axes as attribute."""
    packed = _linear(net, f"{name}.qkv", x, WIDTH, 3 * WIDTH)
    batch = net("Slice", net("Shape", x), *(net.constant([bound]) for bound in (0, 1)))
    sizes = [batch, *(net.constant([size]) for size in (TOKENS, 3, HEADS, HEAD))]
    apart = net("Reshape", packed, net("Concat", *sizes, axis=0))
    apart = net("Transpose", apart, perm=[2, 0, 3, 1, 4])
    parts = []
    for index in range(3):
        bounds = [net.constant([bound]) for bound in (index, index + 1, 0)]
        part = net("Squeeze", net("Slice", apart, *bounds), axes=[0])
        parts.append(net("Identity", part))
    query, key, value = parts
    logits = net("MatMul", query, net("Transpose", key, perm=[0, 1, 3, 2]))
    logits = net(
        "Add",
        net("Mul", logits, net.constant(HEAD**-0.5, np.float32)),
        net.constant(0.0, np.float32),
    )
    mixed = net("MatMul", net("Identity", net("Softmax", logits, axis=3)), value)
    mixed = net("Transpose", mixed, perm=[0, 2, 1, 3])
    joined = net("Reshape", mixed, net.constant([0, 0, WIDTH]))
    return _linear(net, f"{name}.proj", joined, WIDTH, WIDTH)


def _by_matrices(net: Draft, name: str, x: str, added: str) -> str:
    """Tokens of all samples in one axis for every product with a weight."""
    shape = net("Shape", x)
    leading = net("Slice", shape, *(net.constant([bound]) for bound in (0, 2)))
    flat = net("Reshape", x, net.constant([-1, WIDTH]))
    heads = net("Concat", leading, net.constant([HEADS, HEAD]), axis=0)

    def project(role: str) -> str:
        weight = net(
            "Identity", net("Identity", net.parameter(f"{name}.{role}.weight", WIDTH, WIDTH))
        )
        apart = net("Reshape", net("MatMul", flat, weight), heads)
        bias = net.parameter(f"{name}.{role}.bias", WIDTH, form=(HEADS, HEAD))
        return net("Add", apart, bias)

    scale = net.constant(HEAD**-0.5, np.float32)
    query = net("Transpose", net("Mul", project("query"), scale), perm=[0, 2, 1, 3])
    key = net("Transpose", project("key"), perm=[0, 2, 3, 1])
    value = net("Transpose", project("value"), perm=[0, 2, 1, 3])
    logits = net("Add", net("MatMul", query, key), added)
    mixed = net("MatMul", net("Softmax", logits, axis=-1), value)
    mixed = net("Transpose", mixed, perm=[0, 2, 1, 3])
    flat = net("Reshape", mixed, net.constant([-1, WIDTH]))
    out = net("MatMul", flat, net.parameter(f"{name}.output.weight", WIDTH, WIDTH))
    out = net("Reshape", out, net("Concat", leading, net.constant([WIDTH]), axis=0))
    return net("Add", out, net.parameter(f"{name}.output.bias", WIDTH))


def _flat_mlp(net: Draft, name: str, x: str) -> str:
    leading = net("Slice", net("Shape", x), *(net.constant([bound]) for bound in (0, 2)))
    flat = net("Reshape", x, net.constant([-1, WIDTH]))
    up = net("MatMul", flat, net.parameter(f"{name}.up.weight", HIDDEN, WIDTH))
    up = net("Reshape", up, net("Concat", leading, net.constant([HIDDEN]), axis=0))
    hidden = _gelu(net, net("Add", up, net.parameter(f"{name}.up.bias", HIDDEN)))
    flat = net("Reshape", hidden, net.constant([-1, HIDDEN]))
    down = net("MatMul", flat, net.parameter(f"{name}.down.weight", WIDTH, HIDDEN))
    down = net("Reshape", down, net("Concat", leading, net.constant([WIDTH]), axis=0))
    return net("Add", down, net.parameter(f"{name}.down.bias", WIDTH))


def _by_einsum(net: Draft, name: str, x: str, seen: str) -> str:
    def project(role: str) -> str:
        form = (WIDTH, HEADS, HEAD)
        weight = net.parameter(f"{name}.{role}.weight", WIDTH, WIDTH, form=form)
        bias = net.parameter(f"{name}.{role}.bias", WIDTH, form=(HEADS, HEAD))
        return net("Add", net("Einsum", x, weight, equation="btd,dhe->bthe"), bias)

    query, key, value = (project(role) for role in ("query", "key", "value"))
    logits = net("Einsum", query, key, equation="bqhe,bkhe->bhqk")
    logits = net("Div", logits, net.constant(HEAD**0.5, np.float32))
    logits = net("Where", seen, logits, net.constant(-1e9, np.float32))
    mixed = net("Einsum", net("Softmax", logits, axis=-1), value, equation="bhqk,bkhe->bqhe")
    form = (HEADS, HEAD, WIDTH)
    weight = net.parameter(f"{name}.output.weight", WIDTH, WIDTH, form=form)
    out = net("Einsum", mixed, weight, equation="bthe,hed->btd")
    return net("Add", out, net.parameter(f"{name}.output.bias", WIDTH))
