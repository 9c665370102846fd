"""What is not what it was read as, at the sizes of the data, is left as it is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

from corp_onnx.blocks import Mlp, axes_of, find_blocks
from corp_onnx.graph.model import from_proto
from corp_onnx.verify import basis
from corp_onnx.verify.basis import confirmed, errors_in_another_basis
from corp_onnx.verify.checks import rounding_error
from tests.attention_builders import MORE
from tests.builders import TINY, WIDTH, Net, feeds, merge_heads, mix, projections, split_heads
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
    errors = errors_in_another_basis(model, catalog, batches)
    assert errors.keys() == {block.id for block in catalog.blocks if axes_of(block)}
    assert all(error <= rounding_error(model) for error in errors.values()), errors
    refused = [block.refused for block in confirmed(model, catalog, batches).blocks]
    assert refused == [block.refused for block in catalog.blocks]


def mistaken(block, mistake):
    """A block with something about it that is not so."""
    if isinstance(block, Mlp):
        source, *others = block.sources
        wrong = replace(source, channels=source.channels[::-1])
        return replace(block, sources=(wrong, *others))
    if mistake == "places":
        return replace(block, output=replace(block.output, places=block.output.places[::-1]))
    if mistake == "gain":
        return replace(block, query=replace(block.query, gain=block.query.gain * 1.01))
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
    monkeypatch.setattr(basis, "errors_in_another_basis", lambda *_: {"mlp.0": np.nan})
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
