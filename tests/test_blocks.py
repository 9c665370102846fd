"""Every way of writing a block is found, with its widths, and nothing else is."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import onnx
import pytest

from corp_onnx.blocks import Attention, Mlp, axes_of, find_blocks, linears_of, width_of
from corp_onnx.blocks.catalog import view_of
from corp_onnx.blocks.layouts import arrange
from corp_onnx.blocks.records import Mask
from corp_onnx.errors import PlanError
from corp_onnx.graph.model import from_proto
from corp_onnx.graph.shapes import evaluate
from corp_onnx.graph.sizes import input_sizes
from tests.builders import (
    HEAD,
    HEADS,
    HIDDEN,
    TINY,
    WIDTH,
    Net,
    feeds,
    merge_heads,
    mix,
    mlp,
    projections,
    relu,
    scaled,
    separate,
    sizes_of,
    split_heads,
)
from tests.full_width import run

ALL = pytest.mark.parametrize("name", TINY)
ATTENTIONS = [name for name in TINY if "attention" in str(TINY[name](0).truth)]

LEFT = {
    "mlp_tied": ["its input follows from 'x', which no layer computes"],
    "tied_attention": ["its input follows from 'x', which no layer computes"],
    "transformer": ["a classifier's Softmax"],
}
"""Models that hold more than blocks, and what is said of the rest."""

MASKS = {
    "mask_added": "added",
    "mask_keeps": "keeps",
    "mask_drops": "drops",
    "operator_mask": "keeps",
    "text_encoder": "added",
}


@cache
def model_of(name):
    return from_proto(TINY[name](0).proto)


@cache
def catalog_of(name):
    return find_blocks(model_of(name))


def catalog_of_net(net, *outputs):
    return find_blocks(from_proto(net.build(*outputs)))


def summary(block):
    if isinstance(block, Mlp):
        return ("mlp", block.width)
    return ("attention", block.heads, block.head_width, block.value_width, axes_of(block))


@ALL
@pytest.mark.parametrize("seed", [0, 1])
def test_the_catalog_is_the_truth(name, seed):
    tiny = TINY[name](seed)
    catalog = find_blocks(from_proto(tiny.proto))
    assert tuple(map(summary, catalog.blocks)) == tiny.truth
    assert len({block.id for block in catalog.blocks}) == len(catalog.blocks)
    reasons = [refusal.reason for refusal in catalog.refusals]
    assert len(reasons) == len(LEFT.get(name, []))
    for reason, expected in zip(reasons, LEFT.get(name, []), strict=True):
        assert expected in reason


@ALL
def test_records_name_what_is_in_the_graph(name):
    model = model_of(name)
    nodes = {node.name for node in model.graph.nodes}
    tensors = set(model.graph.tensors())
    for block in catalog_of(name).blocks:
        for linear in linears_of(block):
            assert {linear.node, linear.bias_node or linear.node} <= nodes
            assert {linear.input, linear.output} <= tensors
        if isinstance(block, Mlp):
            assert block.hidden in tensors
            assert {vector.node for vector in block.vectors} <= nodes
        else:
            assert block.anchor in nodes
            assert {block.query.operand, block.key.operand, block.value.operand} <= tensors
        assert all(width_of(block, axis) > 1 for axis in axes_of(block))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_route_says_what_becomes_of_a_projection(name):
    """``gain · y[channels] + offset``, laid out as the route says, is the operand."""
    proto = TINY[name](3).proto
    *_, (batch, tokens) = sizes_of(name)
    inputs = feeds(proto, batch, tokens)
    block = next(b for b in find_blocks(from_proto(proto)).blocks if isinstance(b, Attention))
    for route in (block.query, block.key, block.value):
        y, operand = tensors_of(proto, inputs, [route.linear.output, route.operand])
        rows = route.gain * y[..., route.channels] + route.offset
        if route.layout.split is not None:
            rows = rows.reshape(*inputs["x"].shape[:2], *rows.shape[-2:])
        difference = arrange(route.layout, rows, operand.shape) - operand
        assert np.abs(difference).max() < (1e-2 if operand.dtype == np.float16 else 1e-5)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_places_are_all_heads_and_positions(name):
    for block in catalog_of(name).blocks:
        if isinstance(block, Attention) and block.output is not None:
            places = set(map(tuple, block.output.places.tolist()))
            assert len(block.output.places) == block.output.linear.width_in
            assert places == {(h, i) for h in range(block.heads) for i in range(block.value_width)}


def tensors_of(proto, inputs, names):
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    (made,) = run(shown, inputs)
    return [made[name] for name in names]


def test_heads_of_a_position_major_layer_are_interleaved():
    (block,) = catalog_of("position_major").blocks
    expected = np.arange(HEADS * HEAD).reshape(HEAD, HEADS).T
    assert np.array_equal(block.query.channels, expected)
    assert np.array_equal(block.key.channels, expected)


def test_packed_projections_lie_behind_one_another():
    (block,) = catalog_of("packed_split").blocks
    size = HEADS * HEAD
    for index, route in enumerate((block.query, block.key, block.value)):
        expected = index * size + np.arange(size).reshape(HEADS, HEAD)
        assert np.array_equal(route.channels, expected)
    assert len(linears_of(block)) == 2


def test_scales_on_the_way_are_gains():
    (block,) = catalog_of("scale_on_both").blocks
    for route, gain in ((block.query, 0.7), (block.key, 0.6), (block.value, 2.0)):
        np.testing.assert_allclose(route.gain, gain, rtol=1e-6)
        assert not route.offset.any()


def test_a_bias_behind_the_split_into_heads_is_an_offset():
    (block,) = catalog_of("late_bias").blocks
    for route in (block.query, block.key, block.value):
        assert len(np.unique(route.offset)) == HEADS * HEAD
        assert np.all(route.gain == 1)


def test_a_scale_computed_from_shapes_is_frozen_at_its_dense_value():
    for name in ("scale_at_run_time", "attention_half"):
        (block,) = catalog_of(name).blocks
        (scalar,) = block.frozen
        value = scalar.value if name == "scale_at_run_time" else 1 / scalar.value
        assert value == pytest.approx(HEAD**-0.5, rel=1e-3)
    (block,) = catalog_of("scale_divided").blocks
    assert block.frozen == ()


@ALL
def test_padding_is_found_where_it_is_and_with_its_kind(name):
    for block in catalog_of(name).blocks:
        if name not in MASKS:
            assert block.padding is None
        else:
            assert isinstance(block.padding, Mask)
            assert block.padding.kind == MASKS[name]
            assert block.padding.tensor in model_of(name).graph.tensors()


def test_a_mask_without_recorded_type_is_known_to_be_boolean():
    net = Net(0, opset=23)
    made = separate(net)
    keeps = net("Not", net.input("drops", "batch", 1, "tokens", "tokens", dtype=np.bool_))
    catalog = catalog_of_net(net, merge_heads(net, net("Attention", *made, keeps)))
    assert catalog.blocks[0].padding == Mask(keeps, "keeps", HEADS)


def test_a_mask_that_is_the_same_for_all_data_is_no_padding():
    net = Net(0)
    query, key, value = separate(net)
    length = net("Shape", "x", start=1, end=2)
    ones = net("ConstantOfShape", net("Concat", length, length, axis=0))
    causal = net("Mul", net("Trilu", net("Add", ones, 1.0), upper=0), 5.0)
    y = mix(net, query, key, value, lambda net, y: net("Add", scaled(net, y), causal))
    (block,) = catalog_of_net(net, merge_heads(net, y)).blocks
    assert block.padding is None
    assert axes_of(block) == ("qk", "vo")


def test_names_of_nodes_and_tensors_say_nothing():
    for name in TINY:
        proto = TINY[name](0).proto
        renamed, names = with_other_names(proto)
        before, after = (find_blocks(from_proto(p)) for p in (proto, renamed))
        assert plain(before, names) == plain(after, {}), name


def with_other_names(proto):
    """A copy in which every node and every tensor has another, meaningless name."""
    names = {}
    other = onnx.ModelProto()
    other.CopyFrom(proto)

    def new(name):
        return names.setdefault(name, f"n{len(names) * 7919 % 10007}") if name else name

    for node in other.graph.node:
        node.name = new(node.name)
        node.input[:] = map(new, node.input)
        node.output[:] = map(new, node.output)
    for value in (*other.graph.input, *other.graph.output, *other.graph.initializer):
        value.name = new(value.name)
    return other, names


def plain(value, names):
    """Records as lists, with names replaced; what quotes names or looks like one is left out."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if dataclasses.is_dataclass(value):
        fields = [
            f.name for f in dataclasses.fields(value) if f.name not in {"reason", "refused", "kind"}
        ]
        return [plain(getattr(value, field), names) for field in fields]
    if isinstance(value, dict):
        return {plain(key, names): plain(item, names) for key, item in value.items()}
    return [plain(item, names) for item in value] if isinstance(value, tuple) else value


def test_the_model_is_not_changed():
    for name in ("transformer", "mlp_indirect_weights", "packed_split"):
        model = model_of(name)
        before = model.proto().SerializeToString(deterministic=True)
        find_blocks(model)
        assert model.proto().SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", ["separate", "mlp_gemm", "text_encoder", "operator"])
def test_the_catalog_does_not_depend_on_the_sizes_asked_for(name):
    model = model_of(name)
    usual = find_blocks(model)
    key, rank = next((t.name, len(t.shape)) for t in model.graph.inputs)
    asked = find_blocks(model, {key: (4, 9, WIDTH)[:rank]})
    assert tuple(map(summary, asked.blocks)) == tuple(map(summary, usual.blocks))
    assert asked.sizes[key] == (4, 9, WIDTH)[:rank]
    assert asked.macs != usual.macs


def test_sizes_that_do_not_fit_are_said_to():
    model = model_of("separate")
    with pytest.raises(PlanError, match=r"shape \['\?', '\?', 10\], which \[1, 5, 11\]"):
        find_blocks(model, {"x": (1, 5, 11)})
    with pytest.raises(PlanError, match="inputs of the model are x"):
        find_blocks(model, {"y": (1, 5, 10)})


def test_counts_are_those_of_the_model():
    catalog = catalog_of("mlp")
    assert catalog.sizes == {"x": (1, 128, WIDTH)}
    assert catalog.macs == catalog.macs_prunable == 128 * 2 * WIDTH * HIDDEN
    assert catalog.params == 2 * WIDTH * HIDDEN + WIDTH + HIDDEN
    (attention,) = catalog_of("without_output").blocks
    assert axes_of(attention) == ("qk",)


def test_every_shape_of_a_tiny_model_is_known_at_both_probes():
    for name in TINY:
        view, _ = view_of(model_of(name))
        for node in view.graph.nodes:
            for tensor in node.outputs:
                assert all(facts.shape(tensor) is not None for facts in view.probes), name


def test_probes_differ_in_batch_and_sequence():
    view, _ = view_of(model_of("separate"))
    (first,), (second,) = ([*facts.sizes.values()] for facts in view.probes)
    assert all(one != other for one, other in zip(first[:2], second[:2], strict=True))


def test_blocks_come_in_the_order_of_the_graph_and_masks_hold_for_what_follows():
    net = Net(0)
    before = net("Add", "x", mlp(net, net.x(), relu))
    operands = [split_heads(net, y) for y in projections(net, before)]
    mask = net.input("added", "batch", 1, 1, "tokens")
    y = merge_heads(net, mix(net, *operands, lambda net, y: net("Add", scaled(net, y), mask)))
    y = net("Add", before, y)
    catalog = catalog_of_net(net, net("Add", y, mlp(net, y, relu)))
    assert [block.id for block in catalog.blocks] == ["mlp.0", "attention.0", "mlp.1"]
    assert [block.padding for block in catalog.blocks] == [
        None,
        *[Mask("added", "added", HEADS)] * 2,
    ]


@pytest.mark.parametrize("joined", [True, False], ids=["a decoder", "a tower of its own"])
def test_masks_go_with_the_tokens_and_not_with_the_order_of_the_graph(joined):
    """Two streams written in turns: every block has the mask of its own, or none."""
    net = Net(0)
    mask = net.input("added", "batch", 1, 1, "tokens")
    x, y = net.x(), net.input("y", "batch", "tokens", WIDTH)

    def attend(x, context, logits):
        operands = [net.linear(z, WIDTH, HEADS * HEAD) for z in (x, context, context)]
        heads = [split_heads(net, z) for z in operands]
        return net("Add", x, merge_heads(net, mix(net, *heads, logits)))

    behind = attend(x, x, lambda net, y: net("Add", scaled(net, y), mask))
    y = attend(y, y, scaled)
    of_x = {x, behind}
    x = net("Add", behind, mlp(net, behind, relu))
    y = net("Add", y, mlp(net, y, relu))
    if joined:
        like_x = net("Reshape", y, net("Concat", net("Shape", x), axis=0))  # a size, no token
        y = attend(net("Relu", like_x), x, scaled)
        y = net("Add", y, mlp(net, y, relu))
    else:
        y = net("Concat", x, y, axis=1)
    blocks = catalog_of_net(net, y).blocks
    assert len(blocks) == (6 if joined else 4)
    for block in blocks:
        entry = block.sources[0].linear if isinstance(block, Mlp) else block.query.linear
        assert (block.padding is not None) == (entry.input in of_x), block.id


@pytest.mark.parametrize("masked", [True, False], ids=["masked keys", "all keys seen"])
@pytest.mark.parametrize("alone", [True, False], ids=["first in the graph", "behind itself"])
def test_a_mask_of_what_is_attended_to_hides_nobody_who_asks(alone, masked):
    """Keys of a cross-attention are tokens of their own; the rest has the mask of before."""
    net = Net(0)
    own, theirs = (net.input(name, "batch", 1, 1, "tokens") for name in ("added", "added_of_them"))
    x, context = net.x(), net.input("context", "batch", "tokens", WIDTH)

    def attend(x, context, mask):
        operands = [net.linear(y, WIDTH, HEADS * HEAD) for y in (x, context, context)]
        heads = [split_heads(net, y) for y in operands]
        logits = (lambda net, y: net("Add", scaled(net, y), mask)) if mask else scaled
        return net("Add", x, merge_heads(net, mix(net, *heads, logits)))

    x = x if alone else attend(x, x, own)
    x = attend(net("Relu", x), context, theirs if masked else None)
    read = ({theirs} if masked else set()) | (set() if alone else {own})
    net.inputs = [value for value in net.inputs if "added" not in value.name or value.name in read]
    *_, cross, behind = catalog_of_net(net, net("Add", x, mlp(net, x, relu))).blocks
    mask = None if alone else Mask(own, "added", HEADS)
    assert cross.padding == behind.padding == mask
    assert cross.key_padding == (Mask(theirs, "added", HEADS) if masked else None)


@pytest.mark.parametrize("apart", [False, True], ids=["one tensor", "positions added to each"])
def test_self_attention_hides_the_same_tokens_on_both_sides(apart):
    net = Net(0)
    x = net.linear(net.x(), WIDTH, WIDTH)
    mask = net.input("added", "batch", 1, 1, "tokens")
    query, key = (net("Add", x, net.random(WIDTH)) if apart else x for _ in range(2))
    operands = [net.linear(y, WIDTH, HEADS * HEAD) for y in (query, key, x)]
    heads = [split_heads(net, y) for y in operands]
    mixed = mix(net, *heads, lambda net, y: net("Add", scaled(net, y), mask))
    (block,) = catalog_of_net(net, merge_heads(net, mixed)).blocks
    assert block.padding == block.key_padding == Mask(mask, "added", HEADS)


def test_a_head_of_width_one_with_a_single_number_as_bias_is_a_linear_layer():
    """A score of every token, as attention pooling has it."""
    net = Net(0)
    score = net("Add", net("MatMul", net.x(), net.weight(WIDTH, 1)), np.float32(0.3))
    catalog = catalog_of_net(net, mlp(net, net("Mul", "x", net("Sigmoid", score)), relu))
    assert [summary(block) for block in catalog.blocks] == [("mlp", HIDDEN)]


def test_inputs_of_a_4d_mask_are_no_images():
    sizes = input_sizes(model_of("mask_added").graph, batch=2, sequence=9)
    assert sizes == {"x": (2, 9, WIDTH), "added": (2, 1, 1, 9)}
    facts = evaluate(model_of("mask_added").graph, sizes)
    assert facts.shape(model_of("mask_added").graph.outputs[0]) == (2, 9, WIDTH)
