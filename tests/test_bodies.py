"""What lies inside an If, Loop or Scan stays as it is, and so does what it reads from outside."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from corp_onnx.blocks import Mlp, axes_of, find_blocks
from corp_onnx.graph.model import from_proto
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from tests.builders import (
    HEAD,
    HEADS,
    HIDDEN,
    WIDTH,
    Net,
    feeds,
    merge_heads,
    mix,
    mlp,
    projections,
    relu,
    separate,
)
from tests.full_width import narrowed, run, squared_error

SIZES = ((1, 5), (3, 7))
BOUND = 1e-10
"""As in ``test_surgery``: rounding in float32 of a few hundred terms."""


class Body(Net):
    """The nodes of a body, under names of their own."""

    def __init__(self, tag):
        super().__init__(1)
        self.tag = tag

    def const(self, value):
        super().const(value)
        self.tensors[-1].name += self.tag
        return self.tensors[-1].name

    def __call__(self, op, *inputs, outputs=1, **attrs):
        super().__call__(op, *inputs, outputs=outputs, **attrs)
        node = self.nodes[-1]
        node.name += self.tag
        node.output[:] = [name + self.tag for name in node.output]
        return node.output[0] if outputs == 1 else list(node.output)

    def graph(self, *outputs, inputs=(), dtype=TensorProto.FLOAT):
        values = [helper.make_tensor_value_info(name, dtype, None) for name in outputs]
        return helper.make_graph(self.nodes, "body" + self.tag, list(inputs), values, self.tensors)


def chosen(net, make, dtype=TensorProto.FLOAT):
    """An If that computes one thing in both of its bodies."""
    condition = net("Greater", net("ReduceMax", "x", keepdims=0), 0.0)
    bodies = []
    for tag in ("'", "''"):
        body = Body(tag)
        bodies.append(body.graph(make(body), dtype=dtype))
    return net("If", condition, then_branch=bodies[0], else_branch=bodies[1])


def model_of(net, *outputs, kind=TensorProto.FLOAT):
    """A model of which the last output comes from a body, whose type nobody infers."""
    proto = net.build(*outputs)
    if not proto.graph.output[-1].type.tensor_type.elem_type:
        proto.graph.output[-1].type.tensor_type.elem_type = kind
    return from_proto(proto)


def check_exact(model):
    catalog = find_blocks(model)
    if not any(map(axes_of, catalog.blocks)):
        return catalog
    given = [feeds(model.proto(), *size) for size in SIZES]
    made = operate(model, catalog, turned(model, catalog)).model
    results = run(made, *given)
    for pair in zip(results, run(model, *given), strict=True):
        assert squared_error(*pair) <= BOUND
    wrong = operate(model, catalog, narrowed(turned(model, catalog), 0.5)).model
    for pair in zip(run(wrong, *given), results, strict=True):
        assert squared_error(*pair) > 1e-6
    return catalog


READS = {
    "function": (lambda body, y: body("Neg", y), TensorProto.FLOAT),
    "movement": (lambda body, y: body("Flatten", y), TensorProto.FLOAT),
    "size": (lambda body, y: body("Shape", y), TensorProto.INT64),
    "number of elements": (lambda body, y: body("Size", y), TensorProto.INT64),
    "layer": (lambda body, y: body("ReduceMax", y, keepdims=0), TensorProto.FLOAT),
}
"""What a body does with a tensor from outside."""


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("which", ["product", "sum", "hidden"])
def test_hidden_channels_that_a_body_reads_are_refused(how, which):
    make, kind = READS[how]
    net = Net(0)
    product = net("MatMul", net.x(), net.weight(WIDTH, HIDDEN))
    total = net("Add", product, net.random(HIDDEN))
    hidden = relu(net, total)
    tensor = {"product": product, "sum": total, "hidden": hidden}[which]
    y = net.linear(hidden, HIDDEN, WIDTH)
    catalog = check_exact(
        model_of(net, y, chosen(net, lambda body: make(body, tensor), kind), kind=kind)
    )
    reasons = [item.reason for item in catalog.refusals]
    assert not catalog.blocks
    assert any(f"its hidden tensor {tensor!r} is also read by If (If_" in text for text in reasons)


@pytest.mark.parametrize("how", READS)
def test_an_operand_that_a_body_reads_is_refused_and_the_other_axis_is_not(how):
    make, kind = READS[how]
    for place, left in ((0, ("vo",)), (1, ("vo",)), (2, ("qk",))):
        net = Net(0)
        operands = separate(net)
        y = merge_heads(net, mix(net, *operands))
        tensor = operands[place]
        last = chosen(net, lambda body, t=tensor: make(body, t), kind)
        (block,) = check_exact(model_of(net, y, last, kind=kind)).blocks
        assert axes_of(block) == left
        assert any("is also read by If (If_" in text for text in block.refused.values())


@pytest.mark.parametrize("how", READS)
def test_a_projection_that_a_body_reads_before_its_heads_part(how):
    make, kind = READS[how]
    net = Net(0)
    parts = projections(net)
    operands = [
        net("Transpose", net("Reshape", part, [0, 0, HEADS, HEAD]), perm=[0, 2, 1, 3])
        for part in parts
    ]
    y = merge_heads(net, mix(net, *operands))
    last = chosen(net, lambda body: make(body, parts[0]), kind)
    (block,) = check_exact(model_of(net, y, last, kind=kind)).blocks
    assert axes_of(block) == ("vo",)
    assert "is also read by If (If_" in block.refused["qk"]


@pytest.mark.parametrize("how", READS)
def test_mixed_values_that_a_body_reads_are_refused(how):
    make, kind = READS[how]
    net = Net(0)
    mixed = mix(net, *separate(net))
    last = chosen(net, lambda body: make(body, mixed), kind)
    (block,) = check_exact(model_of(net, merge_heads(net, mixed), last, kind=kind)).blocks
    assert axes_of(block) == ("qk",)
    assert "are read 2 times" in block.refused["vo"]


def test_probabilities_that_a_body_reads_hinder_nothing():
    net = Net(0)
    query, key, value = separate(net)
    weights = net("Softmax", net("MatMul", query, net("Transpose", key, perm=[0, 1, 3, 2])), axis=3)
    y = merge_heads(net, net("MatMul", weights, value))
    last = chosen(net, lambda body: body("ReduceMax", weights, keepdims=0))
    (block,) = check_exact(model_of(net, y, net("Mul", y, last))).blocks
    assert axes_of(block) == ("qk", "vo")


def test_a_bias_that_is_added_inside_a_body_is_no_bias():
    """The product's only reader lies in a body: it is a layer without bias, whose sum stays."""
    net = Net(0)
    net.x()
    product = net("MatMul", relu(net, net.linear("x", WIDTH, HIDDEN)), net.weight(HIDDEN, WIDTH))
    vector = net.const(net.random(WIDTH))
    condition = net("Greater", net("ReduceMax", "x", keepdims=0), 0.0)
    one, other = Body("'"), Body("''")
    bodies = one.graph(one("Add", product, vector)), other.graph(other("Identity", vector))
    last = net("If", condition, then_branch=bodies[0], else_branch=bodies[1])
    (block,) = check_exact(model_of(net, last)).blocks
    assert block.down.bias_node is None


def test_weights_that_a_body_reads_as_well_stay_for_it():
    net = Net(0)
    weight = net.weight(WIDTH, HIDDEN)
    y = net.linear(relu(net, net("MatMul", net.x(), weight)), HIDDEN, WIDTH)
    last = chosen(net, lambda body: body("MatMul", "x", weight))
    catalog = check_exact(model_of(net, y, net("ReduceMax", last, keepdims=0)))
    assert [block.width for block in catalog.blocks] == [HIDDEN]
    assert {item.reason for item in catalog.refusals} == {
        "it lies inside the body of If (If_6), which is left as it is"
    }


def looped(net, make):
    """A Loop of two rounds whose carried tensor is ``x`` at first."""
    body = Body("'")
    given = [
        helper.make_tensor_value_info("round", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
    ]
    outputs = [body("Identity", "go"), make(body, "state")]
    inner = body.graph(*outputs, inputs=given)
    inner.output[0].type.tensor_type.elem_type = TensorProto.BOOL
    return net("Loop", np.int64(2), np.bool_(True), "x", body=inner)


def test_blocks_around_a_loop_are_found_and_those_inside_named():
    """One set of weights for several rounds."""
    net = Net(0)
    before = mlp(net, net.x(), relu)
    y = looped(net, lambda body, state: mlp(body, state, relu))
    catalog = check_exact(model_of(net, before, net("Exp", y)))
    assert [type(block) for block in catalog.blocks] == [Mlp]
    assert {item.reason for item in catalog.refusals} == {
        f"it lies inside the body of Loop ({y[:-2]}), which is left as it is"
    }


def scanned(net, make):
    """A Scan over the tokens of ``x``, which adds what ``make`` makes of every one."""
    body = Body("'")
    given = [
        helper.make_tensor_value_info("state", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("token", TensorProto.FLOAT, None),
    ]
    total = body("Add", "state", make(body, "token"))
    start = net("ReduceSum", "x", [1], keepdims=0)
    return net("Scan", start, "x", outputs=1, num_scan_inputs=1, scan_input_axes=[1],
               body=body.graph(total, inputs=given))  # fmt: skip


def test_blocks_inside_a_scan_are_named():
    net = Net(0)
    before = mlp(net, net.x(), relu)
    y = scanned(net, lambda body, token: mlp(body, token, relu))
    catalog = check_exact(model_of(net, before, net("Exp", y)))
    assert [type(block) for block in catalog.blocks] == [Mlp]
    assert {item.op for item in catalog.refusals} == {"MatMul"}
    assert all("the body of Scan (Scan_" in item.reason for item in catalog.refusals)


def test_a_body_inside_a_body_is_that_of_the_outer_one():
    net = Net(0)
    hidden = relu(net, net.linear(net.x(), WIDTH, HIDDEN))
    y = net.linear(hidden, HIDDEN, WIDTH)

    def nested(body):
        inner = [Body(body.tag + end) for end in ("+", "-")]
        graphs = [each.graph(each("Neg", hidden)) for each in inner]
        condition = body("Greater", body("ReduceMax", "x", keepdims=0), 0.5)
        return body("If", condition, then_branch=graphs[0], else_branch=graphs[1])

    catalog = check_exact(model_of(net, y, chosen(net, nested)))
    assert any("is also read by If (If_7)" in item.reason for item in catalog.refusals)


# Behind an If


def squeezed(net, y, *, rank):
    """An If as TorchScript writes it for a squeeze: on whether an axis has one entry."""
    size = net("Gather", net("Shape", y), np.int64(1))
    condition = net("Equal", size, np.int64(1))
    one, other = Body("'"), Body("''")
    bodies = (
        one.graph(one("Squeeze", y, [1]) if rank else one("Neg", y)),
        other.graph(other("Identity", y)),
    )
    return net("If", condition, then_branch=bodies[0], else_branch=bodies[1])


@pytest.mark.parametrize("rank", [True, False])
def test_blocks_behind_a_choice_by_sizes_are_found(rank):
    net = Net(0)
    y = squeezed(net, mlp(net, net.x(), relu), rank=rank)
    catalog = check_exact(
        model_of(net, net("Exp", net.linear(relu(net, y), WIDTH, WIDTH)), mlp(net, y, relu))
    )
    assert [block.width for block in catalog.blocks if isinstance(block, Mlp)] == [HIDDEN, HIDDEN]


def test_an_attention_behind_a_choice_by_data_is_found():
    net = Net(0)
    net.x()
    y = chosen(net, lambda body: body("Neg", "x"))
    made = [
        net("Transpose", net("Reshape", part, [0, 0, HEADS, HEAD]), perm=[0, 2, 1, 3])
        for part in projections(net, y)
    ]
    (block,) = check_exact(model_of(net, merge_heads(net, mix(net, *made)))).blocks
    assert axes_of(block) == ("qk", "vo")


def test_bodies_of_different_shapes_leave_the_shape_open():
    net = Net(0)
    net.x()
    condition = net("Greater", net("ReduceMax", "x", keepdims=0), 0.0)
    one, other = Body("'"), Body("''")
    bodies = one.graph(one("Identity", "x")), other.graph(other("Concat", "x", "x", axis=1))
    y = net("If", condition, then_branch=bodies[0], else_branch=bodies[1])
    catalog = check_exact(model_of(net, mlp(net, y, relu)))
    assert not catalog.blocks
    assert any("its size is not known" in item.reason for item in catalog.refusals)


def test_values_behind_a_choice_by_sizes_are_not_taken_for_constants():
    """A scale that is one number at all sizes that are probed, and another at one token."""
    net = Net(0)
    query, key, value = separate(net)
    size = net("Gather", net("Shape", "x"), np.int64(1))
    one, other = Body("'"), Body("''")
    bodies = one.graph(one("Neg", 0.7)), other.graph(other("Neg", 0.3))
    condition = net("Equal", size, np.int64(1))
    scale = net("If", condition, then_branch=bodies[0], else_branch=bodies[1])
    query = net("Mul", query, scale)
    (block,) = check_exact(model_of(net, merge_heads(net, mix(net, query, key, value)))).blocks
    assert axes_of(block) == ("vo",)
    assert "If" in block.refused["qk"] or "Mul" in block.refused["qk"]


@pytest.mark.parametrize("op", ["BeamSearch", "GreedySearch", "Sampling"])
def test_a_decoder_inside_a_search_is_named(op):
    """ONNX Runtime's operators that write text hold the whole model in a body."""
    inner = Net(1)
    decoder = inner.build(mlp(inner, inner.x(), relu)).graph
    net = Net(0)
    y = net(op, net.input("ids", "batch", "tokens", dtype=np.int32), np.int32(8),
            domain="com.microsoft", decoder=decoder, eos_token_id=1, pad_token_id=0)  # fmt: skip
    proto = net.build(y)
    shown = helper.make_tensor_value_info(y, TensorProto.INT32, ["batch", "written"])
    proto.graph.output[0].CopyFrom(shown)
    catalog = find_blocks(from_proto(proto))
    assert not catalog.blocks
    assert [item.op for item in catalog.refusals] == ["MatMul"] * 2
    assert all(f"the body of {op} ({op}_0)" in item.reason for item in catalog.refusals)
