"""A model in bfloat16 is found, cut and run, the last in float32."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from corp_onnx.blocks import find_blocks
from corp_onnx.graph.model import from_proto
from corp_onnx.graph.widened import in_float32, is_bfloat16
from corp_onnx.session import open_session
from corp_onnx.surgery.operate import operate
from tests.builders import TINY, Net, feeds, mlp, relu
from tests.full_width import run, squared_error, unchanged


def narrow(proto):
    """The same model in bfloat16, and in float32 with weights rounded to it."""
    rounded, half = with_weights(proto, np.float32), with_weights(proto, ml_dtypes.bfloat16)
    for value in (*half.graph.input, *half.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    for attribute in (a for node in half.graph.node for a in node.attribute):
        if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.BFLOAT16
    return half, rounded


def with_weights(proto, dtype):
    """A copy with weights rounded to bfloat16, and stored in some type."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16).astype(dtype)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return copy


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_the_wide_model_computes_with_the_same_weights(name):
    half, rounded = narrow(TINY[name](0).proto)
    given = feeds(rounded, 2, 6)
    wide = in_float32(half)
    onnx.checker.check_model(wide, full_check=True)
    assert not is_bfloat16(wide)
    assert is_bfloat16(half)
    (expected,) = run(rounded, given)
    assert squared_error(run(wide, given)[0], expected) == 0
    assert squared_error(run(TINY[name](0).proto, given)[0], expected) > 1e-8


def test_casts_constants_and_branches_are_widened():
    net = Net(0, opset=21)
    half = TensorProto.BFLOAT16
    rows = net("Cast", net.x(), to=half)
    one = numpy_helper.from_array(np.ones(1, ml_dtypes.bfloat16))
    rows = net("Add", rows, net("Constant", value=one))
    filled = net("ConstantOfShape", net("Shape", "x"), value=one)
    body = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["inner"], to=half)],
        "body",
        [],
        [helper.make_tensor_value_info("inner", half, None)],
    )
    keep = net("Equal", net("Size", "x"), np.int64(0))
    branch = net("If", keep, then_branch=body, else_branch=body)
    y = net("Cast", net("Add", net("Add", rows, filled), branch), to=TensorProto.FLOAT)
    proto = net.build(y)
    given = feeds(proto, 2, 3)
    (made,) = run(in_float32(proto), given)
    np.testing.assert_allclose(made[y], 2 * given["x"] + 2, rtol=1e-6)


def test_a_model_is_cut_in_bfloat16_and_run_in_float32():
    half, rounded = narrow(TINY["transformer"](0).proto)
    model = from_proto(half)
    catalog = find_blocks(model)
    assert len(catalog.blocks) == 4
    cut = operate(model, catalog, unchanged(model, catalog)).model
    kinds = {tensor.data_type for tensor in cut.proto().graph.initializer}
    assert TensorProto.BFLOAT16 in kinds
    assert TensorProto.FLOAT not in kinds
    given = feeds(rounded, 2, 6)
    (expected,) = run(rounded, given)
    for candidate in (model, cut):
        session = open_session(candidate)
        assert {spec.dtype for spec in session.inputs} == {np.dtype(np.float32)}
        assert squared_error(session.run(given), expected) < 1e-10


def test_nothing_is_written_to_standard_output_for_bfloat16(capsys):
    half, _ = narrow(TINY["mlp"](0).proto)
    find_blocks(from_proto(half))
    assert capsys.readouterr().out == ""


def test_a_float_model_is_not_bfloat16():
    net = Net(0)
    assert not is_bfloat16(net.build(mlp(net, net.x(), relu)))


def test_a_constant_in_bfloat16_that_is_split_is_read():
    net = Net(0, dtype=ml_dtypes.bfloat16)
    table = net.const(np.ones((4, 10)))
    sizes = net("Split", table, [2, 2], outputs=2, axis=0)
    proto = net.build(net("Add", net.x(), net("ReduceSum", sizes[0], [0], keepdims=0)))
    assert from_proto(proto).graph.outputs
