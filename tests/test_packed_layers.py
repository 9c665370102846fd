"""One layer computes an attention's projections and the hidden channels of an MLP beside it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest

from corp_onnx.blocks import Mlp, axes_of, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.graph.model import from_proto
from corp_onnx.plan import uniform
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from corp_onnx.verify.checks import check_promises
from corp_onnx.verify.promise import measured_errors
from tests.builders import (
    HEAD,
    HEADS,
    HIDDEN,
    WIDTH,
    Net,
    feeds,
    merge_heads,
    mix,
    relu,
    split_heads,
)
from tests.full_width import narrowed, padded, run, squared_error, unchanged

SIZE = HEADS * HEAD
SIZES = ((1, 5), (3, 7))
BOUND, VISIBLE = 1e-10, 1e-6
"""As in ``test_surgery``: rounding in float32, and the least that a mistake does."""

MLP, ATTENTION = ("mlp", HIDDEN), ("attention", ("qk", "vo"))


def attended(net, parts):
    return merge_heads(net, mix(net, *(split_heads(net, part) for part in parts)))


def side_by_side(net):
    """As in ViT-22B and timm's parallel blocks."""
    *parts, hidden = net("Split", net.linear(net.x(), WIDTH, 3 * SIZE + HIDDEN),
                         [SIZE] * 3 + [HIDDEN], outputs=4, axis=2)  # fmt: skip
    return net("Add", attended(net, parts), net.linear(relu(net, hidden), HIDDEN, WIDTH))


def sliced(net):
    """The hidden channels come first, and are cut out by their places."""
    whole = net.linear(net.x(), WIDTH, 3 * SIZE + HIDDEN, bias=False)
    places = [0, HIDDEN, HIDDEN + SIZE, HIDDEN + 2 * SIZE, HIDDEN + 3 * SIZE]
    hidden, *parts = (
        net("Slice", whole, [start], [end], [2]) for start, end in itertools.pairwise(places)
    )
    return net("Add", attended(net, parts), net.linear(relu(net, hidden), HIDDEN, WIDTH))


def late_bias(net):
    """No layer has a bias; hidden channels get theirs behind the Split, as in timm."""
    hidden, *parts = net("Split", net.linear(net.x(), WIDTH, 3 * SIZE + HIDDEN, bias=False),
                         [HIDDEN] + [SIZE] * 3, outputs=4, axis=2)  # fmt: skip
    hidden = relu(net, net("Add", hidden, net.random(HIDDEN)))
    return net("Add", attended(net, parts), net.linear(hidden, HIDDEN, WIDTH))


def late_biases(net):
    """The same of two hidden axes in one layer."""
    made = net("Split", net.linear(net.x(), WIDTH, HIDDEN + 6, bias=False), [HIDDEN, 6],
               outputs=2, axis=2)  # fmt: skip
    total = "x"
    for part, width in zip(made, (HIDDEN, 6), strict=True):
        hidden = relu(net, net("Mul", net("Add", part, net.random(width)), net.random(width)))
        total = net("Add", total, net.linear(hidden, width, WIDTH))
    return total


def gated(net):
    """A packed gate beside packed projections, taken apart in two steps."""
    whole = net.linear(net.x(), WIDTH, 3 * SIZE + 2 * HIDDEN)
    parts, both = net("Split", whole, [3 * SIZE, 2 * HIDDEN], outputs=2, axis=2)
    parts = net("Split", parts, [SIZE] * 3, outputs=3, axis=2)
    gate, up = net("Split", both, [HIDDEN] * 2, outputs=2, axis=2)
    hidden = net("Mul", net("Sigmoid", gate), up)
    return net("Add", attended(net, parts), net.linear(hidden, HIDDEN, WIDTH))


def rotated(net):
    """Queries and keys are changed on their way, and have to come back as they were."""
    *parts, hidden = net("Split", net.linear(net.x(), WIDTH, 3 * SIZE + HIDDEN),
                         [SIZE] * 3 + [HIDDEN], outputs=4, axis=2)  # fmt: skip
    query, key = (net("LayerNormalization", split_heads(net, part), net.random(HEAD))
                  for part in parts[:2])  # fmt: skip
    y = merge_heads(net, mix(net, query, key, split_heads(net, parts[2])))
    return net("Add", y, net.linear(relu(net, hidden), HIDDEN, WIDTH))


def with_another_output(net):
    """What is packed with hidden channels is read by something that is no attention."""
    hidden, rest = net("Split", net.linear(net.x(), WIDTH, HIDDEN + WIDTH), [HIDDEN, WIDTH],
                       outputs=2, axis=2)  # fmt: skip
    return net("Add", net("Sigmoid", rest), net.linear(relu(net, hidden), HIDDEN, WIDTH))


def two_hidden_axes(net):
    first, second = net("Split", net.linear(net.x(), WIDTH, HIDDEN + 6), [HIDDEN, 6],
                        outputs=2, axis=2)  # fmt: skip
    y = net.linear(relu(net, first), HIDDEN, WIDTH)
    return net("Add", y, net.linear(net("Tanh", second), 6, WIDTH))


def sizes_read(net):
    """Sizes of the whole layer and of a part of it scale the result."""
    whole = net.linear(net.x(), WIDTH, 3 * SIZE + HIDDEN)
    *parts, hidden = net("Split", whole, [SIZE] * 3 + [HIDDEN], outputs=4, axis=2)
    y = net("Add", attended(net, parts), net.linear(relu(net, hidden), HIDDEN, WIDTH))
    for tensor in (whole, parts[0]):
        size = net("ReduceProd", net("Shape", tensor), keepdims=0)
        y = net("Mul", y, net("Mul", net("Cast", size, to=onnx.TensorProto.FLOAT), 0.01))
    return y


def behind_another(net):
    """The packed layer ends an MLP, which gives it a bias that it does not have."""
    before = net("Tanh", net.linear(net.x(), WIDTH, 6))
    whole = net.linear(before, 6, WIDTH + HIDDEN, bias=False)
    rest, hidden = net("Split", whole, [WIDTH, HIDDEN], outputs=2, axis=2)
    return net("Add", net("Sigmoid", rest), net.linear(relu(net, hidden), HIDDEN, WIDTH))


def of_pixels(net):
    """Channels on axis 1: a convolution over points."""
    net.x("batch", WIDTH, "tokens", 3)
    whole = net("Conv", "x", net.random(SIZE + HIDDEN, WIDTH, 1, 1), net.random(SIZE + HIDDEN))
    rest, hidden = net("Split", whole, [SIZE, HIDDEN], outputs=2, axis=1)
    y = net("Conv", relu(net, hidden), net.random(SIZE, HIDDEN, 1, 1), net.random(SIZE))
    return net("Add", net("Sigmoid", rest), y)


FORMS = {
    "side_by_side": (side_by_side, [MLP, ATTENTION]),
    "sliced": (sliced, [MLP, ATTENTION]),
    "late_bias": (late_bias, [MLP, ATTENTION]),
    "late_biases": (late_biases, [MLP, ("mlp", 6)]),
    "gated": (gated, [MLP, ATTENTION]),
    "rotated": (rotated, [MLP, ("attention", ("vo",))]),
    "with_another_output": (with_another_output, [MLP]),
    "two_hidden_axes": (two_hidden_axes, [MLP, ("mlp", 6)]),
    "sizes_read": (sizes_read, [MLP, ATTENTION]),
    "behind_another": (behind_another, [MLP, ("mlp", 6)]),
    "of_pixels": (of_pixels, [MLP]),
}
ALL = pytest.mark.parametrize("name", FORMS)


@cache
def found(name):
    net = Net(0)
    model = from_proto(net.build(FORMS[name][0](net)))
    return model, find_blocks(model)


def inputs_of(name):
    return [feeds(found(name)[0].proto(), *size) for size in SIZES]


def errors(name, one, other):
    given = inputs_of(name)
    return [squared_error(*pair) for pair in zip(run(one, *given), run(other, *given), strict=True)]


def summary(block):
    if isinstance(block, Mlp):
        return ("mlp", block.width)
    return ("attention", axes_of(block))


@ALL
def test_both_blocks_are_found(name):
    _, catalog = found(name)
    assert sorted(map(summary, catalog.blocks)) == sorted(FORMS[name][1])


@ALL
@pytest.mark.parametrize("make", [unchanged, turned])
def test_keeping_every_channel_gives_back_the_dense_function(name, make):
    model, catalog = found(name)
    made = operate(model, catalog, make(model, catalog)).model
    onnx.checker.check_model(made.proto(), full_check=True)
    assert max(errors(name, made, model)) <= BOUND


@ALL
def test_every_axis_can_be_turned_alone(name):
    model, catalog = found(name)
    full = turned(model, catalog)
    for fold in full.folds:
        made = operate(model, catalog, replace(full, folds=(fold,))).model
        assert max(errors(name, made, model)) <= BOUND


@ALL
def test_a_narrow_cut_computes_what_zeros_at_full_width_do(name):
    model, catalog = found(name)
    full = turned(model, catalog)
    small = operate(model, catalog, narrowed(full, 0.5)).model
    large = operate(model, catalog, padded(full, 0.5)).model
    assert max(errors(name, small, large)) <= BOUND
    assert min(errors(name, small, model)) > VISIBLE
    again = find_blocks(small)
    assert {summary(block)[0] for block in again.blocks} == {
        summary(block)[0] for block in catalog.blocks
    }


@ALL
def test_a_part_that_is_written_wrong_shows(name):
    """The parts beside the hidden channels are permuted."""
    model, catalog = found(name)
    wrong = tuple(
        replace(block, fragments=tuple(map(swapped, block.fragments)))
        if isinstance(block, Mlp)
        else block
        for block in catalog.blocks
    )
    packed = {b.id for b in catalog.blocks if isinstance(b, Mlp) and b.fragments}
    only = [fold for fold in unchanged(model, catalog).folds if fold.block in packed]
    solution = replace(unchanged(model, catalog), folds=(only[0],))
    made = operate(model, replace(catalog, blocks=wrong), solution).model
    assert min(errors(name, made, model)) > VISIBLE


def swapped(route):
    return replace(route, channels=np.roll(route.channels, 1, axis=0))


def test_a_bias_that_the_packed_layer_was_given_is_kept():
    """By the MLP that ends in it: what follows is the same whether it is taken apart or not."""
    model, catalog = found("behind_another")
    full = unchanged(model, catalog)
    ends = next(b.id for b in catalog.blocks if b.down.width_out == WIDTH + HIDDEN)
    folds = tuple(
        replace(fold, bias=fold.bias + 1) if fold.block == ends else fold for fold in full.folds
    )
    both = operate(model, catalog, replace(full, folds=folds)).model
    one = replace(full, folds=tuple(fold for fold in folds if fold.block == ends))
    alone = operate(model, catalog, one).model
    assert max(errors("behind_another", both, alone)) <= BOUND
    assert min(errors("behind_another", both, model)) > VISIBLE


@pytest.mark.parametrize("name", ["side_by_side", "gated", "rotated"])
def test_a_layer_is_counted_once(name):
    _, catalog = found(name)
    assert sum(catalog.macs_by_block.values()) == catalog.macs


@pytest.mark.parametrize("name", ["side_by_side", "gated"])
def test_what_is_solved_for_is_what_is_measured(name):
    model, catalog = found(name)
    batches = [feeds(model.proto(), 8, 9, seed) for seed in range(3)]
    statistics = gather(model, catalog, batches)
    solution = solve(
        model, catalog, uniform(catalog, {"mlp": 0.5, "qk": 0.5}), statistics, Recipe("corp")
    )
    small = operate(model, catalog, solution).model
    measured = measured_errors(model, catalog, small, find_blocks(small), batches)
    promises = check_promises(solution, measured)
    assert promises.passed, promises.found


def refusal_of(net, *outputs):
    catalog = find_blocks(from_proto(net.build(*outputs)))
    assert all(not isinstance(block, Mlp) for block in catalog.blocks)
    return " ".join(item.reason for item in catalog.refusals)


def test_hidden_channels_that_are_read_beside_are_refused():
    net = Net(0)
    whole = net.linear(net.x(), WIDTH, WIDTH + HIDDEN)
    rest, hidden = net("Split", whole, [WIDTH, HIDDEN], outputs=2, axis=2)
    y = net.linear(relu(net, hidden), HIDDEN, WIDTH)
    again = net("Slice", whole, [WIDTH + 2], [WIDTH + 5], [2])
    reason = refusal_of(net, net("Add", y, rest), net("Exp", again))
    assert "its hidden channels are also read as" in reason


def test_a_layer_that_is_read_as_a_whole_is_refused():
    net = Net(0)
    whole = net.linear(net.x(), WIDTH, WIDTH + HIDDEN)
    rest, hidden = net("Split", whole, [WIDTH, HIDDEN], outputs=2, axis=2)
    y = net("Add", net.linear(relu(net, hidden), HIDDEN, WIDTH), rest)
    reason = refusal_of(net, y, net("Exp", whole))
    assert f"its hidden channels are also read as {whole!r}" in reason


def test_hidden_channels_that_something_else_reads_are_refused_still():
    net = Net(0)
    *parts, hidden = net("Split", net.linear(net.x(), WIDTH, 3 * SIZE + HIDDEN),
                         [SIZE] * 3 + [HIDDEN], outputs=4, axis=2)  # fmt: skip
    y = net("Add", attended(net, parts), net.linear(relu(net, hidden), HIDDEN, WIDTH))
    assert f"{hidden!r} is also read by Exp" in refusal_of(net, y, net("Exp", hidden))


def test_an_output_layer_of_both_keeps_its_width():
    """Mixed values and hidden channels end in one layer, which reads them joined."""
    net = Net(0)
    *parts, hidden = net("Split", net.linear(net.x(), WIDTH, 3 * SIZE + HIDDEN),
                         [SIZE] * 3 + [HIDDEN], outputs=4, axis=2)  # fmt: skip
    mixed = mix(net, *(split_heads(net, part) for part in parts))
    rows = net("Reshape", net("Transpose", mixed, perm=[0, 2, 1, 3]), [0, 0, SIZE])
    both = net("Concat", rows, relu(net, hidden), axis=2)
    proto = net.build(net.linear(both, SIZE + HIDDEN, WIDTH))
    catalog = find_blocks(from_proto(proto))
    (block,) = catalog.blocks
    assert axes_of(block) == ("qk",)
    assert "Concat (Concat_" in block.refused["vo"]
    assert any("which mixes channels" in item.reason for item in catalog.refusals)
