"""One set of weights for several layers: cut once, from what all of them see, and still shared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.errors import TooFewSamples
from corp_onnx.graph.model import from_proto
from corp_onnx.plan import uniform
from corp_onnx.sequential.fit import fit_in_sequence
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import MlpFold
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from corp_onnx.verify.confirm import confirmed
from corp_onnx.verify.promise import measured_errors
from tests.builders import (
    HEAD,
    HEADS,
    HIDDEN,
    WIDTH,
    Net,
    layer_norm,
    mix,
    split_heads,
)
from tests.full_width import run, squared_error
from tests.inputs import activations

HALF = {"mlp": 0.5, "qk": 0.5}


class Layer:
    """The weights of one transformer layer, written into a graph as often as they are used."""

    def __init__(self, net, *, copied=False):
        inner = HEADS * HEAD
        sizes = [(WIDTH, inner)] * 3 + [(inner, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
        self.net, self.copied = net, copied
        self.values = [(net.random(*size, gain=0.6), net.random(size[1])) for size in sizes]
        self.names = [self.constants(place) for place in range(len(sizes))]

    def constants(self, place):
        return tuple(map(self.net.const, self.values[place]))

    def linear(self, place, x):
        weight, bias = self.constants(place) if self.copied else self.names[place]
        return self.net("Add", self.net("MatMul", x, weight), bias)

    def __call__(self, x):
        net, y = self.net, layer_norm(self.net, x)
        heads = [split_heads(net, self.linear(place, y)) for place in range(3)]
        rows = net("Transpose", mix(net, *heads), perm=[0, 2, 1, 3])
        x = net("Add", x, self.linear(3, net("Reshape", rows, [0, 0, HEADS * HEAD])))
        return net("Add", x, self.linear(5, net("Relu", self.linear(4, layer_norm(net, x)))))


def layers(*, copied=False, distinct=False):
    """Two layers of the same weights, perhaps stored twice, or of different weights."""
    net = Net(0)
    x = net.x()
    first = Layer(net, copied=copied)
    second = Layer(net) if distinct else first
    return from_proto(net.build(second(first(x))))


def solved(model):
    catalog = find_blocks(model)
    statistics = gather(model, catalog, [{"x": activations()}])
    plan = uniform(catalog, HALF, align=1)
    return catalog, statistics, solve(model, catalog, plan, statistics, Recipe("corp", ridge=1e-6))


@pytest.mark.parametrize("copied", [False, True])
def test_blocks_of_one_set_of_weights_know_each_other(copied):
    blocks = find_blocks(layers(copied=copied)).blocks
    names = {"attention": ("attention.0", "attention.1"), "mlp": ("mlp.0", "mlp.1")}
    assert [block.twins for block in blocks] == [names[b.id.partition(".")[0]] for b in blocks]


def test_blocks_of_different_weights_do_not():
    assert {block.twins for block in find_blocks(layers(distinct=True)).blocks} == {()}


def test_one_bias_that_differs_parts_them():
    model = layers(copied=True)
    biases = [node.inputs[1] for node in model.graph.nodes if node.op == "Add"]
    hidden = next(bias for bias in biases if bias.shape == (HIDDEN,) or bias.shape == [HIDDEN])
    hidden.values = hidden.values + 1
    parted = [block for block in find_blocks(model).blocks if not block.twins]
    assert [block.id for block in parted] == ["mlp.0", "mlp.1"]


def test_they_are_solved_once_from_what_all_see():
    _, statistics, solution = solved(layers())
    one, other = (fold for fold in solution.folds if isinstance(fold, MlpFold))
    assert one.weight is other.weight
    sites = [statistics.sites[f"mlp.{place}.hidden"] for place in range(2)]
    assert best(sites[0] + sites[1]) == set(one.kept)
    assert best(sites[0]) != set(one.kept)  # so that it matters


def best(moments):
    """The half of the channels with the most energy."""
    return set(np.argsort(-np.diagonal(moments.gram))[: HIDDEN // 2])


def test_promises_are_kept_over_all_of_them():
    model = layers()
    catalog, _, solution = solved(model)
    small = operate(model, catalog, solution).model
    again = find_blocks(small)
    found = measured_errors(model, catalog, small, again, [{"x": activations()}])
    for fold in solution.folds:
        assert found[fold.block, fold.axis] == pytest.approx(fold.evidence.error, rel=1e-3)
    alone = [replace(block, twins=()) for block in catalog.blocks]
    apart = replace(catalog, blocks=tuple(alone))
    parts = measured_errors(model, apart, small, again, [{"x": activations()}])
    assert parts["mlp.0", "mlp"] != pytest.approx(found["mlp.0", "mlp"], rel=1e-2)


@pytest.mark.parametrize("copied", [False, True])
def test_what_was_shared_is_stored_once(copied):
    model = layers(copied=copied)
    catalog, _, solution = solved(model)
    small = operate(model, catalog, solution).model
    assert [block.twins for block in find_blocks(small).blocks] == [b.twins for b in catalog.blocks]
    shapes = [tuple(tensor.dims) for tensor in small.proto().graph.initializer]
    assert shapes.count((WIDTH, HIDDEN // 2)) == 1
    assert shapes.count((HIDDEN // 2, WIDTH)) == 1


def test_the_function_is_the_same_in_another_basis():
    model = layers()
    catalog = find_blocks(model)
    made = operate(model, catalog, turned(model, catalog)).model
    (expected,), (found,) = (run(one, {"x": activations()}) for one in (model, made))
    assert squared_error(found, expected) < 1e-10


def test_what_is_wrong_with_one_of_them_is_wrong_with_all():
    model = layers()
    catalog = find_blocks(model)
    first, *others, last = catalog.blocks
    wrong = replace(last, sources=(replace(last.sources[0], channels=np.arange(HIDDEN)[::-1]),))
    mistaken = replace(catalog, blocks=(first, *others, wrong))
    batch = {"x": activations()[:2].astype(np.float32)}
    found = confirmed(model, mistaken, [batch])
    assert [tuple(block.refused) for block in found.blocks] == [(), ("mlp",)] * 2
    query = replace(first.query, gain=1.5 * first.query.gain)
    value = replace(others[1].value, channels=others[1].value.channels[::-1])
    blocks = replace(first, query=query), others[0], replace(others[1], value=value), last
    found = confirmed(model, replace(catalog, blocks=blocks), [batch])
    assert [{*block.refused} for block in found.blocks] == [{"qk", "vo"}, set()] * 2


def test_what_is_solved_from_the_dense_model_alone_says_so():
    def fitted(model, samples=12, tokens=12):
        catalog = find_blocks(model)
        plan = uniform(catalog, HALF, align=1)
        x = activations(samples, tokens)
        return fit_in_sequence(model, catalog, plan, [[{"x": x}], [{"x": x[::-1]}]], Recipe())

    assert not fitted(layers()).solution.in_sequence
    assert fitted(layers(distinct=True)).solution.in_sequence
    with pytest.raises(TooFewSamples):
        fitted(layers(), samples=1, tokens=3)
