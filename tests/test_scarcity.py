"""How many samples are enough, and what is left alone where they are not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from corp_onnx.blocks import axes_of, find_blocks
from corp_onnx.calibration.calibrate import calibrate
from corp_onnx.calibration.scarcity import require_enough, spared
from corp_onnx.errors import NothingPrunable, TooFewSamples
from corp_onnx.graph.model import Model, from_proto, load, save
from corp_onnx.pipeline import Settings, prune
from corp_onnx.report.results import pruned_json
from corp_onnx.solve import Recipe
from tests.builders import (
    HEAD,
    HEADS,
    HIDDEN,
    WIDTH,
    Net,
    merge_heads,
    mix,
    mlp,
    relu,
    split_heads,
)
from tests.inputs import activations, dataset
from tests.test_calibrate import gathered

ALL_THREE = {"mlp": 0.5, "qk": 0.5, "vo": 0.5}
FEW, LEFT = 10, {("attention.0", "vo"), ("mlp.1", "mlp")}
"""Eight of ten samples are calibrated on: more than a head's channels, fewer than all others."""


@pytest.fixture(scope="module")
def pooled() -> Model:
    """An MLP of all tokens, an attention that asks with their mean, and an MLP of what it finds."""
    net = Net(0)
    y = net("Add", net.x(), mlp(net, "x", relu))
    mean = net("ReduceMean", y, [1], keepdims=1)
    parts = [net.linear(tokens, WIDTH, HEADS * HEAD) for tokens in (mean, y, y)]
    found = merge_heads(net, mix(net, *(split_heads(net, part) for part in parts)))
    z = net("Add", mean, found)
    return from_proto(net.build(net("Add", z, mlp(net, z, relu))))


def test_too_few_tokens_are_an_error_that_says_how_many_samples_are_needed(tiny, caplog):
    model = tiny("mlp")
    catalog = find_blocks(model)
    with pytest.raises(TooFewSamples, match=f"fewer than the {HIDDEN} channels") as caught:
        calibrate(model, catalog, dataset(model, x=activations(2, 6)))
    needed = int(re.search(r"at least (\d+) samples", str(caught.value)).group(1))

    calibrate(model, catalog, dataset(model, x=activations(needed, 6)))
    assert not caplog.records
    calibrate(model, catalog, dataset(model, x=activations(needed - 4, 6)))
    assert "tokens per channel" in caplog.text


def test_the_widest_axis_decides_how_many_are_needed(tiny):
    model = tiny("transformer")
    with pytest.raises(TooFewSamples, match=r"14 channels of mlp\.0\.hidden"):
        calibrate(model, find_blocks(model), dataset(model, x=activations(3, 2)))


def test_below_ten_tokens_per_channel_there_is_a_warning(tiny, caplog):
    found = gathered(tiny("mlp"), {"x": activations(10 * HIDDEN - 1, 1)})
    require_enough(found)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "mlp.0.hidden has only 9.9 tokens per channel" in record.getMessage()


def test_several_sites_of_few_tokens_are_one_warning(tiny, caplog):
    require_enough(gathered(tiny("transformer"), {"x": activations(4, 6)}))
    (record,) = caplog.records
    assert re.search(
        r"mlp\.0\.hidden has only .*, and \d other sites have few", record.getMessage()
    )


def test_ten_tokens_per_channel_are_enough(tiny, caplog):
    require_enough(gathered(tiny("mlp"), {"x": activations(10 * HIDDEN, 1)}))
    assert not caplog.records


# What sees one token of a sample


@pytest.fixture
def cut(pooled, tmp_path):
    """Prunes the pooled model with so many samples."""
    save(pooled, tmp_path / "dense.onnx")

    def prune_with(samples, shares=ALL_THREE, method="best", knowledge=None):
        return prune(
            tmp_path / "dense.onnx",
            tmp_path / "small.onnx",
            knowledge or (lambda model: dataset(model, x=activations(samples))),
            shares_removed=shares,
            settings=Settings(align=1, recipe=Recipe(method)),
        )

    return prune_with


def widths(result):
    return {(cut.block, cut.axis): cut.to / cut.width for cut in result.plan.cuts}


@pytest.mark.parametrize("method", ["best", "corp"])
def test_what_sees_one_token_of_a_sample_is_left_alone_where_there_are_few(cut, caplog, method):
    result = cut(FEW, method=method)
    assert widths(result) == {("mlp.0", "mlp"): 0.5, ("attention.0", "qk"): 0.5}
    uncut = pruned_json(result, "")["uncut"]
    assert {(entry["block"], entry["axis"]) for entry in uncut} == LEFT
    (vo,) = (entry["reason"] for entry in uncut if entry["axis"] == "vo")
    assert "8 samples are fewer than its 12 channels" in vo
    assert f"attention.0 vo is left as it is: {vo}; so are 1 more" in caplog.text


def test_as_many_samples_as_were_asked_for_are_enough_to_cut_it(cut, caplog):
    cut(FEW)
    (needed,) = re.findall(r"give at least (\d+) to cut it; so are 1 more", caplog.text)
    caplog.clear()
    assert widths(cut(int(needed))) == dict.fromkeys(
        [("mlp.0", "mlp"), ("attention.0", "qk"), ("attention.0", "vo"), ("mlp.1", "mlp")], 0.5
    )
    assert "single token" not in caplog.text


def test_statistics_spare_the_same(cut, tmp_path):
    model = load(tmp_path / "dense.onnx")
    data = dataset(model, x=activations(FEW))
    calibrate(model, find_blocks(model), data).save(tmp_path / "few.stats")
    result = cut(0, knowledge=tmp_path / "few.stats")
    assert widths(result) == {("mlp.0", "mlp"): 0.5, ("attention.0", "qk"): 0.5}


def test_an_attention_is_not_refitted_where_its_last_layer_has_too_few(cut, caplog):
    result = cut(FEW, {"qk": 0.5})
    assert "attention.0 is not refitted: 8 tokens are fewer than its 12 channels" in caplog.text
    assert [fold.axis for fold in result.solved.solution.folds] == ["qk"]
    assert result.passed


@pytest.mark.parametrize("method", ["best", "corp", "none"])
def test_what_is_not_cut_needs_no_samples(tiny, tmp_path, method):
    """Five samples of two tokens: more than a head has channels, fewer than the MLP."""
    save(tiny("transformer"), tmp_path / "dense.onnx")

    def pruned(shares):
        return prune(
            tmp_path / "dense.onnx",
            tmp_path / "small.onnx",
            lambda model: dataset(model, x=activations(6, 2)),
            shares_removed=shares,
            settings=Settings(align=1, recipe=Recipe(method)),
        )

    assert {axis for _, axis in widths(pruned({"qk": 0.5}))} == {"qk"}
    with pytest.raises(TooFewSamples, match=r"14 channels of mlp\.0\.hidden"):
        pruned({"qk": 0.5, "mlp": 0.5})


def test_nothing_is_written_where_all_that_was_asked_for_is_left_alone(cut, tmp_path):
    with pytest.raises(NothingPrunable, match=r"attention\.0 vo: it sees a single token"):
        cut(FEW, {"vo": 0.5})
    assert not (tmp_path / "small.onnx").exists()


def left(model, statistics):
    """The axes that are left alone."""
    catalog = find_blocks(model)
    return {
        (block.id, axis)
        for block, before in zip(spared(catalog, statistics).blocks, catalog.blocks, strict=True)
        for axis in set(axes_of(before)) - set(axes_of(block))
    }


def test_where_everything_sees_one_token_too_few_are_an_error(pooled):
    """Nothing would be left to cut; the error says what is missing."""
    found = gathered(pooled, {"x": activations(8, 1)})
    assert left(pooled, found) == set()
    with pytest.raises(TooFewSamples, match=r"8 samples give 8 tokens, fewer than the 14 channels"):
        require_enough(found)


def test_crops_of_a_picture_count_as_one(pooled):
    found = replace(gathered(pooled, {"x": activations(8)}), samples=32, crops=4.0)
    assert left(pooled, found) == LEFT
    assert left(pooled, gathered(pooled, {"x": activations(HIDDEN - 1)})) == {("mlp.1", "mlp")}
    assert left(pooled, gathered(pooled, {"x": activations(HIDDEN)})) == set()
