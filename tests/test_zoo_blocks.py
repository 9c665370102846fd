"""On every model of the zoo: blocks are the truth, ratio 0 is exact, half a model is whole."""

from __future__ import annotations

import gc
from functools import cache

import pytest

from corp_onnx import graph, surgery
from corp_onnx.blocks import axes_of, find_blocks
from corp_onnx.calibrate import gather
from corp_onnx.surgery import operate
from tests.full_width import run, squared_error, turned
from tests.properties import (
    check,
    is_the_truth,
    keeps_its_promises,
    mentions_everything,
    nodes_of,
    offered,
    unchanged_by_ratio_0,
)
from tests.zoo_models import NAMES, TOKENS, TRUTH, feeds, load, module_of

pytestmark = pytest.mark.slow

VISIBLE = 1e-3
"""Of ``‖ŷ - y‖² / ‖y‖²`` at half the width: what was cut did something."""


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    """A model of the zoo: all tests of one model run together, and share what they found."""
    yield request.param
    for shared in (found, statistics_of, varied):
        shared.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def rarely_collected():
    """Graphs are many small objects: looking for garbage among them takes a sixth of the time."""
    usual = gc.get_threshold()
    gc.set_threshold(50_000, 20, 50)
    yield
    gc.set_threshold(*usual)


@pytest.fixture(autouse=True)
def uncounted(monkeypatch):
    """Counting MACs takes longer than cutting; it is tested elsewhere."""
    monkeypatch.setattr(surgery, "evaluate", lambda *_: None)
    monkeypatch.setattr(surgery, "count", lambda *_: None)


@cache
def found(name):
    model = graph.from_proto(load(name))
    return model, find_blocks(model)


@cache
def statistics_of(name):
    """Moments over some thirty samples, of two lengths where it may vary; and the samples."""
    model, catalog = found(name)
    batches = [feeds(name, 16, tokens, seed=tokens) for tokens in (TOKENS, TOKENS - 3)]
    return gather(model, catalog, batches), batches


@cache
def varied(name):
    """Inputs of batches, and lengths, that were not traced; and what the file makes of them."""
    inputs = (feeds(name, 1, TOKENS + 4), feeds(name, 3, TOKENS - 3))
    return inputs, run(load(name), *inputs)


def test_the_catalog_is_the_truth(name):
    is_the_truth(found(name)[1], TRUTH[module_of(name)])


def test_every_refusal_gives_a_reason_and_is_about_no_block(name):
    _, catalog = found(name)
    reasons = [item.reason for item in catalog.refusals]
    reasons += [reason for block in catalog.blocks for reason in block.refused.values()]
    assert all(len(reason.split()) > 3 for reason in reasons)
    assert nodes_of(catalog).isdisjoint(item.node for item in catalog.refusals)


def test_every_softmax_and_every_large_linear_layer_is_mentioned(name):
    mentions_everything(*found(name))


def test_ratio_0_gives_back_the_dense_function(name):
    model, catalog = found(name)
    if not offered(catalog):
        pytest.skip("no axis that is solved for")
    inputs, expected = varied(name)
    check(run(unchanged_by_ratio_0(model, catalog, statistics_of(name)[0]), *inputs), expected)


def test_another_basis_gives_back_the_dense_function(name):
    model, catalog = found(name)
    if not any(map(axes_of, catalog.blocks)):
        pytest.skip("no axis that can be cut")
    inputs, expected = varied(name)
    check(run(operate(model, catalog, turned(model, catalog)).model, *inputs), expected)


def test_half_a_model_is_whole_and_keeps_its_promises(name):
    model, catalog = found(name)
    if not any(map(axes_of, catalog.blocks)):
        pytest.skip("no axis that can be cut")
    samples = statistics_of(name) if offered(catalog) else (None, ())
    inputs, expected = varied(name)
    results = keeps_its_promises(model, catalog, load(name), samples, inputs)
    assert min(squared_error(*pair) for pair in zip(results, expected, strict=True)) > VISIBLE


def test_the_truth_offers_every_axis_in_most_models():
    for axis in ("mlp", "qk", "vo"):
        offering = [name for name in NAMES if any(axis in b["cut"] for b in TRUTH[module_of(name)])]
        assert len(offering) > len(NAMES) / 2
