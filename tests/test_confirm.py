"""What is not what it was read as, at the sizes of the data, is left as it is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from corp_onnx.blocks import Mlp, axes_of, find_blocks
from corp_onnx.errors import DataError
from corp_onnx.graph.model import from_proto
from corp_onnx.verify import confirm
from corp_onnx.verify.confirm import Dense, _few, confirmed
from tests.attention_builders import MORE
from tests.builders import (
    HIDDEN,
    TINY,
    WIDTH,
    Net,
    feeds,
    merge_heads,
    mix,
    projections,
    split_heads,
)
from tests.full_width import run, squared_error
from tests.inputs import activations

PATCH = 16


def aspect(net, pixels):
    """The root of height over width, picked from all sides over the last: 1 of a square picture."""
    sides = net("Cast", net("Shape", pixels, start=2), to=onnx.TensorProto.FLOAT)
    ratios = net("Div", sides, net("Gather", sides, [1], axis=0))
    return net("Sqrt", net("Gather", ratios, np.int64(0), axis=0))


def by_aspect(scaled="query"):
    """An attention over patches of a picture, one of its operands scaled by its aspect ratio."""
    net = Net(0)
    x = net.x("batch", 3, "height", "width")
    filters = net.random(WIDTH, 3, PATCH, PATCH, gain=0.1)
    y = net("Conv", x, filters, kernel_shape=[PATCH] * 2, strides=[PATCH] * 2)
    tokens = net("Transpose", net("Reshape", y, [0, WIDTH, -1]), perm=[0, 2, 1])
    parts = dict(zip(("query", "key", "value"), projections(net, tokens), strict=True))
    heads = {role: split_heads(net, part) for role, part in parts.items()}
    heads[scaled] = net("Mul", heads[scaled], aspect(net, x))
    return net.build(merge_heads(net, mix(net, *heads.values())))


def pictures(height, width, samples=2):
    rng = np.random.default_rng(height)
    return {"x": rng.standard_normal((samples, 3, height, width), dtype=np.float32)}


@pytest.mark.parametrize(("scaled", "left"), [("query", ("vo",)), ("value", ("qk",))])
def test_an_axis_that_holds_only_for_square_pictures_is_left_alone_for_others(scaled, left, caplog):
    model = from_proto(by_aspect(scaled))
    catalog = find_blocks(model)
    assert axes_of(catalog.blocks[0]) == ("qk", "vo"), "or there is nothing to find out"
    square, oblong = pictures(64, 64), pictures(48, 96)
    assert confirmed(model, catalog, [square]).blocks[0].refused == {}
    assert caplog.text == ""
    for batches in ([oblong], [square, oblong]):
        block = confirmed(model, catalog, batches).blocks[0]
        assert axes_of(block) == left
        (reason,) = block.refused.values()
        assert "written in another basis, which should change nothing, its output" in reason
        assert f"is left as it is: {reason}" in caplog.text


ALL = {**TINY, **MORE}


@pytest.mark.parametrize("name", ALL)
def test_everything_else_is_confirmed(name):
    proto = ALL[name](0).proto
    model = from_proto(proto)
    catalog = find_blocks(model)
    samples, lengths = (1, [5]) if name == "baked_batch" else (2, [7, 9])
    batches = [feeds(proto, samples, length) for length in lengths]
    errors = Dense.of(model, catalog, batches).errors(catalog)
    assert errors.keys() == {block.id for block in catalog.blocks if axes_of(block)}
    assert all(error < 1e-8 for error in errors.values()), errors
    refused = [block.refused for block in confirmed(model, catalog, batches).blocks]
    assert refused == [block.refused for block in catalog.blocks]


def mistaken(block, mistake, gain=1.01):
    """A block with something about it that is not so."""
    if isinstance(block, Mlp):
        source, *others = block.sources
        wrong = replace(source, channels=source.channels[::-1])
        return replace(block, sources=(wrong, *others))
    if mistake == "places":
        return replace(block, output=replace(block.output, places=block.output.places[::-1]))
    if mistake == "gain":
        return replace(block, query=replace(block.query, gain=block.query.gain * gain))
    return replace(block, value=replace(block.value, channels=block.value.channels[::-1]))


@pytest.mark.parametrize("mistake", ["places", "gain", "channels"])
@pytest.mark.parametrize("at", range(4))
def test_mistakes_are_found_where_they_are(mistake, at):
    model = from_proto(TINY["transformer"](0).proto)
    catalog = find_blocks(model)
    blocks = list(catalog.blocks)
    blocks[at] = mistaken(blocks[at], mistake)
    batch = {"x": activations()[:2].astype(np.float32)}
    found = confirmed(model, replace(catalog, blocks=tuple(blocks)), [batch])
    wrong = [block.id for block in found.blocks if block.refused]
    assert wrong == [blocks[at].id]
    of_attention = "qk" if mistake == "gain" else "vo"
    axis = "mlp" if isinstance(blocks[at], Mlp) else of_attention
    assert tuple(found.blocks[at].refused) == (axis,)


def test_what_is_not_a_number_is_nothing_to_compare_and_no_number_is_not_right(monkeypatch):
    """Rows of a sample that is all padding are lost in the dense model too."""
    model = from_proto(TINY["transformer"](0).proto)
    catalog = find_blocks(model)
    batch = {"x": activations()[:2].astype(np.float32)}
    batch["x"][0] = np.nan
    assert all(not block.refused for block in confirmed(model, catalog, [batch]).blocks)
    blocks = (mistaken(catalog.blocks[0], "gain"), *catalog.blocks[1:])
    wrong = replace(catalog, blocks=blocks)
    assert confirmed(model, wrong, [batch]).blocks[0].refused.keys() == {"qk"}
    monkeypatch.setattr(Dense, "errors", lambda *_: {"mlp.0": np.nan})
    refused = {block.id for block in confirmed(model, catalog, [batch]).blocks if block.refused}
    assert refused == {"mlp.0"}


@pytest.mark.parametrize("at", [0, 2])
def test_so_is_what_fails_in_another_basis(at):
    """Alone, though others fail beside it in one graph."""
    model = from_proto(TINY["transformer"](0).proto)
    catalog = find_blocks(model)
    blocks = list(catalog.blocks)
    layout = replace(blocks[at].query.layout, rows=(5,))
    blocks[at] = replace(blocks[at], query=replace(blocks[at].query, layout=layout))
    batch = {"x": activations()[:2].astype(np.float32)}
    found = confirmed(model, replace(catalog, blocks=tuple(blocks)), [batch])
    assert [tuple(block.refused) for block in found.blocks] == [
        ("qk",) if place == at else () for place in range(4)
    ]
    assert "should change nothing, it fails: ONNX Runtime" in found.blocks[at].refused["qk"]


def x_of(samples=8, tokens=7, seed=0):
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((samples, tokens, WIDTH), dtype=np.float32)}


def refused_in(proto, *batches, wrong=None):
    """The axes that are refused by block, after one was mistaken, if there is one."""
    model = from_proto(proto)
    catalog = find_blocks(model)
    assert all(axes_of(block) for block in catalog.blocks), "or there is nothing to find out"
    blocks = [
        mistaken(block, "gain", 1.5) if block.id == wrong else block for block in catalog.blocks
    ]
    found = confirmed(model, replace(catalog, blocks=tuple(blocks)), batches)
    return {block.id: tuple(block.refused) for block in found.blocks if block.refused}


def test_an_output_of_another_size_is_another_output(monkeypatch):
    model = from_proto(TINY["mlp"](0).proto)
    catalog, batches = find_blocks(model), [feeds(model.proto(), 2, 5)]
    carried_out = confirm.carried_out

    def twice(*given):
        graph = carried_out(*given)
        (block,) = catalog.blocks
        (down,) = (node for node in graph.nodes if node.name == block.down.node)
        doubled = gs.Variable("doubled", dtype=np.float32)
        graph.nodes.append(gs.Node("Concat", "twice", {"axis": 0}, 2 * down.inputs[:1], [doubled]))
        down.inputs[0] = doubled
        return graph.toposort()

    assert axes_of(confirmed(model, catalog, batches).blocks[0]) == ("mlp",)
    monkeypatch.setattr(confirm, "carried_out", twice)
    assert axes_of(confirmed(model, catalog, batches).blocks[0]) == ()


def test_what_only_all_axes_together_show_refuses_all(monkeypatch):
    def errors(self, catalog):
        return {b.id: 1.0 if len(axes_of(b)) == 2 else 0.0 for b in catalog.blocks}

    monkeypatch.setattr(Dense, "errors", errors)
    found = refused_in(TINY["transformer"](0).proto, x_of())
    assert found == {"attention.0": ("qk", "vo"), "attention.1": ("qk", "vo")}


def test_what_draws_random_numbers_says_nothing():
    net = Net(0)
    heads = (split_heads(net, part) for part in projections(net))
    mixed = mix(net, *heads, lambda net, y: net("Add", y, net("RandomNormalLike", y)))
    assert refused_in(net.build(merge_heads(net, mixed)), x_of()) == {}


def test_a_product_that_another_block_reads_is_still_compared():
    """One head mixes the input itself, and an MLP reads that."""
    net = Net(0)
    net.x()
    query, key = (net.linear("x", WIDTH, 6) for _ in range(2))
    logits = net("MatMul", query, net("Transpose", key, perm=[0, 2, 1]))
    mixed = net("MatMul", net("Softmax", logits, axis=-1), "x")
    proto = net.build(net.linear(net("Relu", net.linear(mixed, WIDTH, HIDDEN)), HIDDEN, WIDTH))
    model = from_proto(proto)
    catalog = find_blocks(model)
    assert [axes_of(block) for block in catalog.blocks] == [("qk",), ("mlp",)]
    wrong = mistaken(catalog.blocks[0], "gain", 1.5)
    for attention, axes in ((catalog.blocks[0], ("qk",)), (wrong, ())):
        blocks = (attention, *catalog.blocks[1:])
        found = confirmed(model, replace(catalog, blocks=blocks), [x_of()])
        assert [axes_of(block) for block in found.blocks] == [axes, ("mlp",)]


@pytest.mark.parametrize("at", [0, 1])
def test_a_block_that_scales_another_takes_nobody_with_it(at):
    net = Net(0)
    x = net.x()
    gate = net.linear(net("Relu", net.linear(x, WIDTH, HIDDEN)), HIDDEN, WIDTH)
    gate = net("Sigmoid", net("ReduceMean", gate, [-1], keepdims=1))
    hidden = net("Mul", net("Relu", net.linear(x, WIDTH, HIDDEN)), gate)
    wrong = f"mlp.{at}"
    assert refused_in(net.build(net.linear(hidden, HIDDEN, WIDTH)), x_of(), wrong=wrong) == {
        wrong: ("mlp",)
    }


def test_a_dense_model_that_fails_is_no_block_that_was_misread():
    proto = TINY["transformer"](0).proto
    with pytest.raises(DataError, match="the model also reads x"):
        refused_in(proto, {"y": x_of()["x"]})
    with pytest.raises(DataError, match="cannot run the model on inputs of shape"):
        refused_in(proto, {"x": x_of()["x"][..., :-1]})


def test_samples_are_run_as_many_at_once_as_before():
    """As of a model of videos, where four samples are one."""
    net = Net(0)
    y = net.linear(net("Relu", net.linear(net.x(), WIDTH, HIDDEN)), HIDDEN, WIDTH)
    four = net("ReduceMean", net("Reshape", y, [-1, 4, 5, WIDTH]), [1], keepdims=0)
    y = net.linear(net("Relu", net.linear(four, WIDTH, HIDDEN)), HIDDEN, WIDTH)
    assert refused_in(net.build(y), x_of(8, 5)) == {}


def test_of_every_shape_a_few_samples_are_run_in_the_batches_they_come_in():
    sizes = [(1, 5), (4, 6), (3, 5), (2, 9), (1, 7), (5, 6), (8, 6), (1, 5)]
    few = _few(x_of(*size) for size in sizes)
    assert [one["x"].shape[:2] for one in few] == [(4, 6), (5, 6), (1, 5), (3, 5), (1, 5), (2, 9)]


@pytest.mark.parametrize("bias", [0, 30])
def test_float16_may_round_more(bias):
    """A bias of all keys adds the same to all logits of a row, to be lost in Softmax again."""
    net = Net(0, dtype=np.float16)
    query, key, value = projections(net)
    heads = (split_heads(net, part) for part in (query, net("Add", key, np.float16(bias)), value))
    batch = {"x": x_of(tokens=20)["x"].astype(np.float16)}
    assert refused_in(net.build(merge_heads(net, mix(net, *heads))), batch) == {}


# By the command


@pytest.fixture
def oblong(tmp_path):
    """A model that scales its queries by the aspect ratio, and pictures that are not square."""
    onnx.save(by_aspect(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **pictures(48, 96, samples=40))
    return tmp_path


@pytest.mark.parametrize("earlier", [False, True], ids=["data", "statistics"])
def test_what_is_not_confirmed_stays_and_the_rest_is_cut(earlier, oblong, command):
    given = "--data", oblong / "data.npz"
    if earlier:
        statistics = oblong / "statistics.npz"
        assert command("calibrate", oblong / "model.onnx", *given, "-o", statistics).status == 0
        given = "--stats", statistics
    shares = "--qk", 0.5, "--vo", 0.5, "--align", 1
    ended = command(
        "prune", oblong / "model.onnx", *given, "-o", oblong / "o.onnx", *shares, "--json"
    )
    assert ended.status == 0
    assert "attention.0 qk is left as it is: written in another basis" in ended.message
    document = json.loads(ended.stdout)
    assert [list(block["cuts"]) for block in document["blocks"]] == [["vo"]]
    assert "(relative squared error)" in document["uncut"][0]["reason"]
    before, after = (
        run(onnx.load(oblong / name), pictures(48, 96))[0] for name in ("model.onnx", "o.onnx")
    )
    assert squared_error(after, before) < 0.5


def test_where_nothing_is_confirmed_the_reason_is_told(oblong, command):
    given = "--data", oblong / "data.npz", "-o", oblong / "o.onnx", "--align", 1
    ended = command("prune", oblong / "model.onnx", *given, "--qk", 0.5)
    assert ended.status == 3
    assert "attention.0 qk: written in another basis" in ended.message
    assert not (oblong / "o.onnx").exists()
