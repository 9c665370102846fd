"""Which tokens an output is read from, and how much they count."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from corp_onnx.blocks import find_blocks
from corp_onnx.graph.model import from_proto
from corp_onnx.graph.shapes import evaluate
from corp_onnx.plan import uniform
from corp_onnx.sequential import emphasis
from corp_onnx.sequential import fit as fitting
from corp_onnx.sequential.emphasis import Emphasis, emphasised
from corp_onnx.sequential.streams import stream_behind
from corp_onnx.session import open_session
from corp_onnx.solve import Recipe
from corp_onnx.surgery.operate import operate
from tests import stream_builders, zoo_models
from tests.builders import WIDTH
from tests.full_width import run, squared_error
from tests.inputs import activations

SAMPLES, TOKENS = 6, 12
PLENTY = 100_000
"""Samples of which none of these models has too few."""


def weighed(proto, batches, samples=PLENTY, padded=True):
    model = from_proto(proto)
    catalog = find_blocks(model)
    facts = evaluate(model.graph, catalog.sizes)
    streams = [stream_behind(model, facts, block) for block in catalog.blocks]
    padding = catalog.blocks[-1].padding if padded else None
    return streams, emphasised(model, streams, batches, samples, padding=padding)


def found(proto, *, samples=PLENTY, lengths=(TOKENS, TOKENS)):
    batches = [{"x": activations(SAMPLES, tokens, at)} for at, tokens in enumerate(lengths)]
    return weighed(proto, batches, samples)


@pytest.mark.parametrize("places", [(0,), (5,), (0, 1), (2, 7, 11)])
def test_places_that_are_read_are_found(places):
    streams, weights = found(stream_builders.read_at(places))
    assert set(weights) == {stream.block for stream in streams}
    assert {each.places for each in weights.values()} == {places}
    assert {each.axis for each in weights.values()} == {1}


def test_tokens_may_come_first():
    _, weights = found(stream_builders.tokens_first())
    assert {(each.axis, each.places) for each in weights.values()} == {(0, (0,))}


@pytest.mark.parametrize(
    "proto",
    [
        stream_builders.stacked("pre_norm"),
        stream_builders.mean_token(),
        stream_builders.read_at(range(TOKENS // 2)),
    ],
    ids=["every token", "mean", "half of the tokens"],
)
def test_nothing_counts_more_where_the_output_is_read_from_everywhere(proto):
    assert found(proto)[1] == {}


def test_padding_that_is_not_read_makes_no_token_count_more():
    seen = np.zeros((SAMPLES, 4 * TOKENS), np.float32)
    seen[:, :5] = 1.0
    batches = [{"x": activations(SAMPLES, 4 * TOKENS, at), "seen": seen} for at in (0, 1)]
    assert weighed(stream_builders.mean_of_seen(), batches)[1] == {}
    assert weighed(stream_builders.mean_of_seen(), batches, padded=False)[1] != {}


def test_as_many_classes_as_tokens_are_no_tokens():
    assert found(stream_builders.features_and_class(), lengths=(WIDTH, WIDTH))[1] != {}


def test_nothing_counts_more_in_a_map():
    x = np.ones((SAMPLES, WIDTH, 3, 4), np.float32)
    assert weighed(stream_builders.convolutions(), [{"x": x}])[1] == {}


def test_nothing_counts_more_where_the_place_depends_on_the_length():
    last = stream_builders.read_at([-1])
    assert found(last, lengths=(TOKENS, TOKENS - 2))[1] == {}
    assert found(last)[1] != {}


def test_the_weight_is_what_a_disturbance_does_to_the_output():
    """Token 0 keeps itself and takes a part of all others: ``s_R / s_O`` follows from these."""
    mixing = np.eye(TOKENS)
    mixing[0] = 0.3
    streams, weights = found(stream_builders.mixed_once(mixing))
    first, second = (weights[stream.block].weight for stream in streams)
    expected = 0.3**2 / (11 * 0.3**2)
    assert expected / 2 < first < 2 * expected
    mixing[0, 0] = 3.0
    other, last = (each.weight for each in found(stream_builders.mixed_once(mixing))[1].values())
    assert other / first == pytest.approx(100, rel=0.2)
    assert last == second == PLENTY / streams[1].linear.width_in


def test_one_of_two_outputs_may_be_read_from_a_few():
    _, weights = found(stream_builders.features_and_class())
    _, alone = found(stream_builders.class_token())
    assert {each.places for each in weights.values()} == {(0,)}
    last = list(weights)[-1]
    assert 0.5 < weights[last].weight < 2
    assert alone[last].weight > 1000


READ = {
    "timm_deit": (0,),
    "timm_deit_eager": (0,),
    "timm_dinov2_registers": (0,),
    "torchvision_vit": (0,),
    "hf_clip_vision": (0,),
    "hf_bert_sdpa": None,
    "timm_eva02": None,
    "timm_swin": None,
}
"""By module of the zoo, the tokens that an output is read from; None for all of them."""


@pytest.mark.parametrize(
    "name", [name for name in zoo_models.NAMES if zoo_models.module_of(name) in READ]
)
def test_every_exporter_s_class_token_is_found(name):
    batches = [zoo_models.feeds(name, 3, seed=seed) for seed in (0, 1)]
    _, weights = weighed(zoo_models.load(name), batches)
    places = READ[zoo_models.module_of(name)]
    assert {each.places for each in weights.values()} == ({places} if places else set())


@pytest.mark.parametrize(("samples", "probed"), [(PLENTY, 4), (20, 2), (3, 1)])
def test_it_takes_half_a_pass_at_most(monkeypatch, samples, probed):
    """Four streams, each run twice, and half of the model on average."""
    sizes = set()

    def counted(model, runtime):
        session = open_session(model, runtime)

        def run_counted(fed):
            sizes.update(map(len, fed.values()))
            return session.run(fed)

        return SimpleNamespace(run=run_counted)

    monkeypatch.setattr(emphasis, "open_session", counted)
    streams, weights = found(stream_builders.class_token(), samples=samples)
    assert weights
    assert len(streams) == 4
    assert sizes == {probed}


def test_few_samples_hold_the_weight_back():
    streams, weights = found(stream_builders.read_at([0, 1]), samples=3)
    _, free = found(stream_builders.read_at([0, 1]))
    assert all(weights[block].weight <= free[block].weight for block in free)
    for stream in streams:
        assert weights[stream.block].weight <= 3 * 2 / stream.linear.width_in
    assert weights[streams[-1].block].weight == 3 * 2 / streams[-1].linear.width_in


@pytest.mark.parametrize(("axis", "expected"), [(1, [0, 6]), (0, [0, 2])])
def test_rows_are_those_of_tokens_that_are_seen(axis, expected):
    seen = np.array([0, 2, 4, 6, 7])
    rows = Emphasis(axis, (0, 9), 1.0).rows((3, 3), seen)
    assert rows.tolist() == expected


SIZES = (64, 64, 200)


def with_class_token(samples, seed):
    """The first token is of another kind than the others."""
    x = activations(samples, TOKENS, seed)
    x[:, 0] = np.roll(x[:, 0], 3, axis=-1)
    return x


def test_a_model_is_nearer_where_tokens_that_are_read_count_more(monkeypatch):
    model = from_proto(stream_builders.class_token())
    catalog = find_blocks(model)
    plan = uniform(catalog, {"mlp": 0.5, "qk": 0.5, "vo": 0.5}, align=1)
    *parts, (given,) = ([{"x": with_class_token(samples, at)}] for at, samples in enumerate(SIZES))
    (dense,) = run(model, given)

    def error():
        solution = fitting.fit_in_sequence(model, catalog, plan, parts, Recipe()).solution
        return squared_error(run(operate(model, catalog, solution).model, given)[0], dense)

    weighed = error()
    monkeypatch.setattr(fitting, "emphasised", lambda *_, **__: {})
    assert weighed < 0.9 * error()
