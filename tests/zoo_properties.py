"""What holds of every model of the zoo, by name, as it was exported or converted after that."""

from __future__ import annotations

from functools import cache

import pytest

from corp_onnx.blocks import axes_of, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.graph.model import from_proto
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from tests.full_width import run, squared_error
from tests.properties import (
    BOUND,
    HALF_BOUND,
    check,
    is_the_truth,
    keeps_its_promises,
    mentions_everything,
    nodes_of,
    offered,
    unchanged_by_ratio_0,
)
from tests.zoo_models import TOKENS, TRUTH, feeds, load, module_of

VISIBLE = 1e-3
"""Of ``‖ŷ - y‖² / ‖y‖²`` at half the width: what was cut did something."""


@cache
def given(name):
    """The model as a user would have it; it is not changed."""
    return load(name)


@cache
def found(name):
    model = from_proto(given(name))
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
    return inputs, run(given(name), *inputs)


def bound(name):
    """What rounding may make of the function of a model."""
    return HALF_BOUND if name.partition("@")[0].endswith("fp16") else BOUND


def forget():
    """Drop what is kept of the last model."""
    for shared in (given, found, statistics_of, varied):
        shared.cache_clear()


def require_the_truth(name):
    _, catalog = found(name)
    is_the_truth(catalog, TRUTH[module_of(name)])


def require_reasons(name):
    _, catalog = found(name)
    reasons = [item.reason for item in catalog.refusals]
    reasons += [reason for block in catalog.blocks for reason in block.refused.values()]
    assert all(len(reason.split()) > 3 for reason in reasons)
    assert nodes_of(catalog).isdisjoint(item.node for item in catalog.refusals)


def require_every_layer(name):
    mentions_everything(*found(name))


def require_exactness_at_ratio_0(name):
    model, catalog = found(name)
    if not offered(catalog):
        pytest.skip("no axis that is solved for")
    inputs, expected = varied(name)
    same = unchanged_by_ratio_0(model, catalog, statistics_of(name)[0])
    check(run(same, *inputs), expected, bound(name))


def require_exactness_in_another_basis(name):
    model, catalog = found(name)
    if not any(map(axes_of, catalog.blocks)):
        pytest.skip("no axis that can be cut")
    inputs, expected = varied(name)
    made = run(operate(model, catalog, turned(model, catalog)).model, *inputs)
    check(made, expected, bound(name))


def require_half_a_model(name):
    """What is left computes what zeros at full width do, and every block errs as was predicted."""
    model, catalog = found(name)
    if not any(map(axes_of, catalog.blocks)):
        pytest.skip("no axis that can be cut")
    samples = statistics_of(name) if offered(catalog) else (None, ())
    inputs, expected = varied(name)
    results = keeps_its_promises(model, catalog, given(name), samples, inputs, bound=bound(name))
    assert min(squared_error(*pair) for pair in zip(results, expected, strict=True)) > VISIBLE
