"""Calibration: the right tensors, every token once, and nothing that was padded."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corp_onnx.blocks import Attention, Mlp, axes_of, find_blocks
from corp_onnx.blocks.records import Mask
from corp_onnx.calibration.calibrate import MOST_SEEN, calibrate, gather
from corp_onnx.calibration.masks import visible
from corp_onnx.calibration.moments import Moments
from corp_onnx.calibration.sites import Site
from corp_onnx.errors import DataError
from corp_onnx.graph.model import from_proto
from corp_onnx.session import open_session
from corp_onnx.solve.lowrank import NEGLIGIBLE
from tests import numpy_block
from tests.builders import (
    HEAD,
    HEADS,
    TINY,
    WIDTH,
    Net,
    feeds,
    layer_norm,
    merge_heads,
    mix,
    mlp,
    projections,
    scaled,
    separate,
    split_heads,
)
from tests.inputs import activations, dataset, sentences
from tests.oracles import two_pass
from tests.tolerances import distance, rounding

SAME = 1e-6
"""Relative Frobenius distance of statistics that differ in nothing but how they were gathered."""


def gathered(model, *batches, catalog=None):
    return gather(model, catalog or find_blocks(model), batches)


def apart(actual, expected):
    """The largest distance between two records of statistics, over everything they hold."""
    assert actual.sites.keys() == expected.sites.keys()
    assert actual.tokens == expected.tokens
    distances = [
        distance(actual.energies[name], energy) for name, energy in expected.energies.items()
    ]
    for name, moments in expected.sites.items():
        assert actual.sites[name].count == moments.count
        if not name.endswith("centred_key"):  # whose mean is rounding
            distances.append(distance(actual.sites[name].mean, moments.mean))
        distances.append(distance(actual.sites[name].scatter, moments.scatter))
    return max(distances)


# One block against NumPy

BLOCK_ROUNDING = rounding(width=100, dtype=np.float32)
"""Float32 sums of at most 24 products, four of them one after the other."""


@pytest.fixture(scope="module")
def block():
    weights = numpy_block.draw(np.random.default_rng(3))
    return numpy_block.as_model(weights), weights, activations(12, 5)


def assert_block_agrees(statistics, truth):
    for role in ("query", "key"):
        moments = statistics.sites[f"attention.0.{role}"]
        for head in range(HEADS):
            mean, scatter = two_pass(truth[role][:, head])
            assert distance(moments.mean[head], mean) <= BLOCK_ROUNDING
            assert distance(moments.scatter[head], scatter) <= BLOCK_ROUNDING
    mean, scatter = two_pass(truth["hidden"])
    assert distance(statistics.sites["mlp.0.hidden"].mean, mean) <= BLOCK_ROUNDING
    assert distance(statistics.sites["mlp.0.hidden"].scatter, scatter) <= BLOCK_ROUNDING
    energy = (truth["query"] ** 2 * truth["key"] ** 2).mean(axis=0)
    assert distance(statistics.energies["attention.0"], energy) <= BLOCK_ROUNDING


def test_the_numpy_block_computes_what_the_model_computes(block):
    model, weights, x = block
    (output,) = open_session(model).run({"x": x}).values()
    assert distance(output, numpy_block.forward(weights, x)["output"]) <= BLOCK_ROUNDING


def test_sites_agree_with_numpy(block):
    model, weights, x = block
    statistics = gathered(model, {"x": x[:7]}, {"x": x[7:]})
    assert statistics.samples == 12
    assert {moments.count for moments in statistics.sites.values()} == {60}
    assert statistics.tokens == {"attention.0": 60}
    assert_block_agrees(statistics, numpy_block.forward(weights, x))


@pytest.mark.parametrize(
    "mutant",
    {
        "heads swapped": lambda truth: truth | {"query": truth["query"][:, ::-1]},
        "scale forgotten": lambda truth: truth | {"query": truth["query"] / 0.9},
        "query for key": lambda truth: truth | {"key": truth["query"]},
        "a token lost": lambda truth: truth | {"hidden": truth["hidden"][1:]},
        "channels shuffled": lambda truth: truth | {"hidden": np.roll(truth["hidden"], 1, axis=1)},
        "tokens unpaired": lambda truth: truth | {"key": np.roll(truth["key"], 1, axis=0)},
    }.items(),
    ids=lambda item: item[0],
)
def test_a_wrong_twin_of_the_numpy_block_is_noticed(block, mutant):
    model, weights, x = block
    statistics = gathered(model, {"x": x})
    with pytest.raises(AssertionError):
        assert_block_agrees(statistics, mutant[1](numpy_block.forward(weights, x)))


# Batches, order, padding


@pytest.fixture(scope="module")
def whole(tiny):
    model = tiny("transformer")
    return model, find_blocks(model), gathered(model, {"x": activations(24)})


@settings(max_examples=12, deadline=None)
@given(st.permutations(range(24)), st.integers(1, 24))
def test_neither_batch_size_nor_order_matters(whole, order, size):
    model, catalog, expected = whole
    x = activations(24)[order]
    batches = [{"x": x[at : at + size]} for at in range(0, len(x), size)]
    assert apart(gathered(model, *batches, catalog=catalog), expected) <= SAME


def padded_texts(texts, length, rng):
    """Token sequences padded with random tokens that the mask hides."""
    ids = rng.integers(0, 8, (len(texts), length))
    seen = np.zeros((len(texts), length), np.float32)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        seen[row, : len(text)] = 1
    return {"ids": ids, "seen": seen}


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(5)
    return [rng.integers(0, 8, length) for length in rng.integers(2, 8, 30)]


@pytest.fixture(scope="module")
def unpadded(tiny, texts):
    """Statistics of every text alone, at its own length."""
    model = tiny("text_encoder")
    alone = [padded_texts([text], len(text), np.random.default_rng(0)) for text in texts]
    return model, gathered(model, *alone)


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(7, 16), min_size=3, max_size=3),
    order=st.permutations(range(30)),
    seed=st.integers(0, 9),
)
def test_padding_counts_nowhere(unpadded, texts, lengths, order, seed):
    model, expected = unpadded
    rng = np.random.default_rng(seed)
    parts = np.array_split(np.array(order), len(lengths))
    batches = [
        padded_texts([texts[index] for index in part], length, rng)
        for part, length in zip(parts, lengths, strict=True)
    ]
    assert apart(gathered(model, *batches), expected) <= SAME


def without_masks(block):
    masks = {"padding", "key_padding"} & {field.name for field in fields(block)}
    return replace(block, **dict.fromkeys(masks))


def test_padding_that_is_not_masked_counts(unpadded, texts):
    """The wrong twin: the mask is not known to be one."""
    model, expected = unpadded
    catalog = find_blocks(model)
    blind = replace(catalog, blocks=tuple(map(without_masks, catalog.blocks)))
    batch = padded_texts(texts, 12, np.random.default_rng(0))
    statistics = gathered(model, batch, catalog=blind)
    assert {moments.count for moments in statistics.sites.values()} == {30 * 12}
    for name, moments in expected.sites.items():
        assert moments.count == sum(map(len, texts))
        assert distance(statistics.sites[name].mean, moments.mean) > 1e-3


def test_of_a_cross_attention_hidden_keys_count_nowhere_and_all_queries_do():
    net = Net(0)
    query = net.linear(net.x(), WIDTH, HEADS * HEAD)
    context = net.input("context", "batch", "tokens", WIDTH)
    key, value = (net.linear(context, WIDTH, HEADS * HEAD) for _ in range(2))
    mask = net.input("added", "batch", 1, 1, "tokens")
    heads = [split_heads(net, y) for y in (query, key, value)]
    mixed = mix(net, *heads, lambda net, y: net("Add", scaled(net, y), mask))
    model = from_proto(net.build(merge_heads(net, mixed)))
    rng = np.random.default_rng(0)
    x, context = rng.standard_normal((2, 20, 6, WIDTH)).astype(np.float32)
    added = np.where(np.arange(6) < 2, 0, -1e4).astype(np.float32)
    batch = {"x": x, "context": context, "added": np.broadcast_to(added, (20, 1, 1, 6)).copy()}
    counts = {name: moments.count for name, moments in gathered(model, batch).sites.items()}
    assert {name.partition(".0.")[2]: count for name, count in counts.items()} == {
        "query": 120,
        "key": 40,
        "centred_key": 40,
        "context": 120,
    }


MASKS = {
    "mask_added": ("added", lambda seen: np.where(seen, 0, -1e4).astype(np.float32)),
    "mask_keeps": ("keeps", lambda seen: seen),
    "mask_drops": ("drops", lambda seen: ~seen),
    "operator_mask": ("keeps", lambda seen: seen),
}


@pytest.mark.parametrize("name", MASKS)
def test_every_kind_of_mask_hides_padding(tiny, name):
    model = tiny(name)
    kind, written = MASKS[name]
    x = activations(6, 5)
    everything = np.ones((6, 1, 1, 5), bool)
    expected = gathered(model, {"x": x, kind: written(everything)})
    longer = np.concatenate([x, np.full((6, 3, WIDTH), 100, np.float32)], axis=1)
    seen = np.concatenate([everything, np.zeros((6, 1, 1, 3), bool)], axis=-1)
    assert apart(gathered(model, {"x": longer, kind: written(seen)}), expected) <= SAME
    (block,) = find_blocks(model).blocks
    assert block.padding is not None
    assert block.padding.kind == ("added" if kind == "added" else kind)
    unmasked = gathered(model, {"x": longer, kind: written(np.ones_like(seen))})
    assert unmasked.tokens["attention.0"] == 48


def masked_inside(net, tokens_first, by_head):
    """A mask ``[b, 1, 1, t]``, or ``[b · h, 1, t]`` as torch's MultiheadAttention has it."""
    axes = ("tokens", "batch") if tokens_first else ("batch", "tokens")
    shape = net("Shape", net.x(*axes, WIDTH))
    sizes = {name: net("Gather", shape, [axis]) for axis, name in enumerate(axes)}
    batch, tokens = sizes["batch"], sizes["tokens"]
    folded = net("Mul", batch, [HEADS])
    mask = net.input("keeps", "batch", 1, 1, "tokens", dtype=np.bool_)
    to_heads = [1, 2, 0, 3] if tokens_first else [0, 2, 1, 3]
    made = []
    for y in projections(net):
        heads = net("Transpose", net("Reshape", y, [0, 0, HEADS, HEAD]), perm=to_heads)
        made.append(net("Reshape", heads, net("Concat", folded, tokens, [HEAD], axis=0)))
    logits = scaled(net, net("MatMul", made[0], net("Transpose", made[1], perm=[0, 2, 1])))
    if by_head:
        mask = net("Expand", mask, net("Concat", batch, [HEADS], [1], tokens, axis=0))
        mask = net("Reshape", mask, net("Concat", folded, [1], tokens, axis=0))
        logits = net("Where", mask, logits, -1e4)
    else:
        whole = net("Reshape", logits, net("Concat", batch, [HEADS], tokens, tokens, axis=0))
        logits = net("Where", mask, whole, -1e4)
        logits = net("Reshape", logits, net("Concat", folded, tokens, tokens, axis=0))
    mixed = net("MatMul", net("Softmax", logits, axis=-1), made[2])
    whole = net("Reshape", mixed, net("Concat", batch, [HEADS], tokens, [HEAD], axis=0))
    rows = net("Transpose", whole, perm=[2, 0, 1, 3] if tokens_first else [0, 2, 1, 3])
    y = net.linear(net("Reshape", rows, [0, 0, HEADS * HEAD]), HEADS * HEAD, WIDTH)
    return mlp(net, layer_norm(net, y), lambda net, y: net("Relu", y))


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_padding_is_found_whatever_axis_counts_the_tokens(tokens_first, by_head):
    net = Net(0)
    model = from_proto(net.build(masked_inside(net, tokens_first, by_head)))

    def arranged(x):
        return x.swapaxes(0, 1) if tokens_first else x

    x, lengths = activations(6, 7), [7, 3, 5, 7, 1, 6]
    alone = [
        {"x": arranged(x[i : i + 1, :length]), "keeps": np.ones((1, 1, 1, length), bool)}
        for i, length in enumerate(lengths)
    ]
    seen = np.arange(7) < np.array(lengths)[:, None]
    together = {"x": arranged(np.where(seen[..., None], x, 100)), "keeps": seen[:, None, None]}
    assert apart(gathered(model, together), gathered(model, *alone)) <= SAME


@pytest.mark.parametrize(
    ("kind", "values", "seen"),
    [
        ("added", [[[[0.0, -1e4], [0.0, -1e4]]]], [[True, False]]),
        ("added", [[[[0.0, -np.inf], [0.0, 0.0]]]], [[True, True]]),  # causal: the last sees all
        ("added", [[[[-65504.0, 0.5]]]], [[False, True]]),
        ("added", [[[[np.finfo(np.float32).min, 0.0]]]], [[False, True]]),
        ("added", [[[[-3.0, 2.0]]]], [[True, True]]),  # a bias, not a mask
        ("keeps", [[[[1, 0, 1]]]], [[True, False, True]]),
        ("keeps", [[[[True, False]], [[True, True]]]], [[True, True]]),  # some head sees it
        ("drops", [[[[True, False]]], [[[False, False]]]], [[False, True], [True, True]]),
        ("drops", [True, False], [[False, True]]),
    ],
)
def test_what_a_mask_lets_be_seen(kind, values, seen):
    result = visible(Mask("mask", kind), np.array(values))
    assert result.tolist() == seen


def test_a_mask_that_hides_everything_is_an_error(tiny):
    model = tiny("mask_keeps")
    feeds = {"x": activations(40), "keeps": np.zeros((40, 1, 1, 7), bool)}
    with pytest.raises(DataError, match=r"no token of memory reaches attention.0.query"):
        calibrate(model, find_blocks(model), dataset(model, **feeds))


# Held-out samples


def test_held_out_samples_are_in_no_statistic(tiny):
    model, x = tiny("mlp"), activations(50)
    found = calibrate(model, find_blocks(model), dataset(model, x=x), seed=4)
    held_out = np.concatenate([batch["x"] for batch in found.held_out])
    seen = np.concatenate([batch["x"] for batch in found.seen])
    assert (found.samples, len(held_out), len(seen)) == (40, 10, min(MOST_SEEN, 40))
    used = np.array([row for row in x if not (row == held_out).all(axis=(1, 2)).any()])
    assert len(used) == 40
    assert all((row == used).all(axis=(1, 2)).any() for row in seen)
    assert apart(found, gathered(model, {"x": used})) <= SAME


def test_the_seed_decides_what_is_held_out(tiny):
    model, x = tiny("mlp"), activations(50)
    data, catalog = dataset(model, x=x), find_blocks(model)
    first, again, other = (calibrate(model, catalog, data, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.held_out[0]["x"], again.held_out[0]["x"])
    assert not np.array_equal(first.held_out[0]["x"], other.held_out[0]["x"])


def test_at_most_32_samples_are_held_out(tiny):
    model = tiny("mlp")
    found = calibrate(model, find_blocks(model), dataset(model, x=activations(400, 2)))
    assert found.samples == 400 - 32


def test_two_samples_are_too_few_to_hold_one_out_of_a_fixed_batch_of_two(rng, caplog):
    net = Net(0)
    model = from_proto(net.build(mlp(net, net.x(2, 40, WIDTH), lambda net, y: net("Relu", y))))
    data = dataset(model, x=activations(2, 40))
    found = calibrate(model, find_blocks(model), data)
    assert "too few samples to hold any out" in caplog.text
    assert found.samples == 2
    assert np.array_equal(found.held_out[0]["x"], found.seen[0]["x"])


def test_progress_is_told_the_samples_of_every_batch(tiny):
    model, sizes = tiny("mlp"), []
    data = dataset(model, x=activations(40))
    calibrate(model, find_blocks(model), data, batch_size=12, on_batch=sizes.append)
    assert sizes == [12, 12, 8]


def test_the_model_is_not_changed(tiny):
    model = tiny("transformer")
    before = model.proto().SerializeToString(deterministic=True)
    calibrate(model, find_blocks(model), dataset(model, x=activations()))
    assert model.proto().SerializeToString(deterministic=True) == before


# Numbers that cannot be used


def with_activation(op):
    net = Net(0)
    return from_proto(net.build(mlp(net, net.x(), lambda net, y: net(op, y))))


@pytest.mark.parametrize("op", ["Sqrt", "Log"])
def test_nan_in_a_hidden_vector_is_an_error_that_names_tensor_and_block(op):
    model = with_activation(op)
    catalog = find_blocks(model)
    (block,) = catalog.blocks
    message = rf"at {block.hidden} of mlp\.0: the activations hold NaN or infinity"
    with pytest.raises(DataError, match=message):
        gathered(model, {"x": activations(4)})


def test_infinity_in_a_hidden_vector_is_an_error():
    with pytest.raises(DataError, match=r"of mlp\.0: the activations hold NaN or infinity"):
        gathered(with_activation("Exp"), {"x": 1e3 * activations(4)})


def test_infinity_in_a_query_is_an_error_that_names_tensor_and_block(tiny):
    model = tiny("scale_on_query")
    (block,) = find_blocks(model).blocks
    names = rf"{block.query.linear.output}, {block.key.linear.output}"
    with pytest.raises(DataError, match=rf"at {names}, \S+ of attention\.0: .*NaN or infinity"):
        gathered(model, {"x": np.float32(2e37) * activations(4)})


def test_padding_may_hold_anything(tiny):
    model, x = tiny("mask_keeps"), activations(4)
    seen = np.ones((4, 1, 1, 7), bool)
    seen[..., -1] = False
    x[:, -1] = 1e30
    found = gathered(model, {"x": x, "keeps": seen})
    assert np.isfinite(found.sites["attention.0.query"].mean).all()


def test_channels_that_never_vary_are_fine(tiny):
    model = tiny("mlp")
    found = gathered(model, {"x": np.ones((9, 7, WIDTH), np.float32)})
    assert np.allclose(found.sites["mlp.0.hidden"].scatter, 0)


def test_data_without_samples_are_an_error(tiny):
    with pytest.raises(DataError, match="holds no samples"):
        gathered(tiny("mlp"))


def test_data_that_the_model_cannot_run_on_are_an_error(tiny):
    rng = np.random.default_rng(0)
    long = sentences(rng, samples=3, length=17)  # there are 16 positions
    with pytest.raises(DataError, match=r"cannot run the model on inputs of shape ids \[3, 17\]"):
        gathered(tiny("text_encoder"), long)
    unknown = sentences(rng, samples=3, length=5)
    with pytest.raises(DataError, match="out of data bounds"):
        gathered(tiny("text_encoder"), unknown | {"ids": unknown["ids"] + 8})


# Which blocks are read

NOTHING_TO_READ = ("query_seen",)
"""Tiny models whose queries and keys cannot be cut."""


def test_only_axes_that_can_be_cut_are_read():
    """A tanh on the logits leaves values alone."""
    net = Net(0)
    mixed = mix(net, *separate(net), lambda net, y: net("Tanh", y))
    y = merge_heads(net, mixed)
    only_values = from_proto(net.build(y))
    assert [axes_of(block) for block in find_blocks(only_values).blocks] == [("vo",)]
    assert set(gathered(only_values, {"x": activations(4)}).sites) == {"attention.0.context"}

    with_mlp = from_proto(net.build(mlp(net, layer_norm(net, y), lambda net, y: net("Relu", y))))
    sites = {"attention.0.context", "mlp.0.hidden"}
    assert set(gathered(with_mlp, {"x": activations(4)}).sites) == sites


@pytest.mark.parametrize("name", [name for name in TINY if name not in NOTHING_TO_READ])
def test_every_axis_of_every_tiny_model_has_a_site(tiny, name):
    model = tiny(name)
    catalog = find_blocks(model)
    expected = {}
    for block in catalog.blocks:
        if isinstance(block, Mlp):
            expected[f"{block.id}.hidden"] = (block.width,)
            continue
        if "qk" in axes_of(block):
            expected[f"{block.id}.query"] = (block.heads, block.head_width)
            expected[f"{block.id}.key"] = (block.kv_heads, block.head_width)
            expected[f"{block.id}.centred_key"] = (block.kv_heads, block.head_width)
        if "vo" in axes_of(block):
            expected[f"{block.id}.context"] = (block.output.linear.width_in,)
    batch = feeds(TINY[name](0).proto, 1 if name in {"static_sizes", "baked_batch"} else 2, 5)
    found = gather(model, catalog, [batch])
    assert {site: moments.mean.shape for site, moments in found.sites.items()} == expected


def test_energies_of_float16_do_not_overflow(tiny):
    """A query of 300 squared is beyond float16, and a key of a thousandth squared below it."""
    model = tiny("attention_half")
    (block,) = find_blocks(model).blocks
    nodes = {node.name: node for node in model.graph.nodes}
    for route, gain in ((block.query, 300.0), (block.key, 1 / 300.0)):
        weight = nodes[route.linear.node].inputs[1]
        weight.values = (weight.values.astype(np.float32) * gain).astype(np.float16)
    found = gathered(model, {"x": activations(8).astype(np.float16)})
    energy = found.energies[block.id]
    assert np.isfinite(energy).all()
    query, key = (found.sites[f"{block.id}.{role}"] for role in ("query", "key"))
    bound = np.sqrt((query.mean**2 + query.variance) * (key.mean**2 + key.variance))
    assert (energy > 0.01 * bound).all()


def test_moments_of_heads_have_no_directions_that_are_rounding_alone(tiny):
    """Their roots are inverted: in float32 products such directions are as large as small ones."""
    model = tiny("transformer")
    block = next(block for block in find_blocks(model).blocks if isinstance(block, Attention))
    width = block.output.linear.width_in
    rng = np.random.default_rng(0)
    of_rank_two = rng.standard_normal((4000, 2)) @ rng.standard_normal((2, width))
    context = (100.0 + of_rank_two).astype(np.float32)
    site = Site(block, ("vo",))
    site.add({block.output.linear.input: context[None]})

    def third(moments):
        values = np.linalg.eigvalsh(moments.covariance)
        return np.abs(values[:-2]).max() / values[-1]

    assert third(site.moments()[f"{block.id}.context"]) <= NEGLIGIBLE / 100
    assert third(Moments.of(context)) > NEGLIGIBLE / 10  # the wrong twin
