"""Functions of a model are written out, whatever opset they are written for, or refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from corp_onnx.blocks import axes_of, find_blocks
from corp_onnx.errors import GraphError
from corp_onnx.graph.inlining import inlined
from corp_onnx.graph.model import from_proto
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from tests.builders import HIDDEN, TINY, WIDTH, Net, feeds
from tests.full_width import narrowed, run, squared_error, unchanged

SIZES = ((1, 5), (3, 7))
BOUND = 1e-10
"""As in ``test_surgery``."""


def model(function_opset, opset, *, op="Relu", nested=True, calls=1):
    """MLPs that are calls of a function, which calls another one as its activation."""
    net = Net(0, opset=opset)
    y = net.x()
    for _ in range(calls):
        weights = net.weight(WIDTH, HIDDEN), net.random(HIDDEN), net.weight(HIDDEN, WIDTH)
        y = net("Add", y, net("Mlp", y, *weights, domain="local"))
    extra = {"axes": [-1]} if op == "Squeeze" else {}
    plain = helper.make_node(op, ["h"], ["r"], **extra)
    activation = helper.make_node("Activation", ["h"], ["r"], domain="local") if nested else plain
    body = [
        helper.make_node("MatMul", ["x", "up"], ["m"]),
        helper.make_node("Add", ["m", "bias"], ["h"]),
        activation,
        helper.make_node("MatMul", ["r", "down"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", function_opset), helper.make_opsetid("local", 1)]
    functions = [
        helper.make_function("local", "Mlp", ["x", "up", "bias", "down"], ["y"], body, opsets),
        helper.make_function("local", "Activation", ["h"], ["r"], [plain], opsets[:1]),
    ]
    shape = ["batch", "tokens", WIDTH]
    shown = [helper.make_tensor_value_info(y, TensorProto.FLOAT, shape)]
    made = helper.make_graph(net.nodes, "tiny", net.inputs, shown, net.tensors)
    imports = [helper.make_opsetid("", opset), opsets[1]]
    return helper.make_model(
        made, functions=functions[: 1 + nested], opset_imports=imports, ir_version=10
    )


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("opsets", [(18, 18), (17, 18), (18, 17), (23, 18), (18, 23)])
def test_blocks_inside_functions_are_found_and_cut(opsets, nested):
    proto = model(*opsets, nested=nested, calls=2)
    onnx.checker.check_model(proto)
    made = from_proto(proto)
    catalog = find_blocks(made)
    assert [(block.width, axes_of(block)) for block in catalog.blocks] == [(HIDDEN, ("mlp",))] * 2
    given = [feeds(proto, *size) for size in SIZES]
    before = run(proto, *given)
    for solution in (unchanged(made, catalog), turned(made, catalog)):
        result = operate(made, catalog, solution).model
        onnx.checker.check_model(result.proto(), full_check=True)
        assert not result.proto().functions
        for pair in zip(run(result, *given), before, strict=True):
            assert squared_error(*pair) < BOUND
    wrong = operate(made, catalog, narrowed(turned(made, catalog), 0.5)).model
    for pair in zip(run(wrong, *given), before, strict=True):
        assert squared_error(*pair) > 1e-6


@pytest.mark.parametrize("nested", [True, False])
def test_a_function_whose_operators_the_model_has_otherwise_is_refused(nested):
    """Squeeze takes its axes as an attribute up to opset 12, and as an input from then on."""
    proto = model(12, 18, op="Squeeze", nested=nested)
    with pytest.raises(GraphError, match=r"opset 12 and the model for opset 18.*another operator"):
        from_proto(proto)


def test_a_model_without_functions_is_itself():
    proto = TINY["mlp"](0).proto
    assert inlined(proto) is proto


def test_the_given_model_is_not_changed():
    proto = model(17, 18)
    before = proto.SerializeToString(deterministic=True)
    assert np.all([node.domain == "" for node in inlined(proto).graph.node])
    assert proto.SerializeToString(deterministic=True) == before
