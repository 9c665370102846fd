"""What is said of tensors without running the model is what is seen when it runs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from corp_onnx.blocks import axes_of, find_blocks
from corp_onnx.blocks.catalog import view_of
from corp_onnx.errors import PlanError
from corp_onnx.graph import shapes
from corp_onnx.graph.model import from_proto
from corp_onnx.graph.shapes import (
    evaluate,
    tensor_count,
    usual_facts,
    usual_sequence,
)
from corp_onnx.graph.sizes import input_sizes
from corp_onnx.graph.varied import probed
from tests import zoo_models
from tests.builders import HEAD, HEADS, TINY, WIDTH, Net, feeds, mlp, relu, sizes_of
from tests.full_width import run

ALL = pytest.mark.parametrize("name", TINY)


def graph_of(net, *outputs):
    return from_proto(net.build(*outputs)).graph


def observed(proto, given):
    """Every tensor that the model computes, by name."""
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    del shown.graph.output[:]
    names = [name for node in proto.graph.node for name in node.output if name]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    (made,) = run(shown, given)
    return made


def check(proto, given):
    """Compare facts at the sizes of some inputs with a run on them."""
    model = from_proto(proto)
    facts = evaluate(model.graph, {name: value.shape for name, value in given.items()})
    seen = observed(model.proto(), given)
    assert facts.shapes.keys() == seen.keys() | given.keys()
    for name, value in seen.items():
        assert facts.shapes[name] == value.shape, name
        if name in facts.values:
            np.testing.assert_allclose(facts.values[name], value, rtol=1e-6, err_msg=name)
            assert facts.values[name].dtype == value.dtype
        kind = facts.types[name].tensor_type.elem_type
        assert onnx.helper.tensor_dtype_to_np_dtype(kind) == value.dtype
    return facts


@ALL
def test_shapes_and_values_are_those_of_a_run(name):
    proto = TINY[name](0).proto
    for batch, tokens in sizes_of(name):
        check(proto, feeds(proto, batch, tokens))


@pytest.mark.parametrize("name", zoo_models.NAMES)
def test_shapes_and_values_of_real_exports_are_those_of_a_run(name):
    check(zoo_models.load(name), zoo_models.feeds(name, 3))


def test_values_do_not_follow_from_data():
    for name in TINY:
        proto = TINY[name](0).proto
        first, second = (feeds(proto, 1, 5, seed) for seed in (0, 1))
        sizes = {key: value.shape for key, value in first.items()}
        facts = evaluate(from_proto(proto).graph, sizes)
        before, after = observed(proto, first), observed(proto, second)
        for tensor in facts.values:
            assert np.array_equal(before[tensor], after[tensor]), (name, tensor)


def test_nothing_the_size_of_an_activation_is_computed(monkeypatch):
    """A table of positions as large as an activation keeps its shape only."""
    monkeypatch.setattr(shapes, "LARGEST_KNOWN_VALUE", 100)
    net = Net(0)
    length = net("Shape", net.x(), start=1, end=2)
    table = net("Expand", net.const(0.5), net("Concat", length, [WIDTH], axis=0))
    facts = evaluate(graph_of(net, net("Add", "x", table)), {"x": (2, 50, WIDTH)})
    assert facts.shapes[table] == (50, WIDTH)
    assert table not in facts.values
    assert facts.values[length].tolist() == [50]


def test_division_by_zero_in_shape_arithmetic_does_not_warn():
    net = Net(0)
    length = net("Cast", net("Shape", net.x()), to=TensorProto.FLOAT)
    y = net("Log", net("Div", length, net("Sub", length, length)))
    assert np.isinf(evaluate(graph_of(net, y), {"x": (1, 2, WIDTH)}).values[y]).all()


# Sizes of inputs


def inputs_like(*shapes, **options):
    net = Net(0)
    for index, shape in enumerate(shapes):
        net.input(f"x{index}", *shape)
    made = graph_of(net, *(net("Relu", f"x{index}") for index in range(len(shapes))))
    return input_sizes(made, **options)


def test_dynamic_dimensions_go_by_their_place():
    made = inputs_like((None, 3, None, None), (None, None, 7), (None,), (None, None))
    assert made == {"x0": (1, 3, 224, 224), "x1": (1, 128, 7), "x2": (1,), "x3": (1, 128)}
    assert inputs_like((None, None), batch=4, sequence=9) == {"x0": (4, 9)}


def test_static_dimensions_stay():
    assert inputs_like((2, 3, 32, 32), batch=5) == {"x0": (2, 3, 32, 32)}


def test_given_sizes_come_first():
    given = {"x0": (2, 3, 96, 96)}
    assert inputs_like((None, 3, None, None), (None, None), given=given) == {
        "x0": (2, 3, 96, 96),
        "x1": (1, 128),
    }
    assert given == {"x0": (2, 3, 96, 96)}


PAST = ("batch", 3, "past", 16)


def test_keys_of_tokens_before_are_no_pictures():
    """Two of one form; the axis of a mask of all tokens has a name of its own."""
    ids, places, mask = ("batch", "new"), ("batch", "new"), ("batch", "all")
    made = inputs_like(ids, places, mask, PAST, PAST, batch=2, sequence=9)
    assert list(made.values()) == [(2, 9), (2, 9), (2, 18), (2, 3, 9, 16), (2, 3, 9, 16)]
    made = inputs_like(("batch", 1), mask, PAST, PAST, sequence=9)
    assert list(made.values())[:2] == [(1, 1), (1, 10)]
    made = inputs_like(ids, mask, PAST, PAST, sequence=9, given={"x2": (1, 3, 4, 16)})
    assert list(made.values()) == [(1, 9), (1, 13), (1, 3, 4, 16), (1, 3, 4, 16)]


def test_one_input_of_that_form_is_a_picture():
    made = inputs_like(("batch", "new"), ("batch", "all"), PAST, sequence=9)
    assert list(made.values()) == [(1, 9), (1, 9), (1, 3, 224, 16)]


def test_dimensions_of_one_name_have_one_size():
    mask, tokens = ("batch", 1, 1, "tokens"), ("batch", "tokens", 7)
    assert inputs_like(mask, tokens) == {"x0": (1, 1, 1, 128), "x1": (1, 128, 7)}
    given = {"x0": (5, 1, 1, 9)}
    assert inputs_like(mask, tokens, given=given) == {"x0": (5, 1, 1, 9), "x1": (5, 9, 7)}
    assert inputs_like(("batch", 3, "size", "size")) == {"x0": (1, 3, 224, 224)}


def test_sizes_that_contradict_the_model():
    with pytest.raises(PlanError, match=r"'x0' has shape \['\?', 3\], which \[1, 4\] does not fit"):
        inputs_like((None, 3), given={"x0": (1, 4)})
    with pytest.raises(PlanError, match=r"which \[1, 3, 3\] does not fit"):
        inputs_like((None, 3), given={"x0": (1, 3, 3)})


def test_sizes_of_an_input_that_does_not_exist():
    with pytest.raises(PlanError, match="given for y, but the inputs of the model are x0, x1"):
        inputs_like((None,), (None,), given={"y": (1,)})


# Sequences that do not fit


@pytest.mark.parametrize("least", [0, 3])
def test_the_branch_that_is_taken_says_what_comes_out(least):
    """By the number of tokens, one branch is taken or the other."""
    net = Net(0)
    net.x()
    length = net("Shape", "x", start=1, end=2)
    taken = net("Greater", length, np.array([least], np.int64))
    outcome = net("If", taken, then_branch=branch("rows", 2), else_branch=branch("columns", 1))
    moved = net("Reshape", "x", net("Concat", [0], outcome, [-1], axis=0))
    model = from_proto(net.build(moved))
    for tokens in (2, 6):
        facts = evaluate(model.graph, {"x": (2, tokens, WIDTH)})
        (expected,) = run(model, {"x": np.zeros((2, tokens, WIDTH), np.float32)})
        (name,) = (tensor.name for tensor in model.graph.outputs)
        assert facts.shapes[name] == expected[name].shape
        assert facts.values[outcome] == (2 if tokens > least else 1)


def test_branches_that_data_choose_have_a_shape_only_where_they_agree():
    for others, known in (((1,), (1,)), ((1, 1), None)):
        net = Net(0)
        chosen = net("Greater", net("ReduceMax", net.x(), keepdims=0), 0.0)
        one, other = branch("rows", 2), branch("columns", np.full(others, 3))
        outcome = net("If", chosen, then_branch=one, else_branch=other)
        model = from_proto(net.build(outcome))
        facts = evaluate(model.graph, {"x": (2, 5, WIDTH)})
        assert facts.shape(model.graph.outputs[0]) == known
        assert outcome not in facts.values


def branch(name, value):
    """The body of an If that gives a constant."""
    made = onnx.numpy_helper.from_array(np.atleast_1d(np.int64(value)), name)
    node = onnx.helper.make_node("Constant", [], [name], name, value=made)
    shown = onnx.helper.make_tensor_value_info(name, TensorProto.INT64, None)
    return onnx.helper.make_graph([node], f"{name} body", [], [shown])


def test_a_table_of_positions_decides_the_usual_sequence():
    model = from_proto(TINY["text_encoder"](0).proto)
    assert usual_sequence(model.graph) == 16
    facts = usual_facts(model.graph)
    assert facts.sizes == {"ids": (1, 16), "seen": (1, 16)}
    assert len(facts.shapes) == tensor_count(model.graph)
    beyond = evaluate(model.graph, input_sizes(model.graph, sequence=17))
    assert len(beyond.shapes) < tensor_count(model.graph)


def test_a_table_that_is_cut_to_the_sequence_decides_it_too():
    net = Net(0)
    places = net(
        "Slice", net.const(np.arange(70)[None]), [0], net("Shape", net.x(), start=1, end=2), [1]
    )
    table = net("Gather", net.random(70, WIDTH), places, axis=0)
    made = graph_of(net, mlp(net, net("Add", "x", table), relu))
    assert usual_sequence(made) == 64


def test_a_table_too_large_to_be_computed_decides_it_as_well():
    net = Net(0)
    length = net("Squeeze", net("Shape", net.x(), start=1, end=2))
    places = net("Range", np.int64(0), length, np.int64(1))
    table = net("Gather", np.zeros((70, 1000)), places, axis=0)
    made = graph_of(net, net("Relu", table))
    assert usual_sequence(made) == 64


def test_a_length_that_the_model_holds_is_found():
    """Traced at 11 tokens and declared open: it runs at no other length, and says so nowhere."""
    net = Net(0)
    x = net("Reshape", net.x(), [0, 11, WIDTH])
    model = from_proto(net.build(mlp(net, x, relu)))
    assert usual_sequence(model.graph) == 11
    (block,) = find_blocks(model).blocks
    assert axes_of(block) == ("mlp",)


def test_the_longest_usual_sequence_is_taken_where_all_fit():
    made = from_proto(TINY["mlp"](0).proto).graph
    assert usual_sequence(made) == 128
    assert usual_facts(made, {"x": (2, 40, WIDTH)}).sizes == {"x": (2, 40, WIDTH)}
    with pytest.raises(PlanError):
        usual_facts(made, {"x": (2, 40, WIDTH + 1)})


def test_sizes_that_do_not_fit_leave_shapes_open():
    net = Net(0)
    y = net("Reshape", net.x(), [0, 6, 2, WIDTH])
    made = graph_of(net, net("Relu", y))
    assert y in evaluate(made, {"x": (1, 12, WIDTH)}).shapes
    assert y not in evaluate(made, {"x": (1, 13, WIDTH)}).shapes


def test_what_depends_on_the_data_stays_open():
    net = Net(0)
    places = net("NonZero", net.x())
    made = graph_of(
        net, net("Cast", net("Transpose", places), to=TensorProto.FLOAT), net("Relu", "x")
    )
    facts = evaluate(made, {"x": (1, 5, WIDTH)})
    assert places not in facts.shapes
    assert facts.shape(made.outputs[1]) == (1, 5, WIDTH)


@pytest.mark.parametrize(("batch", "times"), [(2, 1), ("batch", 3)])
def test_a_graph_is_walked_once_for_every_choice_of_sizes(monkeypatch, batch, times):
    """However often something stays open, for which other sizes are tried."""
    walked = []
    monkeypatch.setattr(
        shapes, "evaluate", lambda graph, sizes: walked.append(sizes) or evaluate(graph, sizes)
    )
    net = Net(0)
    made = graph_of(net, net("NonZero", net.x(batch, 5, WIDTH)), net("Relu", "x"))
    probed(made)
    assert len(walked) == times
    assert len({sizes["x"] for sizes in walked}) == times
    walked.clear()
    usual_facts(made)
    assert len(walked) == 1


def test_what_follows_from_an_unknown_operator_stays_open():
    net = Net(0)
    strange = net("Strange", net.x(), domain="other.domain")
    proto = net.build(net("Relu", "x"))
    proto.graph.output.append(onnx.helper.make_tensor_value_info(strange, TensorProto.FLOAT, None))
    facts = evaluate(from_proto(proto).graph, {"x": (1, 5, WIDTH)})
    assert strange not in facts.shapes
    assert len(facts.shapes) == 2


# Facts


def test_constants_are_known_by_themselves():
    made = from_proto(TINY["mlp"](0).proto).graph
    weight = made.nodes[0].inputs[1]
    facts = evaluate(made, {"x": (1, 5, WIDTH)})
    assert facts.shape(weight) == weight.values.shape
    assert np.array_equal(facts.value(weight), weight.values)
    assert facts.value(made.nodes[0].outputs[0]) is None
    assert facts.shape(made.inputs[0]) == (1, 5, WIDTH)


def test_only_what_is_the_same_at_all_sizes_is_constant():
    view, _ = view_of(from_proto(TINY["scale_at_run_time"](0).proto))
    made, probes = view.graph, view.probes
    shape = next(node.outputs[0] for node in made.nodes if node.op == "Shape")
    width = next(node.outputs[0] for node in made.nodes if node.op == "Slice")
    assert probes[0].value(shape).tolist() == [2, HEADS, 5, HEAD]
    assert view.known(shape) is None
    assert view.known(width).tolist() == [HEAD]
    assert view.known(made.inputs[0]) is None
    assert view.known(made.nodes[0].inputs[1]) is not None


def test_types_are_known():
    net = Net(0)
    flag = net.input("flag", "batch", dtype=np.bool_)
    opposite = net("Not", flag)
    made = graph_of(net, opposite, net("Relu", net.x()))
    facts = evaluate(made, {"flag": (2,), "x": (2, 5, WIDTH)})
    assert facts.dtype(made.inputs[0]) == facts.dtype(made.outputs[0]) == np.bool_
    assert facts.dtype(made.outputs[1]) == np.float32


def test_outputs_that_are_left_out_are_not_counted():
    net = Net(0)
    net("Dropout", net.x(), outputs=2)
    net.nodes[-1].output[1] = ""
    made = graph_of(net, net("Relu", net.nodes[-1].output[0]))
    assert tensor_count(made) == 3
    assert len(evaluate(made, {"x": (1, 5, WIDTH)}).shapes) == 3


def test_an_input_of_unknown_rank_takes_the_sizes_that_are_given():
    net = Net(0)
    proto = net.build(mlp(net, net.x(), relu))
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    model = from_proto(proto)
    assert not find_blocks(model).blocks
    catalog = find_blocks(model, {"x": (1, 9, WIDTH)})
    assert [block.id for block in catalog.blocks] == ["mlp.0"]
    assert catalog.sizes == {"x": (1, 9, WIDTH)}
