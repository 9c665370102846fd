"""What cannot be cut exactly is refused, axis by axis, with a reason."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from corp_onnx.blocks import Attention, axes_of, find_blocks
from corp_onnx.errors import QuantisedModel
from corp_onnx.graph.model import from_proto, load
from corp_onnx.report.results import catalog_json
from tests.builders import (
    HEAD,
    HEADS,
    HIDDEN,
    WIDTH,
    Net,
    merge_heads,
    mix,
    mlp,
    packed_split,
    projections,
    relu,
    residual_block,
    scaled,
    separate,
    softmax,
    split_heads,
)

SIZE = HEADS * HEAD


def catalog_of(net, *outputs):
    return find_blocks(from_proto(net.build(*outputs)))


def refused_attention(net, *outputs):
    """The axes of the only block, and why the others cannot be cut."""
    catalog = catalog_of(net, *outputs)
    (block,) = catalog.blocks
    assert isinstance(block, Attention)
    assert set(axes_of(block)) | set(block.refused) == {"qk", "vo"}
    return axes_of(block), block.refused


def reasons_of(net, *outputs):
    """All reasons by operator, of a model in which nothing is found."""
    catalog = catalog_of(net, *outputs)
    assert catalog.blocks == ()
    return by_operator(catalog)


def by_operator(catalog):
    operators = {refusal.op for refusal in catalog.refusals}
    return {op: [r.reason for r in catalog.refusals if r.op == op] for op in operators}


def says(text, reasons):
    return any(text in reason for reason in reasons)


# Attention: between projections and products


def rotated(net, y):
    """Half of every head turned by a constant table: ``y · cos + swapped(y) · sin``."""
    half = HEAD // 2
    first, second = net("Split", y, [half, half], outputs=2, axis=3)
    swapped = net("Concat", net("Neg", second), first, axis=3)
    table = net.random(1, 1, 1, HEAD)
    return net("Add", net("Mul", y, np.cos(table)), net("Mul", swapped, np.sin(table)))


def test_rotary_embedding_refuses_query_and_key_only():
    net = Net(0)
    query, key, value = separate(net)
    y = merge_heads(net, mix(net, rotated(net, query), rotated(net, key), value))
    axes, refused = refused_attention(net, y)
    assert axes == ("vo",)
    assert "the query is rotated by its position (rotary embedding)" in refused["qk"]


def test_a_rotary_operator_is_named():
    net = Net(0, opset=23)
    query, key, value = separate(net)
    tables = [net.const(net.random(7, HEAD // 2)) for _ in range(2)]
    places = net.input("places", "batch", "tokens", dtype=np.int64)
    turned = [net("RotaryEmbedding", y, *tables, places) for y in (query, key)]
    axes, refused = refused_attention(net, merge_heads(net, mix(net, *turned, value)))
    assert axes == ("vo",)
    assert "is rotated by its position (rotary embedding)" in refused["qk"]


@pytest.mark.parametrize("role", ["query", "key"])
def test_a_norm_of_query_or_key_refuses_these_only(role):
    net = Net(0)
    made = dict(zip(("query", "key", "value"), separate(net), strict=True))
    made[role] = net("LayerNormalization", made[role], net.random(HEAD))
    axes, refused = refused_attention(net, merge_heads(net, mix(net, *made.values())))
    assert axes == ("vo",)
    assert f"the {role} is normalised between the projection and the product" in refused["qk"]
    assert "LayerNormalization" in refused["qk"]


def test_a_norm_of_the_values_refuses_these_only():
    net = Net(0)
    query, key, value = separate(net)
    value = net("LayerNormalization", value, net.random(HEAD))
    axes, refused = refused_attention(net, merge_heads(net, mix(net, query, key, value)))
    assert axes == ("qk",)
    assert "the value is normalised" in refused["vo"]


def test_a_norm_of_the_mixed_values_refuses_these_only():
    net = Net(0)
    mixed = net("LayerNormalization", mix(net, *separate(net)), net.random(HEAD))
    axes, refused = refused_attention(net, merge_heads(net, mixed))
    assert axes == ("qk",)
    assert "LayerNormalization" in refused["vo"]
    assert "stands between the mixed values and a linear layer" in refused["vo"]


def test_a_scale_that_differs_between_tokens_is_refused():
    net = Net(0)
    net.x("batch", 5, WIDTH)
    query, key, value = separate(net)
    query = net("Mul", query, net.random(5, 1))
    axes, refused = refused_attention(net, merge_heads(net, mix(net, query, key, value)))
    assert axes == ("vo",)
    assert "the query is scaled or shifted differently from token to token" in refused["qk"]


def test_a_position_added_to_keys_is_refused():
    net = Net(0)
    net.x("batch", 5, WIDTH)
    query, key, value = separate(net)
    key = net("Add", key, net.random(5, HEAD))
    axes, refused = refused_attention(net, merge_heads(net, mix(net, query, key, value)))
    assert axes == ("vo",)
    assert "the key is scaled or shifted differently from token to token" in refused["qk"]


def test_a_scale_computed_from_the_data_is_refused():
    net = Net(0)
    query, key, value = separate(net)
    temperature = net("ReduceMean", "x", [1, 2], keepdims=0)
    query = net("Mul", query, net("Unsqueeze", temperature, [1, 2, 3]))
    axes, refused = refused_attention(net, merge_heads(net, mix(net, query, key, value)))
    assert axes == ("vo",)
    assert "Mul" in refused["qk"]


def test_keys_of_a_cache_are_refused():
    net = Net(0)
    query, key, value = separate(net)
    past = net.input("past", "batch", HEADS, "others", HEAD)
    past_value = net.input("past_value", "batch", HEADS, "others", HEAD)
    key, value = net("Concat", past, key, axis=2), net("Concat", past_value, value, axis=2)
    axes, refused = refused_attention(net, merge_heads(net, mix(net, query, key, value)))
    assert axes == ()
    cache = "is kept in a cache (graph input or output)"
    assert refused["qk"] == f"the key {cache}: 'past' is joined to it"
    assert refused["vo"] == f"the value {cache}: 'past_value' is joined to it"


def test_learned_queries_refuse_query_and_key_only():
    net = Net(0)
    _, key, value = separate(net)
    logits = net("MatMul", net.random(HEADS, 3, HEAD), net("Transpose", key, perm=[0, 1, 3, 2]))
    mixed = net("MatMul", softmax(net, logits), value)
    axes, refused = refused_attention(net, merge_heads(net, mixed))
    assert axes == ("vo",)
    assert "a product with a constant makes its logits" in refused["qk"]


@pytest.mark.parametrize("twice", ["query and key", "key and value"])
def test_operands_that_are_one_tensor_are_refused(twice):
    net = Net(0, opset=23)
    first, second, third = separate(net)
    operands = (first, first, third) if twice == "query and key" else (first, second, second)
    axes, refused = refused_attention(net, merge_heads(net, net("Attention", *operands)))
    assert axes == ()
    assert set(refused.values()) == {"queries, keys and values are not three different tensors"}


# Attention: other readers


def test_a_query_that_another_product_reads_is_refused_and_values_are_not():
    """Decomposed relative positions multiply the query with a table."""
    net = Net(0)
    query, key, value = separate(net)
    bias = net("MatMul", query, net.random(HEAD, 7))
    y = merge_heads(net, mix(net, query, key, value))
    axes, refused = refused_attention(net, y, bias)
    assert axes == ("vo",)
    assert refused["qk"].endswith("is also read by MatMul (MatMul_12)")


def test_a_query_that_is_an_output_is_refused_and_values_are_not():
    net = Net(0)
    query, key, value = separate(net)
    axes, refused = refused_attention(net, merge_heads(net, mix(net, query, key, value)), query)
    assert axes == ("vo",)
    assert refused["qk"] == f"{query!r} is an output of the model"


def test_values_that_something_else_reads_are_refused_and_queries_are_not():
    net = Net(0)
    query, key, value = separate(net)
    axes, refused = refused_attention(
        net, merge_heads(net, mix(net, query, key, value)), net("Exp", value)
    )
    assert axes == ("qk",)
    assert "is also read by Exp" in refused["vo"]


def test_another_reader_of_a_packed_projection_refuses_only_what_it_reads():
    net = Net(0)
    query, key, value = packed_split(net)
    y = merge_heads(net, mix(net, query, key, value))
    axes, refused = refused_attention(net, y, net("Exp", query))
    assert axes == ("vo",)
    assert "is also read by Exp" in refused["qk"]


def test_channels_that_are_read_in_another_form_as_well_are_refused():
    net = Net(0)
    query, key, value = packed_split(net)
    y = merge_heads(net, mix(net, query, key, value))
    axes, refused = refused_attention(
        net, y, net("Exp", net("Transpose", value, perm=[1, 0, 2, 3]))
    )
    assert axes == ("qk",)
    assert "is also read by Transpose" in refused["vo"]


def test_some_tokens_of_a_packed_projection_cannot_be_written_anew():
    net = Net(0)
    net.x("batch", 6, WIDTH)
    whole = net.linear("x", WIDTH, 3 * SIZE)
    made = net("Split", whole, [SIZE] * 3, outputs=3, axis=2)
    y = merge_heads(net, mix(net, *(split_heads(net, part) for part in made)))
    axes, refused = refused_attention(net, y, net("Exp", net("Slice", whole, [0], [3], [1])))
    assert axes == ()
    assert all("is also read by Slice" in reason for reason in refused.values())


def test_mixed_values_that_are_read_twice_are_refused():
    net = Net(0)
    mixed = mix(net, *separate(net))
    axes, refused = refused_attention(net, merge_heads(net, mixed), net("Exp", mixed))
    assert axes == ("qk",)
    assert "are read 2 times" in refused["vo"]


def test_mixed_values_whose_elements_are_counted_are_refused():
    net = Net(0)
    mixed = mix(net, *separate(net))
    count = net("Cast", net("Size", mixed), to=TensorProto.FLOAT)
    axes, refused = refused_attention(net, net("Div", merge_heads(net, mixed), count))
    assert axes == ("qk",)
    assert "the number of elements" in refused["vo"]


def hard_swish(net, y):
    return net("HardSwish", y)


def hard_swish_by_hand(net, y):
    """As converters for old opsets write it."""
    return net("Mul", y, net("HardSigmoid", y, alpha=1 / 6, beta=0.5))


def scaled_by_channel(net, y):
    return net("Mul", y, net.random(SIZE))


def normed_by_batch(net, y):
    """BatchNormalization between mixed values and projection, channels on axis 1."""
    turned = net("Transpose", y, perm=[0, 2, 1])
    vectors = [net.random(SIZE) for _ in range(3)]
    made = net("BatchNormalization", turned, *vectors, net.rng.uniform(0.5, 2, SIZE))
    return net("Transpose", made, perm=[0, 2, 1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hard_swish, "HardSwish (HardSwish_"),
        (hard_swish_by_hand, "are read 2 times (HardSigmoid HardSigmoid_"),
        (scaled_by_channel, "scales channels of the mixed values one by one"),
        (normed_by_batch, "BatchNormalization (BatchNormalization_"),
    ],
)
def test_what_treats_channels_of_mixed_values_apart_refuses_these_only(change, reason):
    """LeViT has an activation before its output projection: no linear map passes through it."""
    net = Net(0, opset=18)
    mixed = net("Transpose", mix(net, *separate(net)), perm=[0, 2, 1, 3])
    rows = net("Reshape", mixed, [0, 0, SIZE])
    axes, refused = refused_attention(net, net.linear(change(net, rows), SIZE, WIDTH))
    assert axes == ("qk",)
    assert reason in refused["vo"]


def test_an_attention_without_output_projection_keeps_its_values():
    net = Net(0)
    axes, refused = refused_attention(net, net("Exp", mix(net, *separate(net))))
    assert axes == ("qk",)
    assert "Exp" in refused["vo"]


# Attention: the logits


def between(change):
    net = Net(0)
    return net, merge_heads(net, mix(net, *separate(net), change))


def test_capped_logits_refuse_query_and_key_only():
    net, y = between(lambda net, logits: net("Mul", net("Tanh", scaled(net, logits)), 30.0))
    axes, refused = refused_attention(net, y)
    assert axes == ("vo",)
    assert "its logits pass through Tanh" in refused["qk"]


def test_the_soft_cap_of_the_operator_refuses_query_and_key_only():
    net = Net(0, opset=23)
    y = merge_heads(net, net("Attention", *separate(net), softcap=30.0))
    axes, refused = refused_attention(net, y)
    assert axes == ("vo",)
    assert "its logits are capped (softcap)" in refused["qk"]


def test_talking_heads_refuse_query_and_key_only():
    def talk(net, logits):
        last = net("MatMul", net("Transpose", logits, perm=[0, 2, 3, 1]), net.weight(HEADS, HEADS))
        return net("Transpose", last, perm=[0, 3, 1, 2])

    for change, op in (
        (talk, "MatMul"),
        (lambda net, y: net("Conv", y, net.random(HEADS, HEADS, 1, 1)), "Conv"),
    ):
        axes, refused = refused_attention(*between(change))
        assert axes == ("vo",)
        assert f"its logits are mixed across heads by {op}" in refused["qk"]


def test_logits_from_two_products_refuse_query_and_key_only():
    """A content term and a term of positions: disentangled attention."""
    net = Net(0)
    query, key, value = separate(net)

    def add(net, logits):
        table = net("Transpose", split_heads(net, net.linear("x", WIDTH, SIZE)), perm=[0, 1, 3, 2])
        return net("Add", logits, net("MatMul", query, table))

    axes, refused = refused_attention(net, merge_heads(net, mix(net, query, key, value, add)))
    assert axes == ("vo",)
    assert "two products of activations meet in its logits" in refused["qk"]


def test_a_classifier_is_no_attention():
    net = Net(0)
    y = net("Softmax", net.linear(net("ReduceMean", net.x(), [1], keepdims=0), WIDTH, 3), axis=-1)
    assert says("a classifier's Softmax", reasons_of(net, y)["Softmax"])


def softmax_over(net, logits, *, axis, written_out):
    if not written_out:
        return net("Softmax", logits, axis=axis)
    powers = net("Exp", logits)
    return net("Div", powers, net("ReduceSum", powers, [axis], keepdims=1))


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_softmax_over_samples_or_heads_refuses_query_and_key_only(axis, written_out):
    net = Net(0)
    query, key, value = separate(net)
    logits = scaled(net, net("MatMul", query, net("Transpose", key, perm=[0, 1, 3, 2])))
    weights = softmax_over(net, logits, axis=axis, written_out=written_out)
    axes, refused = refused_attention(net, merge_heads(net, net("MatMul", weights, value)))
    assert axes == ("vo",)
    assert refused["qk"] == "its Softmax does not run over queries or keys"


def test_probabilities_that_enter_two_products_are_refused():
    net = Net(0)
    query, key, value = separate(net)
    other = split_heads(net, net.linear("x", WIDTH, SIZE))
    logits = scaled(net, net("MatMul", query, net("Transpose", key, perm=[0, 1, 3, 2])))
    weights = softmax(net, logits)
    y = merge_heads(net, net("MatMul", weights, value))
    reasons = reasons_of(net, y, net("MatMul", weights, other))
    assert says("enter more than one product", reasons["Softmax"])


def test_an_operator_with_a_cache_is_refused():
    net = Net(0, opset=23)
    made = separate(net)
    past = [net.input(name, "batch", HEADS, "others", HEAD) for name in ("past_k", "past_v")]
    y, *present = net("Attention", *made, "", *past, outputs=3)
    reasons = reasons_of(net, merge_heads(net, y), *present)
    assert says("kept in a cache", reasons["Attention"])


# MLPs


def hidden_of(net):
    return relu(net, net.linear(net.x(), WIDTH, HIDDEN))


def test_a_hidden_tensor_that_something_else_reads_is_refused():
    net = Net(0)
    hidden = hidden_of(net)
    y = net.linear(hidden, HIDDEN, WIDTH)
    reasons = reasons_of(net, y, net("ReduceMax", hidden, [2]))
    assert says(f"its hidden tensor {hidden!r} is also read by ReduceMax", reasons["Linear"])


def test_a_hidden_tensor_with_two_readers_below_is_refused():
    net = Net(0)
    hidden = hidden_of(net)
    reasons = reasons_of(net, *(net.linear(hidden, HIDDEN, WIDTH) for _ in range(2)))
    assert says("is also read by MatMul", reasons["Linear"])


def test_a_hidden_tensor_that_is_an_output_is_refused():
    net = Net(0)
    hidden = hidden_of(net)
    reasons = reasons_of(net, net.linear(hidden, HIDDEN, WIDTH), hidden)
    assert says(f"its hidden tensor {hidden!r} is an output of the model", reasons["Linear"])


def test_a_product_that_is_an_output_before_its_bias_is_refused():
    net = Net(0)
    product = net("MatMul", net.x(), net.weight(WIDTH, HIDDEN))
    hidden = relu(net, net("Add", product, net.random(HIDDEN)))
    reasons = reasons_of(net, net.linear(hidden, HIDDEN, WIDTH), product)
    assert says(f"its hidden tensor {product!r} is an output of the model", reasons["Linear"])


@pytest.mark.parametrize("op", ["LayerNormalization", "Softmax", "CumSum"])
def test_an_operator_that_mixes_hidden_channels_is_refused(op):
    net = Net(0)
    hidden = hidden_of(net)
    extra = {"LayerNormalization": [net.random(HIDDEN)], "Softmax": [], "CumSum": [np.int64(2)]}
    mixed = net(op, hidden, *extra[op])
    reasons = reasons_of(net, net.linear(mixed, HIDDEN, WIDTH))
    assert says(f"through {op}", reasons["Linear"])


def test_weights_that_are_no_matrices_are_refused():
    """Experts stacked in one tensor."""
    net = Net(0)
    net.x("batch", 3, "tokens", WIDTH)
    hidden = relu(net, net("MatMul", "x", net.random(3, WIDTH, HIDDEN)))
    reasons = reasons_of(net, net("MatMul", hidden, net.random(3, HIDDEN, WIDTH)))
    assert says("is 3-D, no matrix", reasons["MatMul"])


def test_a_transposed_activation_is_refused():
    net = Net(0)
    net.x(WIDTH, "batch")
    y = net("Gemm", "x", net.weight(WIDTH, HIDDEN), transA=1)
    reasons = reasons_of(net, net("Gemm", relu(net, y), net.weight(HIDDEN, WIDTH)))
    assert says("enters transposed (transA = 1)", reasons["Gemm"])


def test_a_constant_on_the_left_is_refused():
    net = Net(0)
    y = net("MatMul", net.random(HIDDEN, WIDTH), net.x("batch", WIDTH, "tokens"))
    y = net("MatMul", net.random(WIDTH, HIDDEN), relu(net, y))
    assert says("multiplies from the left", reasons_of(net, y)["MatMul"])


def test_a_gemm_that_adds_an_activation_is_refused():
    """The residual stream enters as the third operand: it is no bias."""
    net = Net(0)
    hidden = relu(net, net("Gemm", net.x("batch", WIDTH), net.weight(WIDTH, HIDDEN)))
    y = net("Gemm", hidden, net.weight(HIDDEN, WIDTH), "x")
    assert says("adds 'x', which is no constant vector", reasons_of(net, y)["Gemm"])


def test_large_layers_in_no_block_are_mentioned_and_small_ones_are_not():
    net = Net(0)
    y = residual_block(net, net.x())
    wide = net.linear(net("Softplus", y), WIDTH, 4 * WIDTH)
    first = net("Gather", y, np.int64(0), axis=1)
    (refusal,) = catalog_of(net, wide, net.linear(first, WIDTH, 2)).refusals
    assert refusal.op == "Linear"
    assert "outputs are the hidden channels of no other layer" in refusal.reason


def test_weights_that_the_data_pick_are_mentioned():
    """As those of experts are: a router gives every token its matrix."""
    net = Net(0)
    router = net("ArgMax", net.linear(net.x(), WIDTH, 2), axis=2, keepdims=0)
    experts = net.const(net.random(2, WIDTH, WIDTH))
    picked = net("Transpose", net("Gather", experts, router, axis=0), perm=[0, 1, 3, 2])
    y = net("MatMul", net("Unsqueeze", "x", [2]), picked)
    (reason,) = reasons_of(net, net("Squeeze", y, [2]))["MatMul"]
    assert f"picked from {experts!r} at run time (Gather Gather_" in reason


def test_queries_that_the_data_pick_are_no_weight():
    """Embeddings that attend as they are: the product is that of an attention."""
    net = Net(0)
    net.x()
    rows = net.const(net.random(8, SIZE))
    ids = net.input("ids", "batch", "tokens", dtype=np.int64)
    query = split_heads(net, net("Gather", rows, ids, axis=0))
    _, key, value = (split_heads(net, y) for y in projections(net))
    catalog = catalog_of(net, merge_heads(net, mix(net, query, key, value)))
    (block,) = catalog.blocks
    assert axes_of(block) == ("vo",)
    assert "MatMul" not in by_operator(catalog)


def test_products_of_unknown_size_are_mentioned_and_told_to_be_in_no_count():
    """Rows that the data pick, as those that an expert gets: nobody knows how many they are."""
    net = Net(0)
    y = mlp(net, net.x("tokens", WIDTH), relu)
    chosen = net("Squeeze", net("NonZero", net("ReduceMax", y, [1], keepdims=0)), [0])
    rows = net("Gather", y, chosen, axis=0)
    alone = net.linear(net("Softplus", rows), WIDTH, WIDTH)
    catalog = catalog_of(net, y, alone)
    assert len(catalog.blocks) == 1
    (refusal,) = catalog.refusals
    assert refusal.op == "Linear"
    assert catalog.uncounted == (refusal.node,)
    assert catalog.macs == catalog.macs_prunable
    (note,) = catalog_json(catalog)["notes"]
    assert refusal.node in note


# Whole models


def test_blocks_inside_a_branch_are_left_as_they_are():
    net = Net(0)
    inner = Net(1)
    y = mlp(inner, net.x(), relu)
    body = helper.make_graph(
        inner.nodes, "body", [], [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
        inner.tensors,
    )  # fmt: skip
    condition = net("Greater", net("ReduceMax", "x", keepdims=0), 0.0)
    outcome = net("If", condition, then_branch=body, else_branch=renamed(body))
    catalog = catalog_of(net, net("Add", outcome, mlp(net, "x", relu)))
    assert [block.id for block in catalog.blocks] == ["mlp.0"]
    assert len(catalog.refusals) == 4
    holder = {"it lies inside the body of If (If_2), which is left as it is"}
    assert {refusal.reason for refusal in catalog.refusals} == holder


def renamed(body):
    """A copy of a branch with names of its own, as ONNX asks for."""
    other = onnx.GraphProto()
    other.CopyFrom(body)
    for node in other.node:
        node.name += "'"
        node.input[:] = [name if name == "x" else f"{name}'" for name in node.input]
        node.output[:] = [f"{name}'" for name in node.output]
    for value in (*other.output, *other.initializer):
        value.name += "'"
    return other


@pytest.mark.parametrize("op", ["DequantizeLinear", "MatMulInteger"])
def test_quantised_models_are_refused_on_loading(op, tmp_path):
    net = Net(0)
    if op == "DequantizeLinear":
        rows = net(op, net.input("x", "batch", WIDTH, dtype=np.int8), 0.1, np.int8(0))
        y = net("MatMul", rows, net.weight(WIDTH, HIDDEN))
    else:
        net.input("x", "batch", WIDTH, dtype=np.uint8)
        y = net(op, "x", np.ones((WIDTH, HIDDEN), np.uint8))
    onnx.save(net.build(y), tmp_path / "int8.onnx")
    with pytest.raises(QuantisedModel, match=f"it holds {op}.*quantise the result"):
        load(tmp_path / "int8.onnx")


def test_a_model_that_runs_at_one_batch_only_is_refused_without_a_crash():
    """Four samples are baked into targets although the input says otherwise."""
    net = Net(0)
    hidden = net("Reshape", hidden_of(net), [4 * 5, HIDDEN])
    y = net("Reshape", net.linear(hidden, HIDDEN, WIDTH), [4, 5, WIDTH])
    made = [net("Reshape", part, [4, 5, HEADS, HEAD]) for part in projections(net, y)]
    operands = [net("Transpose", part, perm=[0, 2, 1, 3]) for part in made]
    reasons = reasons_of(net, merge_heads(net, mix(net, *operands)))
    assert says("its size is not known", reasons["Softmax"])
    assert says("its size is not known", reasons["Linear"])


def test_weights_that_contradict_each_other_are_refused_with_both_widths():
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 17]>
        mlp (float[b, 4, 8] x) => (float[b, 4, 8] y)
        <float[8, 16] up = {}, float[12, 8] down = {}>
        { h = MatMul(x, up)  r = Relu(h)  y = MatMul(r, down) }
    """.replace("{}", "{0}")
    )
    for weight, shape in zip(model.graph.initializer, ((8, 16), (12, 8)), strict=True):
        weight.CopyFrom(onnx.numpy_helper.from_array(np.ones(shape, np.float32), weight.name))
    catalog = find_blocks(from_proto(model))
    assert not catalog.blocks
    assert "its input has 16 channels, its weight 12 rows" in [r.reason for r in catalog.refusals]


def pointwise(net, x, rows, columns, stride):
    kernel = net.random(columns, rows, 1, 1)
    return net("Conv", x, kernel, net.random(columns), kernel_shape=[1, 1], strides=[stride] * 2)


def test_an_mlp_that_leaves_tokens_out_at_its_end_is_refused_and_at_its_beginning_is_not():
    for up, down in ((2, 1), (1, 2)):
        net = Net(0)
        x = net.x("batch", WIDTH, 8, 8)
        hidden = relu(net, pointwise(net, x, WIDTH, HIDDEN, up))
        catalog = catalog_of(net, pointwise(net, hidden, HIDDEN, WIDTH, down))
        assert len(catalog.blocks) == (down == 1)
        refused = [refusal.reason for refusal in catalog.refusals]
        assert says("leaves tokens out (strides)", refused) == (down == 2)


def test_an_output_projection_that_leaves_tokens_out_keeps_its_values():
    net = Net(0)
    rows = mix(net, *separate(net))
    image = net("Reshape", net("Transpose", rows, perm=[0, 1, 3, 2]), [0, SIZE, -1, 1])
    axes, refused = refused_attention(net, pointwise(net, image, SIZE, WIDTH, 2))
    assert axes == ("qk",)
    assert "leaves tokens out" in refused["vo"]


def test_a_product_of_two_constants_is_mentioned_as_one():
    net = Net(0)
    table = net("MatMul", net.random(WIDTH, WIDTH), net.weight(WIDTH, WIDTH))
    y = net("Add", mlp(net, net.x(), relu), net("Tanh", net("Slice", table, [0], [1], [0])))
    catalog = catalog_of(net, y)
    assert len(catalog.blocks) == 1
    (refusal,) = catalog.refusals
    assert refusal.op == "MatMul"
    assert "multiplies constants alone" in refusal.reason
