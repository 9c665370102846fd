"""Where blocks end up: the stream, and what their branch is scaled by."""

from __future__ import annotations

import numpy as np
import pytest

from corp_onnx.blocks import find_blocks
from corp_onnx.blocks.linear import weight_of
from corp_onnx.graph.extracts import exposed
from corp_onnx.graph.model import from_proto
from corp_onnx.graph.shapes import evaluate
from corp_onnx.sequential.streams import stream_behind
from corp_onnx.session import open_session
from tests import stream_builders
from tests.builders import TINY, WIDTH, Net, feeds
from tests.stream_builders import LAYERS, feed, stacked
from tests.tolerances import distance, rounding

ROUNDING = rounding(width=200, dtype=np.float32)


def streams_of(proto):
    model = from_proto(proto)
    catalog = find_blocks(model)
    facts = evaluate(model.graph, catalog.sizes)
    return model, [stream_behind(model, facts, block) for block in catalog.blocks]


def maker(model, stream):
    return model.graph.tensors()[stream.tensor].inputs[0]


OTHERS = {
    "gemm": stream_builders.gemm(),
    "convolutions": stream_builders.convolutions(),
    **{name: stacked(name) for name in LAYERS if name not in {"chained", "differential"}},
}


def assert_is_in_the_stream(proto):
    """Add to the bias of a last layer: the stream moves by as much times the gain."""
    model, streams = streams_of(proto)
    given = feeds(proto, 2, 5)
    for stream in streams:
        moved, change = shifted(model, stream)
        before, after = (
            open_session(exposed(each, stream.ends)).run(given) for each in (model, moved)
        )
        delta = stream.vectors(after[stream.tensor]) - stream.vectors(before[stream.tensor])
        size = np.abs(stream.vectors(before[stream.tensor])).max()
        assert np.abs(delta - stream.gain * change).max() <= ROUNDING * (size + 10)
        assert np.abs(delta).max() > 0.01


def shifted(model, stream):
    """The model with another bias behind a last layer."""
    change = np.linspace(-1, 1, stream.linear.width_out)
    graph = model.graph.copy()
    nodes = {node.name: node for node in graph.nodes}
    node = nodes[stream.linear.bias_node or stream.linear.node]
    slot = 2 if len(node.inputs) > 2 else [hasattr(t, "values") for t in node.inputs].index(True)
    bias = node.inputs[slot]
    node.inputs[slot] = type(bias)("shifted", bias.values + change.astype(bias.values.dtype))
    return model.with_graph(graph), change


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_last_layer_adds_arrives_in_the_stream_times_its_gain(name):
    assert_is_in_the_stream(OTHERS[name])


def test_a_gain_that_is_forgotten_is_noticed(monkeypatch):
    monkeypatch.setattr("corp_onnx.sequential.streams._per_channel", lambda *_: np.ones(WIDTH))
    with pytest.raises(AssertionError):
        assert_is_in_the_stream(OTHERS["layer_scale"])


@pytest.mark.parametrize("name", OTHERS)
def test_every_branch_joins_something(name):
    model, streams = streams_of(OTHERS[name])
    assert len(streams) == (2 if name in {"gemm", "convolutions"} else 4)
    for stream in streams:
        assert maker(model, stream).op == "Add"
        assert stream.tensor != stream.linear.output
        assert (stream.gain == 1).all() == (name not in {"layer_scale", "convolutions"})


def test_parallel_branches_share_one_stream():
    _, streams = streams_of(OTHERS["parallel"])
    assert [stream.tensor for stream in streams[:2]] == [streams[0].tensor] * 2
    assert streams[2].tensor == streams[3].tensor != streams[0].tensor


def test_channels_on_axis_one_become_vectors():
    _, (stream, _) = streams_of(OTHERS["convolutions"])
    x = np.arange(2 * WIDTH * 12.0).reshape(2, WIDTH, 3, 4)
    vectors = stream.vectors(x)
    assert vectors.shape == (24, WIDTH)
    assert np.array_equal(vectors[1], x[0, :, 0, 1])


def test_a_branch_that_joins_nothing_is_its_own_stream():
    _, streams = streams_of(stream_builders.no_stream())
    for stream in streams:
        assert stream.tensor == stream.linear.output
        assert (stream.gain == 1).all()


def test_a_block_without_a_last_layer_ends_in_its_product():
    model = from_proto(TINY["without_output"](0).proto)
    catalog = find_blocks(model)
    stream = stream_behind(model, evaluate(model.graph, catalog.sizes), catalog.blocks[0])
    assert stream.linear is None
    assert maker(model, stream).name == catalog.blocks[0].products[-1]


@pytest.mark.parametrize("factor", ["zero", "per token", "from the data"])
def test_what_is_no_gain_ends_the_walk(factor):
    net = Net(0)
    branch = feed(net, net.x("batch", 5, WIDTH))
    by = {
        "zero": lambda: np.r_[0.0, np.ones(WIDTH - 1)],
        "per token": lambda: net.random(5, 1),
        "from the data": lambda: net("Sigmoid", "x"),
    }[factor]()
    _, (stream,) = streams_of(net.build(net("Add", net("Mul", branch, by), "x")))
    assert stream.tensor == stream.linear.output


def test_a_sum_that_is_read_twice_or_shown_is_where_the_walk_ends():
    net = Net(0)
    joined = net("Add", feed(net, net.x()), "x")
    model, (stream,) = streams_of(net.build(joined, net("Add", joined, "x")))
    assert stream.tensor == joined
    assert weight_of({n.name: n for n in model.graph.nodes}, stream.linear, 18).shape[1] == WIDTH
    assert distance(stream.gain, np.ones(WIDTH)) == 0
