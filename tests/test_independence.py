"""Samples that know of each other are told of, and no others."""

from __future__ import annotations

import pytest

from corp_onnx.calibration.independence import warn_of_mixing
from corp_onnx.graph.model import from_proto
from tests.builders import TINY, WIDTH, Net, feeds, softmax
from tests.inputs import activations


def without_batch(result="values"):
    """Attention over the one axis that there is: its values, its largest logit, or all logits."""
    net = Net(0)
    x = net.x("tokens", WIDTH)
    logits = net("MatMul", x, net("Transpose", x, perm=[1, 0]))
    results = {
        "values": lambda: net("MatMul", softmax(net, logits), x),
        "places": lambda: net("ArgMax", logits, axis=1, keepdims=0),
        "pairs": lambda: logits,
    }
    return from_proto(net.build(results[result]()))


VECTORS = {"x": activations(8)[:, 0]}


def test_attention_without_a_batch_is_told_of(caplog):
    warn_of_mixing(without_batch(), VECTORS)
    assert "of 8 samples changes by" in caplog.text
    assert "when 4 of them are run without the others" in caplog.text


def test_attention_with_the_tokens_first_is_told_of(caplog):
    proto = TINY["tokens_first"](0).proto
    warn_of_mixing(from_proto(proto), feeds(proto, 5, 6))
    assert "are not independent along the first axis" in caplog.text


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "attention_half"])
def test_nothing_is_said_of_usual_models(name, caplog):
    proto = TINY[name](0).proto
    warn_of_mixing(from_proto(proto), feeds(proto, 5, 6))
    assert not caplog.text


@pytest.mark.parametrize("result", ["places", "pairs"])
def test_outputs_that_cannot_be_compared_say_nothing(result, caplog):
    warn_of_mixing(without_batch(result), VECTORS)
    assert not caplog.text


def test_a_model_that_draws_numbers_is_not_said_to_mix_samples(caplog):
    net = Net(0)
    noise = net("RandomNormalLike", net.x("batch", WIDTH))
    warn_of_mixing(from_proto(net.build(net("Add", "x", noise))), VECTORS)
    assert "not independent" not in caplog.text


def test_a_single_sample_says_nothing(caplog):
    warn_of_mixing(without_batch(), {"x": VECTORS["x"][:1]})
    assert not caplog.text
