"""Models of sound: sizes at which convolutions leave nothing tell nothing of the model."""

from __future__ import annotations

import numpy as np
import pytest

from corp_onnx.blocks import find_blocks
from corp_onnx.graph.extracts import extract
from corp_onnx.graph.macs import count
from corp_onnx.graph.model import from_proto
from corp_onnx.graph.shapes import evaluate, usual_facts, usual_sequence
from corp_onnx.graph.varied import probed
from corp_onnx.plan import uniform
from corp_onnx.session import open_session
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from corp_onnx.verify.checks import check_structure
from tests.builders import HEAD, HEADS, WIDTH, Net, merge_heads, mix, projections, residual_block
from tests.full_width import narrowed, run, squared_error, unchanged


def sound(kernels):
    """Samples become tokens by convolutions, as in wav2vec 2.0; then two blocks."""
    net = Net(0)
    y, channels = net("Unsqueeze", net.x("batch", "samples"), [1]), 1
    for kernel, stride in kernels:
        weight = net.random(WIDTH, channels, kernel, gain=1 / np.sqrt(kernel * channels))
        y = net("Conv", y, weight, kernel_shape=[kernel], strides=[stride])
        y, channels = net("Relu", y), WIDTH
    y = net("Transpose", y, perm=[0, 2, 1])
    sizes = net("Shape", y)
    batch, tokens = (net("Gather", sizes, np.int64(axis), axis=0) for axis in (0, 1))
    target = net(
        "Concat",
        *(net("Unsqueeze", size, [0]) for size in (batch, tokens)),
        np.array([HEADS]),
        np.array([HEAD]),
        axis=0,
    )
    heads = [
        net("Transpose", net("Reshape", each, target), perm=[0, 2, 1, 3])
        for each in projections(net, y)
    ]
    y = net("Add", y, merge_heads(net, mix(net, *heads)))
    return from_proto(net.build(residual_block(net, y)))


WAV2VEC = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
"""Kernels and strides: a token sees 400 samples."""


@pytest.mark.parametrize(
    "kernels", [((12, 4),), ((100, 50),), WAV2VEC], ids=["12", "100", "wav2vec"]
)
def test_blocks_are_found_and_cut_however_long_a_sample_has_to_be(kernels):
    model = sound(kernels)
    catalog = find_blocks(model)
    assert [block.id for block in catalog.blocks] == ["attention.0", "mlp.0"] or (
        len(catalog.blocks) == 3
    )
    assert all(facts.filled == len(facts.shapes) for facts in probed(model.graph))
    given = {"x": np.random.default_rng(0).standard_normal((2, 2000), dtype=np.float32)}
    (dense,) = run(model, given)
    (same,) = run(operate(model, catalog, unchanged(model, catalog)).model, given)
    assert squared_error(same, dense) < 1e-10
    surgery = operate(model, catalog, narrowed(turned(model, catalog), 0.5))
    plan = uniform(catalog, {"mlp": 0.5, "qk": 0.5, "vo": 0.5}, align=1)
    check = check_structure(plan, surgery.model, model, find_blocks(surgery.model))
    assert check.passed, check
    assert 0 < surgery.pruned.total < surgery.dense.total


def test_multiply_adds_are_counted_where_tokens_are_left():
    model = sound(WAV2VEC)
    assert usual_sequence(model.graph) == 4000
    counts = count(model.graph, usual_facts(model.graph))
    short = count(model.graph, evaluate(model.graph, {"x": (1, 128)}))
    assert counts.total > 10 * short.total
    assert usual_sequence(sound(((12, 4),)).graph) == 128


def test_sizes_below_zero_are_not_taken_for_sizes():
    facts = evaluate(sound(((100, 50),)).graph, {"x": (1, 5)})
    assert all(min(shape, default=1) >= 0 for shape in facts.shapes.values())


def test_what_flows_into_a_part_has_its_type_and_as_many_axes():
    """A size that one part computes and another reads is a number, not a tensor of unknown rank."""
    net = Net(0)
    y = net("Relu", net.x())
    tokens = net("Gather", net("Shape", y), np.int64(1), axis=0)
    target = net("Concat", np.array([-1]), net("Unsqueeze", tokens, [0]), np.array([WIDTH]), axis=0)
    model = from_proto(net.build(net("Reshape", net("Neg", y), target)))
    like = {tokens: np.array(7), y: np.zeros((2, 7, WIDTH), np.float32)}
    part = extract(model, like, [model.graph.outputs[0].name], like)
    inputs = {value.name: value.type.tensor_type for value in part.proto().graph.input}
    assert {name: len(kind.shape.dim) for name, kind in inputs.items()} == {tokens: 0, y: 3}
    assert all(kind.HasField("shape") for kind in inputs.values())
    (found,) = open_session(part).run(like).values()
    assert found.shape == (2, 7, WIDTH)
