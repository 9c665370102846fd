"""Attention beyond the plain form: found for what it is, and cut exactly."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest

from corp_onnx.blocks import Attention, axes_of, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.calibration.moments import Moments
from corp_onnx.errors import SurgeryError
from corp_onnx.graph.extracts import exposed
from corp_onnx.graph.model import from_proto
from corp_onnx.graph.operators import MICROSOFT
from corp_onnx.plan import uniform
from corp_onnx.solve import METHODS, Recipe, solve
from corp_onnx.solve.bilinear import recover_query_key
from corp_onnx.solve.folds import QueryKeyFold, ValueOutputFold
from corp_onnx.solve.ranking import highest, score
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from corp_onnx.verify.promise import measured_errors
from tests.attention_builders import (
    GROUPED,
    HEAD,
    HEADS,
    KV_HEADS,
    MORE,
    built,
    heads_in_batch,
    in_windows,
    linears,
    merged,
    plain,
    products,
    separate,
    split,
)
from tests.builders import VALUE, WIDTH, Net, feeds, softmax
from tests.full_width import narrowed, padded, run, squared_error, unchanged
from tests.tolerances import rounding

ALL = pytest.mark.parametrize("name", MORE)
SIZES = ((1, 5), (3, 7))

BOUND = 1e-10
"""Of ``‖ŷ - y‖² / ‖y‖²``: a relative error of 1e-5, rounding in float32 of a few hundred terms."""

VISIBLE = 1e-6
"""Errors of wrong results are at least as large."""

ROUNDING = rounding(width=200, dtype=np.float32)


@cache
def found(name):
    model = from_proto(MORE[name](0).proto)
    return model, find_blocks(model)


def inputs_of(name):
    return [feeds(MORE[name](0).proto, *size) for size in SIZES]


def errors(actual, expected, name):
    pairs = zip(run(actual, *inputs_of(name)), run(expected, *inputs_of(name)), strict=True)
    return [squared_error(*pair) for pair in pairs]


def attentions(catalog):
    return [block for block in catalog.blocks if isinstance(block, Attention)]


def summary(block):
    sizes = (block.heads, block.kv_heads, block.head_width, block.value_width)
    return ("attention", *sizes, axes_of(block))


@ALL
@pytest.mark.parametrize("seed", [0, 1])
def test_the_catalog_is_the_truth(name, seed):
    tiny = MORE[name](seed)
    catalog = find_blocks(from_proto(tiny.proto))
    found = [summary(block) for block in attentions(catalog)]
    truth = [
        (*entry[:3], block.head_width, *entry[4:])  # that of refused queries is not looked up
        if "qk" not in entry[-1]
        else entry
        for entry, block in zip(tiny.truth, catalog.blocks, strict=False)
    ]
    assert found == truth


@ALL
@pytest.mark.parametrize("make", [unchanged, turned])
def test_keeping_every_channel_gives_back_the_dense_function(name, make):
    model, catalog = found(name)
    made = operate(model, catalog, make(model, catalog)).model
    onnx.checker.check_model(made.proto(), full_check=True)
    assert max(errors(made, model, name)) <= BOUND


@ALL
def test_every_axis_can_be_turned_alone(name):
    model, catalog = found(name)
    full = turned(model, catalog)
    for fold in full.folds:
        made = operate(model, catalog, replace(full, folds=(fold,))).model
        assert max(errors(made, model, name)) <= BOUND


@ALL
def test_a_narrow_cut_computes_what_zeros_at_full_width_do(name):
    model, catalog = found(name)
    full = turned(model, catalog)
    small = operate(model, catalog, narrowed(full, 0.5)).model
    large = operate(model, catalog, padded(full, 0.5)).model
    assert max(errors(small, large, name)) <= BOUND
    assert min(errors(small, model, name)) > VISIBLE


@ALL
def test_the_result_can_be_cut_again(name):
    model, catalog = found(name)
    small = operate(model, catalog, narrowed(turned(model, catalog), 0.5)).model
    again = find_blocks(small)
    pairs = zip(attentions(catalog), attentions(again), strict=True)
    for before, after in pairs:
        assert axes_of(before) == axes_of(after)
        assert (after.heads, after.kv_heads) == (before.heads, before.kv_heads)
        halves = {"qk": before.head_width // 2, "vo": before.value_width // 2}
        now = {"qk": after.head_width, "vo": after.value_width}
        assert all(now[axis] == halves[axis] for axis in axes_of(before))
    made = operate(small, again, turned(small, again, seed=1)).model
    assert max(errors(made, small, name)) <= BOUND


# Statistics and solving


@cache
def solved(name, method="corp"):
    model, catalog = found(name)
    batches = [feeds(MORE[name](0).proto, 4, 9, seed) for seed in range(3)]
    statistics = gather(model, catalog, batches)
    plan = uniform(catalog, {"mlp": 0.0, "qk": 0.5}, align=1)
    return batches, statistics, solve(model, catalog, plan, statistics, Recipe(method))


READS = {
    "expanded": [0, 0, 1, 1],
    "gathered": [0, 0, 1, 1],
    "gathered_unevenly": [0, 1, 1, 1],
    "tiled": [0, 1, 0, 1],
    "joined": [0, 1, 0, 1],
}


@pytest.mark.parametrize("name", READS)
def test_energies_are_added_up_over_the_heads_that_share_a_key(name):
    """Against the operands of the product, where keys are repeated already."""
    model, catalog = found(name)
    (block,) = catalog.blocks
    batches, statistics, _ = solved(name)
    shown = exposed(model, [block.query.operand, block.key.operand])
    energy = np.zeros((HEADS, HEAD))
    for batch in batches:
        query, key = run(shown, batch)[0].values()
        energy += np.einsum("bhte,bhet->he", query.astype(float) ** 2, key.astype(float) ** 2)
    tokens = statistics.tokens[block.id]
    expected = np.stack(
        [energy[np.array(READS[name]) == head].sum(axis=0) / tokens for head in range(KV_HEADS)]
    )
    np.testing.assert_allclose(statistics.energies[block.id], expected, rtol=1e-5)
    assert block.key_heads.tolist() == READS[name]
    assert not np.allclose(expected, expected[::-1], rtol=1e-2)


MEASURED = (*GROUPED, "operator_flat", "multi_head", "keys_first", "convolved", "convolved_apart")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MEASURED)
def test_the_measured_error_is_the_predicted_one(name, method):
    model, catalog = found(name)
    batches, _, solution = solved(name, method)
    small = operate(model, catalog, solution).model
    measured = measured_errors(
        *(model, catalog, small, find_blocks(small), batches),
        without_row_constants=method == "best",
    )
    (fold,) = solution.folds
    error = fold.evidence.error
    assert error > 1e-4
    assert (
        abs(measured[fold.block, fold.axis] - error) <= 2 * np.sqrt(error) * ROUNDING + ROUNDING**2
    )


@pytest.mark.parametrize("name", ["tiled", "gathered_unevenly"])
def test_the_repair_is_that_of_one_head_that_sees_all_queries(name):
    """Queries that read one key head are as good as more tokens of one query head."""
    (block,) = found(name)[1].blocks
    _, statistics, solution = solved(name)
    query, key = (statistics.sites[f"{block.id}.{role}"] for role in ("query", "key"))
    kept = highest(score("energy", statistics.energies[block.id]), HEAD // 2)
    for head in range(KV_HEADS):
        grams = query.gram[block.key_heads == head]
        alone = recover_query_key(
            Moments(query.count, np.zeros((1, HEAD)), grams.sum(axis=0)[None] * query.count),
            Moments(key.count, key.mean[head : head + 1], key.scatter[head : head + 1]),
            kept[head : head + 1],
            repair="corp",
            ridge=1e-3,
        )
        for shared in np.flatnonzero(block.key_heads == head):
            np.testing.assert_allclose(solution.folds[0].query[shared], alone.query[0], rtol=1e-6)
        np.testing.assert_allclose(solution.folds[0].key[head], alone.key[0], rtol=1e-6)


# Wrong twins: each of these must show


def block_with(**changes):
    def wrong(model, catalog, solution):
        blocks = tuple(
            replace(b, **{key: change(b) for key, change in changes.items()})
            if isinstance(b, Attention)
            else b
            for b in catalog.blocks
        )
        return operate(model, replace(catalog, blocks=blocks), solution).model

    return wrong


def fold_with(kind, **changes):
    def wrong(model, catalog, solution):
        folds = tuple(
            replace(f, **{key: change(f) for key, change in changes.items()})
            if isinstance(f, kind)
            else f
            for f in solution.folds
        )
        return operate(model, catalog, replace(solution, folds=folds)).model

    return wrong


def copies(order):
    def change(block):
        layout = replace(block.value.layout, copies=order)
        return replace(block.value, layout=layout)

    return block_with(value=change)


def fragments_with(**changes):
    def change(block):
        return tuple(
            replace(route, **{key: made(route) for key, made in changes.items()})
            for route in block.fragments
        )

    return block_with(fragments=change)


def axis_forgotten(block):
    places = block.output.places[::-1]
    return replace(block.output, places=places)


TWINS = {
    "values repeated in runs, not in turns": ("tiled", copies((0, 0, 1, 1))),
    "values repeated in turns, not in runs": ("expanded", copies((0, 1, 0, 1))),
    "maps of query heads in another order": (
        "tiled",
        fold_with(QueryKeyFold, query=lambda f: f.query[[0, 0, 1, 1]] @ f.query[0].T),
    ),
    "rows of heads that share values swapped": (
        "expanded",
        fold_with(ValueOutputFold, weight=lambda f: f.weight[[1, 0, 3, 2]]),
    ),
    "value maps of two heads swapped": (
        "operator_flat_grouped",
        fold_with(ValueOutputFold, value=lambda f: f.value[::-1]),
    ),
    "channels of a packed part reversed": (
        "packed_rotated",
        fragments_with(channels=lambda r: r.channels[::-1]),
    ),
    "a packed part permuted otherwise": (
        "packed_normed",
        fragments_with(channels=lambda r: np.roll(r.channels, 1, axis=0)),
    ),
    "places of a convolution reversed": ("convolved", block_with(output=axis_forgotten)),
    "places of an operator reversed": ("operator_flat", block_with(output=axis_forgotten)),
}
"""A tiny attention, and a surgery on it that has one thing wrong."""


@pytest.mark.parametrize("twin", TWINS)
def test_a_wrong_twin_shows(twin):
    name, wrong = TWINS[twin]
    model, catalog = found(name)
    made = wrong(model, catalog, turned(model, catalog))
    assert min(errors(made, model, name)) > VISIBLE


@pytest.mark.parametrize("name", ["operator_flat", "multi_head"])
def test_a_scale_that_follows_the_head_width_shows(name):
    model, catalog = found(name)
    full = turned(model, catalog)
    large = operate(model, catalog, padded(full, 0.5)).model
    small = operate(model, catalog, narrowed(full, 0.5)).model
    for node in small.graph.nodes:
        node.attrs.pop("scale", None)
    assert min(errors(small, large, name)) > VISIBLE


def test_a_packed_part_that_is_left_out_is_noticed():
    model, catalog = found("packed_normed")
    blocks = tuple(replace(block, fragments=()) for block in catalog.blocks)
    with pytest.raises(SurgeryError, match="still reads them"):
        operate(model, replace(catalog, blocks=blocks), turned(model, catalog))


# What is written


def test_heads_are_repeated_after_they_are_projected():
    """Not the columns of a weight: the layer computes no head twice."""
    model, catalog = found("expanded")
    made = operate(model, catalog, narrowed(turned(model, catalog), 0.5)).model
    (block,) = find_blocks(made).blocks
    assert block.key.linear.width_out == KV_HEADS * HEAD // 2
    assert block.value.linear.width_out == KV_HEADS * VALUE // 2


def test_an_output_that_is_packed_with_a_cut_part_keeps_its_name_and_its_values():
    model, catalog = found("keys_shown")
    made = operate(model, catalog, narrowed(turned(model, catalog), 0.5)).model
    assert [t.name for t in made.graph.outputs] == [t.name for t in model.graph.outputs]
    for given in inputs_of("keys_shown"):
        (_, after), (_, before) = (list(run(m, given)[0].values()) for m in (made, model))
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_what_is_read_twice_is_computed_once():
    """Queries that two products read stay one tensor: half of the values go, and nothing comes."""
    model, catalog = found("query_moved_in_bias")
    made = operate(model, catalog, narrowed(turned(model, catalog), 0.5))
    assert made.pruned.params < made.dense.params
    (block,) = find_blocks(made.model).blocks
    assert axes_of(block) == ("vo",)


# Reasons


REASONS = {
    "packed_rotated": "the query is rotated by its position (rotary embedding)",
    "packed_rotated_in_pairs": "the query is rotated by its position (rotary embedding)",
    "packed_rotated_but_first": "the query is rotated by its position (rotary embedding)",
    "packed_part_rotated": "the query is rotated by its position (rotary embedding)",
    "packed_normed": "the query is normalised between the projection and the product",
    "packed_normed_by_hand": "the query is normalised between the projection and the product",
    "packed_cosine": "the query is normalised between the projection and the product",
    "packed_wholly_rotated": "the query is rotated by its position (rotary embedding)",
    "query_in_bias": "two products of activations meet in its logits",
    "query_moved_in_bias": "two products of activations meet in its logits",
    "bounded": "its logits pass through Max",
    "keys_shown": "is an output of the model",
    "talking": "its logits are mixed across heads by MatMul",
    "talking_by_conv": "its logits are mixed across heads by Conv",
    "convolved_normed": "the query is normalised between the projection and the product",
}


@pytest.mark.parametrize("name", REASONS)
def test_query_and_key_are_refused_with_the_reason(name):
    (block,) = found(name)[1].blocks
    assert REASONS[name] in block.refused["qk"]
    assert "vo" not in block.refused


def channels_attend(net):
    """Channels attend to channels (XCiT): ``[b, h, e, t]`` everywhere."""
    made = [split(net, y, HEADS, (0, 2, 3, 1)) for y in linears(net, HEADS, value=HEAD)]
    logits = net("MatMul", made[0], net("Transpose", made[1], perm=[0, 1, 3, 2]))
    mixed = net("MatMul", softmax(net, logits), made[2])
    rows = net("Reshape", net("Transpose", mixed, perm=[0, 3, 1, 2]), [0, 0, HEADS * HEAD])
    return net.linear(rows, HEADS * HEAD, WIDTH)


def pooled_keys(net):
    query, key, value = separate(net)
    key = net("AveragePool", key, kernel_shape=[2, 1], strides=[2, 1])
    value = net("Slice", value, [0], [2], [2])
    return merged(net, products(net, query, key, value))


def channels_scaled(net):
    return merged(net, net("Mul", products(net, *separate(net)), net.random(VALUE)))


def bias_behind(net):
    return merged(net, net("Add", products(net, *separate(net)), net.random(VALUE)))


def packed_inside(net):
    whole = net.linear(net.x(), WIDTH, 3 * HEADS * HEAD)
    y = net("Reshape", whole, [0, 0, HEADS, 3, HEAD])
    bias = net.random(3 * HEADS * HEAD)
    y = net("MultiHeadAttention", y, "", "", bias, domain=MICROSOFT, num_heads=HEADS)
    return net.linear(y, HEADS * HEAD, WIDTH)


def with_cache(net):
    past = [net.input(n, "batch", HEADS, "others", s) for n, s in (("k", HEAD), ("v", VALUE))]
    given = (*linears(net, HEADS), "", "", "", *past)
    y, _, _ = net("MultiHeadAttention", *given, domain=MICROSOFT, num_heads=HEADS, outputs=3)
    return net.linear(y, HEADS * VALUE, WIDTH)


def tokens_lost_on_the_way(net):
    """Samples are a size that only the Reshape before the last one knows."""
    rows = net("Reshape", net.x("batch", 5, WIDTH), [-1, WIDTH])

    def heads(width):
        y = net("Gemm", rows, net.weight(WIDTH, HEADS * width))
        y = net("Reshape", net("Reshape", y, [-1, 5 * HEADS * width]), [0, 5, HEADS, width])
        return net("Transpose", y, perm=[0, 2, 1, 3])

    return merged(net, products(net, *map(heads, (HEAD, HEAD, VALUE))))


def grouped_convolutions(net):
    """SqueezeBERT: each projection in two groups of channels, and a norm far above."""
    x = net("Transpose", normed_input(net), perm=[0, 2, 1])
    made = [
        net("Conv", x, net.random(HEADS * width, WIDTH // 2, 1), kernel_shape=[1], group=2)
        for width in (HEAD, HEAD, VALUE)
    ]
    heads = [net("Transpose", y, perm=[0, 2, 1]) for y in made]
    query, key, value = (split(net, y, HEADS) for y in heads)
    return merged(net, products(net, query, key, value))


def normed_input(net):
    return net("LayerNormalization", net.x(), net.random(WIDTH))


def logits_in_one_axis(net):
    """What is done to logits side by side hides which of them belong to one query."""

    def between(net, y):
        length = net("Shape", "x", start=1, end=2)
        joined = net("Mul", net("Reshape", y, [0, 0, -1]), net.random(HEADS, 1))
        return net("Reshape", joined, net("Concat", [0, 0], length, [-1], axis=0))

    return plain(net, between=between)


def averaged_queries(net):
    """One query for all: the mean over the tokens."""
    query, key, value = separate(net)
    return merged(net, products(net, net("ReduceMean", query, [2]), key, value))


def mixed_in_a_sum(net):
    """Values of all heads are added up where they are mixed."""
    query, key, value = separate(net)
    logits = net("MatMul", query, net("Transpose", key, perm=[0, 1, 3, 2]))
    mixed = net("Einsum", softmax(net, logits), value, equation="bhij,bgje->bhgie")
    rows = net("Reshape", net("Transpose", mixed, perm=[0, 3, 1, 2, 4]), [0, 0, -1])
    return net.linear(rows, HEADS * HEADS * VALUE, WIDTH)


def mixed_behind_a_cast(net):
    """The same where probabilities are typed on their way."""
    query, key, value = separate(net)
    logits = net("MatMul", query, net("Transpose", key, perm=[0, 1, 3, 2]))
    typed = net("Cast", softmax(net, logits), to=onnx.TensorProto.FLOAT)
    mixed = net("Einsum", typed, value, equation="bhij,bgje->bhgie")
    rows = net("Reshape", net("Transpose", mixed, perm=[0, 3, 1, 2, 4]), [0, 0, -1])
    return net.linear(rows, HEADS * HEADS * VALUE, WIDTH)


def weighed_and_summed(net):
    """Values at a few places, times weights that sum to one: deformable attention."""
    weights = net("Softmax", net("Reshape", net.linear(net.x(), WIDTH, 3), [0, 0, 3, 1]), axis=2)
    values = net("Reshape", net.linear("x", WIDTH, 3 * VALUE), [0, 0, 3, VALUE])
    mixed = net("ReduceSum", net("Mul", values, weights), [2], keepdims=0)
    return net.linear(mixed, VALUE, WIDTH)


def learned_sink(net):
    """A column of their own beside the logits of all keys."""
    query, key, value = separate(net)
    logits = net("MatMul", query, net("Transpose", key, perm=[0, 1, 3, 2]))
    sizes = net("Concat", net("Slice", net("Shape", logits), [0], [3]), [1], axis=0)
    column = net("Expand", net.random(HEADS, 1, 1), sizes)
    found = softmax(net, net("Concat", logits, column, axis=-1))
    return merged(net, net("MatMul", net("Slice", found, [0], [-1], [3]), value))


def joint(net):
    """Tokens of two projections attend to each other, as in MMDiT."""
    ones, others = separate(net), separate(net)
    joined = [net("Concat", *pair, axis=2) for pair in zip(ones, others, strict=True)]
    scale = net("Mul", joined[0], np.float32(0.5))
    return merged(net, products(net, scale, *joined[1:]))


REFUSED = {
    joint: "the query does not come from one linear layer by movement and scaling alone: Concat ",
    learned_sink: "its logits are joined with others before Softmax (Concat ",
    averaged_queries: "the query is mixed with neighbouring tokens by ReduceMean",
    mixed_behind_a_cast: "its probabilities enter a sum that is no product of matrices",
    weighed_and_summed: "its probabilities enter a sum that is no product of matrices",
    mixed_in_a_sum: "its probabilities enter a sum that is no product of matrices",
    tokens_lost_on_the_way: "laid out in a way that one Reshape and one Transpose cannot write",
    grouped_convolutions: "the query comes from a convolution in 2 groups",
    logits_in_one_axis: "its logits are reshaped before Softmax",
    channels_attend: "channels where tokens are expected: channels attend to channels",
    pooled_keys: "the key is mixed with neighbouring tokens by AveragePool",
    channels_scaled: "scales channels of the mixed values one by one",
    bias_behind: "stands between the mixed values and a linear layer",
    packed_inside: "queries, keys and values are packed in one 5-D input",
    with_cache: "keys or values are kept in a cache (graph input or output)",
}


@pytest.mark.parametrize("make", REFUSED)
def test_what_cannot_be_cut_exactly_is_refused_with_the_reason(make):
    catalog = find_blocks(from_proto(built(make)(0).proto))
    said = [reason for block in catalog.blocks for reason in block.refused.values()]
    said += [refusal.reason for refusal in catalog.refusals]
    assert any(REFUSED[make] in reason for reason in said), said


def test_sizes_that_are_places_in_a_table_are_all_taken():
    """They pick from the table, nobody picks from them."""

    def looked_up(net, sizes):
        return net("Slice", net("Gather", np.arange(40), sizes), [1], [2])

    make = built(lambda net: heads_in_batch(net, looked_up, (2, 5, WIDTH)))
    (block,) = find_blocks(from_proto(make(0).proto)).blocks
    assert axes_of(block) == ("qk", "vo")


def test_a_projection_of_two_attentions_is_refused_in_both():
    net = Net(0)
    query, key, value = separate(net)
    other_key, other_value = (split(net, y, HEADS) for y in linears(net, HEADS)[1:])
    first = merged(net, products(net, query, key, value))
    second = merged(net, products(net, query, other_key, other_value))
    catalog = find_blocks(from_proto(net.build(net("Add", first, second))))
    assert [axes_of(block) for block in catalog.blocks] == [("vo",), ("vo",)]
    assert all("is also read by MatMul" in block.refused["qk"] for block in catalog.blocks)


def test_a_packed_projection_of_two_attentions_is_refused_in_both():
    net = Net(0)
    whole = net.linear(net.x(), WIDTH, 4 * HEADS * HEAD)
    parts = net("Split", whole, [HEADS * HEAD] * 4, outputs=4, axis=2)
    query, key, value, other = (split(net, part, HEADS) for part in parts)
    apart = [split(net, y, HEADS) for y in linears(net, HEADS, value=HEAD)[1:]]
    first = merged(net, products(net, query, key, value), value=HEAD)
    second = merged(net, products(net, other, *apart), value=HEAD)
    catalog = find_blocks(from_proto(net.build(net("Add", first, second))))
    nothing, values = sorted(catalog.blocks, key=axes_of)
    assert (axes_of(nothing), axes_of(values)) == ((), ("vo",))
    assert f"is also that of {values.id}" in nothing.refused["vo"]
    assert f"is also that of {nothing.id}" in values.refused["qk"]


def test_a_size_that_is_copied_from_other_rows_splits_no_tokens():
    """The number of samples would be that of all tokens: the projection lies on rows."""
    net = Net(0)
    model = from_proto(net.build(in_windows(0)(net)))
    (refusal,) = (item for item in find_blocks(model).refusals if item.op == "Softmax")
    assert "one Reshape and one Transpose" in refusal.reason


def two_softmaxes(net):
    """Probabilities of two kinds mix one set of values."""
    query, key, value = separate(net)
    logits = [net("MatMul", query, net("Transpose", key, perm=[0, 1, 3, 2]))]
    other = [split(net, net.linear("x", WIDTH, HEADS * HEAD), HEADS) for _ in range(2)]
    logits.append(net("MatMul", other[0], net("Transpose", other[1], perm=[0, 1, 3, 2])))
    first, second = (softmax(net, net("Mul", each, HEAD**-0.5)) for each in logits)
    joined = net("Sub", first, net("Mul", second, net.random(1, HEADS, 1, 1)))
    return merged(net, net("MatMul", joined, value))


def test_values_that_several_probabilities_mix_are_cut_once():
    """As in a differential transformer: ``(softmax(q₁ k₁ᵀ) - λ softmax(q₂ k₂ᵀ)) v``."""
    net = Net(0)
    net.x()
    model = from_proto(net.build(two_softmaxes(net)))
    catalog = find_blocks(model)
    assert [axes_of(block) for block in catalog.blocks] == [("qk",), ("qk", "vo")]
    assert "mix the values of attention.1" in catalog.blocks[0].refused["vo"]
    given = [feeds(model.proto(), *size) for size in SIZES]
    full = turned(model, catalog)
    same = operate(model, catalog, full).model
    small = operate(model, catalog, narrowed(full, 0.5)).model
    large = operate(model, catalog, padded(full, 0.5)).model
    for pair in zip(run(same, *given), run(model, *given), strict=True):
        assert squared_error(*pair) <= BOUND
    for pair in zip(run(small, *given), run(large, *given), strict=True):
        assert squared_error(*pair) <= BOUND
    for pair in zip(run(small, *given), run(model, *given), strict=True):
        assert squared_error(*pair) > VISIBLE
