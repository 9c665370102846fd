"""On every model of the zoo: blocks are the truth, ratio 0 is exact, half a model is whole."""

from __future__ import annotations

import pytest

from tests import zoo_properties as zoo
from tests.zoo_models import NAMES, TRUTH, module_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("rarely_collected", "uncounted")]


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    """A model of the zoo: all tests of one model run together, and share what they found."""
    yield request.param
    zoo.forget()


def test_the_catalog_is_the_truth(name):
    zoo.require_the_truth(name)


def test_every_refusal_gives_a_reason_and_is_about_no_block(name):
    zoo.require_reasons(name)


def test_every_softmax_and_every_large_linear_layer_is_mentioned(name):
    zoo.require_every_layer(name)


def test_ratio_0_gives_back_the_dense_function(name):
    zoo.require_exactness_at_ratio_0(name)


def test_another_basis_gives_back_the_dense_function(name):
    zoo.require_exactness_in_another_basis(name)


def test_half_a_model_is_whole_and_keeps_its_promises(name):
    zoo.require_half_a_model(name)


def test_the_truth_offers_every_axis_in_most_models():
    for axis in ("mlp", "qk", "vo"):
        offering = [name for name in NAMES if any(axis in b["cut"] for b in TRUTH[module_of(name)])]
        assert len(offering) > len(NAMES) / 2
