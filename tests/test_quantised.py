"""Models that round activations are refused with advice; those that round weights only are read."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from corp_onnx.errors import QuantisedModel
from corp_onnx.graph.model import load
from tests.builders import HIDDEN, WIDTH, Net, feeds, mlp, relu, residual_block

ADVICE = "prune the floating-point model first and quantise the result"


class Samples(CalibrationDataReader):
    def __init__(self, proto):
        self.given = iter([feeds(proto, 2, 5, seed) for seed in range(4)])

    def get_next(self):
        return next(self.given, None)


@pytest.fixture
def plain(tmp_path):
    net = Net(0)
    proto = net.build(residual_block(net, net.x()))
    onnx.save(proto, tmp_path / "plain.onnx")
    return tmp_path / "plain.onnx"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("form", "ops"),
    [(QuantFormat.QDQ, "DequantizeLinear, QuantizeLinear"), (QuantFormat.QOperator, "QLinear")],
)
def test_static_quantisation_is_refused(form, ops, plain, tmp_path):
    made = tmp_path / "static.onnx"
    quantize_static(plain, made, Samples(onnx.load(plain)), quant_format=form)
    with pytest.raises(QuantisedModel, match=f"{ops}.*{ADVICE}"):
        load(made)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
def test_dynamic_quantisation_is_refused(kind, plain, tmp_path):
    made = tmp_path / "dynamic.onnx"
    quantize_dynamic(plain, made, weight_type=kind)
    with pytest.raises(QuantisedModel, match=f"DynamicQuantizeLinear.*MatMulInteger.*{ADVICE}"):
        load(made)


def saved(tmp_path, proto):
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("op", ["QAttention", "QLinearAdd", "QOrderedMatMul"])
def test_other_operators_of_rounded_activations_are_refused(op, tmp_path):
    net = Net(0)
    y = mlp(net, net.x(), relu)
    net(op, y, y, domain="com.microsoft")
    with pytest.raises(QuantisedModel, match=f"it holds {op}"):
        load(saved(tmp_path, net.build(y)))


def in_a_function(rounds):
    """A function that rounds its argument, and one that dequantises what it is given."""
    net = Net(0)
    scale, zero = net.const(np.float32(0.1)), net.const(np.int8(0))
    if rounds:
        x = net("Rounded", net.x(), scale, zero, domain="local")
        weight = net.weight(WIDTH, HIDDEN)
    else:
        x = net.x()
        stored = net.const(net.rng.integers(-8, 8, (WIDTH, HIDDEN)).astype(np.int8))
        weight = net("Weight", stored, scale, zero, domain="local")
    net("Softplus", net.linear(relu(net, net("MatMul", x, weight)), HIDDEN, WIDTH))
    values = [helper.make_tensor_value_info(net.nodes[-1].output[0], TensorProto.FLOAT, None)]
    nodes = [helper.make_node("DequantizeLinear", ["q" if rounds else "x", "s", "z"], ["y"])]
    if rounds:
        nodes.insert(0, helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]))
    opsets = [helper.make_opsetid("", 18)]
    function = helper.make_function("local", "Rounded" if rounds else "Weight", ["x", "s", "z"],
                                    ["y"], nodes, opsets)  # fmt: skip
    made = helper.make_graph(net.nodes, "tiny", net.inputs, values, net.tensors)
    opsets.append(helper.make_opsetid("local", 1))
    return helper.make_model(made, functions=[function], opset_imports=opsets, ir_version=10)


def test_activations_that_a_function_rounds_are_noticed(tmp_path):
    with pytest.raises(QuantisedModel, match=ADVICE):
        load(saved(tmp_path, in_a_function(rounds=True)))


def test_a_weight_that_a_function_dequantises_is_read(tmp_path):
    model = load(saved(tmp_path, in_a_function(rounds=False)))
    assert model.notes[0].startswith("weights are stored as int8 (DequantizeLinear)")


@pytest.mark.parametrize("rounds", [True, False])
def test_what_a_body_rounds_is_noticed(rounds, tmp_path):
    """A constant of the graph outside is one inside too."""
    net = Net(0)
    x = net.x()
    stored = net.const(net.rng.integers(-8, 8, (WIDTH, WIDTH)).astype(np.int8))
    scale, zero = net.const(np.float32(0.1)), net.const(np.int8(0))
    bodies = []
    for tag in ("a", "b"):
        inner = [helper.make_node("DequantizeLinear", [stored, scale, zero], [f"w{tag}"])]
        if rounds:
            inner = [
                helper.make_node("QuantizeLinear", [x, scale, zero], [f"q{tag}"]),
                helper.make_node("DequantizeLinear", [f"q{tag}", scale, zero], [f"w{tag}"]),
            ]
        value = helper.make_tensor_value_info(f"w{tag}", TensorProto.FLOAT, None)
        bodies.append(helper.make_graph(inner, tag, [], [value]))
    condition = net("Greater", net("ReduceMax", x, keepdims=0), 0.0)
    y = net("If", condition, then_branch=bodies[0], else_branch=bodies[1])
    path = saved(tmp_path, net.build(net("MatMul", x, net("Transpose", y, perm=[1, 0]))))
    if not rounds:
        assert load(path)
        return
    with pytest.raises(QuantisedModel, match=ADVICE):
        load(path)
