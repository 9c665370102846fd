"""On networks drawn at random: what holds of the zoo holds of every way of writing a transformer."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from corp_onnx import graph, surgery
from corp_onnx.blocks import axes_of, find_blocks
from corp_onnx.calibrate import gather
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import Solution
from corp_onnx.surgery import operate
from tests.builders import feeds
from tests.full_width import run, squared_error, turned
from tests.properties import (
    check,
    is_the_truth,
    keeps_its_promises,
    mentions_everything,
    offered,
    unchanged_by_ratio_0,
)
from tests.random_nets import built, networks
from tests.redundant import plan_of, value_folds, with_redundancy

EXACT = 1e-8
"""Of ``‖ŷ - y‖² / ‖y‖²`` where all that is removed was redundant."""

RIDGE = 1e-9
"""As good as none."""

SAMPLES = 24

FEW, MANY = (
    settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=count,
        suppress_health_check=list(HealthCheck),
    )
    for count in (25, 250)
)


@pytest.fixture(scope="module", autouse=True)
def uncounted():
    """Counting MACs takes longer than cutting; it is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surgery, "evaluate", lambda *_: None)
        patch.setattr(surgery, "count", lambda *_: None)
        yield


def batches_of(proto):
    return [feeds(proto, SAMPLES, tokens, seed=tokens) for tokens in (9, 7)]


def holds(network):
    """Everything that is promised of any model."""
    made = built(network)
    model = graph.from_proto(made.proto)
    catalog = find_blocks(model)
    is_the_truth(catalog, made.truth)
    mentions_everything(model, catalog)
    if not any(map(axes_of, catalog.blocks)):
        return
    inputs = (feeds(made.proto, 1, 5), feeds(made.proto, 3, 8))
    expected = run(made.proto, *inputs)
    samples = (None, batches_of(made.proto))
    if offered(catalog):
        samples = gather(model, catalog, samples[1]), samples[1]
        check(run(unchanged_by_ratio_0(model, catalog, samples[0]), *inputs), expected)
    check(run(operate(model, catalog, turned(model, catalog)).model, *inputs), expected)
    keeps_its_promises(model, catalog, made.proto, samples, inputs)
    is_exact_where_redundant(model, catalog, made.proto, inputs)


def is_exact_where_redundant(model, catalog, proto, inputs):
    dense = with_redundancy(model, catalog)
    folds, plan = value_folds(catalog, dense), plan_of(catalog, dense)
    if plan.cuts:
        statistics = gather(dense.model, catalog, batches_of(proto))
        folds += solve(
            dense.model, catalog, plan, statistics, Recipe(ridge=RIDGE, kept=dense.kept)
        ).folds
    small = operate(dense.model, catalog, Solution("redundant", tuple(folds))).model
    for pair in zip(run(small, *inputs), run(dense.model, *inputs), strict=True):
        assert squared_error(*pair) <= EXACT


@FEW
@given(networks())
def test_what_holds_of_any_model_holds_of_networks_drawn_at_random(network):
    holds(network)


@pytest.mark.slow
@MANY
@given(networks())
def test_what_holds_of_any_model_holds_of_many_networks_drawn_at_random(network):
    holds(network)
