"""Segments: together they are the model, and each knows what it needs and gives."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from corp_onnx.blocks import axes_of, find_blocks
from corp_onnx.blocks.padding import masks_of
from corp_onnx.blocks.records import linears_of
from corp_onnx.blocks.view import constant_value
from corp_onnx.graph.extracts import exposed, extract
from corp_onnx.graph.model import from_proto
from corp_onnx.graph.shapes import evaluate
from corp_onnx.sequential.segments import segments_of
from corp_onnx.sequential.streams import stream_behind
from corp_onnx.session import open_session
from tests import stream_builders, zoo_models
from tests.builders import TINY, feeds
from tests.stream_builders import LAYERS, stacked

MODELS = {
    **{name: stacked(name) for name in LAYERS},
    "gemm": stream_builders.gemm(),
    "convolutions": stream_builders.convolutions(),
    "no_stream": stream_builders.no_stream(),
    "no_last_layer": stream_builders.no_last_layer(),
    **{
        name: TINY[name](0).proto
        for name in (
            *("text_encoder", "mask_keeps", "sizes_read", "mlp_chain", "cross_attention"),
            "mlp_tied_transposed",
        )
    },
}
ZOO = ("hf_bert_sdpa.ts17", "hf_gpt2.dynamo18", "timm_convnext.ts17", "hf_dinov2.ts17")


def cut(model):
    catalog = find_blocks(model)
    blocks = [block for block in catalog.blocks if axes_of(block)]
    facts = evaluate(model.graph, catalog.sizes)
    masks = {block.id: masks_of(block) for block in blocks}
    layers = {block.id: [linear.output for linear in linears_of(block)] for block in blocks}
    streams = [stream_behind(model, facts, block) for block in blocks]
    return blocks, masks, segments_of(model, streams, masks, layers)


def run_one_by_one(model, segments, given):
    """All that any segment ends in, each segment run on what those before it gave."""
    kept, made = dict(given), {}
    for segment in segments:
        fed = {name: kept[name] for name in segment.inputs}
        names = [name for name in segment.ends if name not in fed]
        found = open_session(extract(model, segment.inputs, names, fed)).run(fed)
        made |= found
        kept = {name: ({**kept, **found})[name] for name in segment.later}
    return made


def assert_is_the_model(model, segments, given):
    made = run_one_by_one(model, segments, given)
    for name, dense in open_session(exposed(model, made)).run(given).items():
        if dense.dtype == bool:
            assert np.array_equal(made[name], dense)
            continue
        other = made[name] != dense  # not where a mask holds -inf
        size = np.abs(dense[np.isfinite(dense)]).max(initial=0.0)
        assert (np.abs(made[name][other] - dense[other]) <= 1e-6 * size).all(), name


def test_every_segment_has_the_weights_of_its_layers_as_constants():
    model = from_proto(MODELS["mlp_tied_transposed"])
    blocks, _, segments = cut(model)
    assert len(segments) == len(blocks) == 2
    for block, segment in zip(blocks, segments, strict=True):
        part = extract(model, segment.inputs, segment.ends).graph
        nodes = {node.name: node for node in part.nodes}
        for linear in linears_of(block):
            assert constant_value(nodes[linear.node].inputs[1], part.opset) is not None


@pytest.mark.parametrize("name", MODELS)
def test_segments_one_after_the_other_are_the_dense_model(name):
    model = from_proto(MODELS[name])
    blocks, masks, segments = cut(model)
    assert_is_the_model(model, segments, feeds(MODELS[name], 3, 6))
    found = [stream.block for segment in segments for stream in segment.streams]
    assert found == [block.id for block in blocks]
    known = {name for segment in segments for name in (*segment.inputs, *segment.ends)}
    assert known >= {mask for each in masks.values() for mask in each}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_segments_of_exports_are_the_dense_model(name):
    model = from_proto(zoo_models.load(name))
    _, _, segments = cut(model)
    assert len(segments) > 1
    assert_is_the_model(model, segments, zoo_models.feeds(name, 3))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("pre_norm", [1, 1, 1, 1]),
        ("post_norm", [1, 1, 1, 1]),
        ("layer_scale", [1, 1, 1, 1]),
        ("parallel", [2, 2]),
        ("chained", [2, 2]),
        ("mlp_chain", [2]),
        ("no_stream", [1, 1]),
        ("no_last_layer", [1, 1]),
    ],
)
def test_blocks_of_one_stream_or_one_layer_are_in_one_segment(name, sizes):
    _, _, segments = cut(from_proto(MODELS[name]))
    assert [len(segment.streams) for segment in segments] == sizes


def test_every_node_is_computed_once_and_only_the_stream_is_handed_on():
    _, _, segments = cut(from_proto(MODELS["pre_norm"]))
    assert segments[0].inputs == ("x",)
    for before, behind in itertools.pairwise(segments):
        assert before.outputs == before.later == behind.inputs == (before.streams[0].tensor,)
    assert segments[-1].outputs == ()


def test_a_tensor_that_is_not_handed_on_is_noticed():
    """The wrong twin: the mask of a text is forgotten between two segments."""
    model = from_proto(MODELS["text_encoder"])
    _, _, segments = cut(model)
    given = feeds(MODELS["text_encoder"], 3, 6)
    short = [replace(segments[0], later=segments[0].later[1:]), *segments[1:]]
    with pytest.raises(KeyError):
        run_one_by_one(model, short, given)
