"""What holds of the zoo holds of transformers drawn at random, however they are written."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from corp_onnx.blocks import axes_of, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.graph.model import from_proto
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import MlpFold, QueryKeyFold, Solution, ValueOutputFold
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from tests.builders import feeds
from tests.full_width import run, squared_error
from tests.properties import (
    check,
    is_the_truth,
    keeps_its_interface,
    keeps_its_promises,
    mentions_everything,
    offered,
    unchanged_by_ratio_0,
)
from tests.random_choices import Attention, Mlp
from tests.random_nets import Network, built, networks
from tests.random_writing import Layer
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
    for count in (25, 200)
)

FOUND = {
    "the width of a head computed from the shape of a Gemm": Network(
        (Attention(groups=1, layers=Layer("gemm"), targets="own", scales=()),)
    ),
    "sections of a packed Gemm, gathered": Network(
        (Attention(packing="qkv", layers=Layer("gemm", "none"), pick="gather"),)
    ),
    "hidden channels behind a Concat of one": Network((Mlp(noise=(("hidden", "one joined"),)),)),
    "a packed gate whose bias is behind an Identity": Network(
        (Mlp(gate="packed", up=Layer(bias="late")),)
    ),
    "a packed gate behind a Cast to the type it has": Network(
        (Mlp(gate="packed", noise=(("up", "cast"),)),)
    ),
    "Squeeze of one of two axes by attribute": Network(
        (Mlp(gate="packed", pick="slice", order="an", up=Layer("picture")),), opset=11
    ),
}
"""What random networks showed, in its smallest form."""

WHOLE = Network((Attention(), Mlp(gate="packed")))


@pytest.fixture(scope="module", autouse=True)
def uncounted():
    """Counting MACs takes longer than cutting; it is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corp_onnx.surgery.operate.evaluate", lambda *_: None)
        patch.setattr("corp_onnx.surgery.operate.count", lambda *_: None)
        yield


def batches_of(proto):
    return [feeds(proto, SAMPLES, tokens, seed=tokens) for tokens in (9, 7)]


def holds(network):
    """Everything that is promised of any model."""
    made = built(network)
    model = from_proto(made.proto)
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
    assert error_where_redundant(model, catalog, made.proto) <= EXACT


def error_where_redundant(model, catalog, proto, keep=lambda kept: kept):
    """What is lost of a model whose removed channels say nothing of their own."""
    dense = with_redundancy(model, catalog)
    folds = value_folds(catalog, dense)
    dense = replace(dense, kept={place: keep(kept) for place, kept in dense.kept.items()})
    plan = plan_of(catalog, dense)
    if plan.cuts:
        statistics = gather(dense.model, catalog, batches_of(proto))
        recipe = Recipe(ridge=RIDGE, kept=dense.kept)
        folds += solve(dense.model, catalog, plan, statistics, recipe).folds
    small = operate(dense.model, catalog, Solution("redundant", tuple(folds))).model
    given = (feeds(proto, 1, 5), feeds(proto, 3, 8))
    results = zip(run(small, *given), run(dense.model, *given), strict=True)
    return max(squared_error(*pair) for pair in results)


@pytest.mark.parametrize("name", FOUND)
def test_what_random_networks_showed_stays_right(name):
    holds(FOUND[name])


@FEW
@given(networks())
def test_what_holds_of_any_model_holds_of_networks_drawn_at_random(network):
    holds(network)


@pytest.mark.slow
@MANY
@given(networks())
def test_what_holds_of_any_model_holds_of_many_networks_drawn_at_random(network):
    holds(network)


# Wrong twins


@pytest.mark.parametrize(
    "wrong",
    [{"attention": 3}, {"head_width": 5}, {"cut": ["vo"]}, {"cut": []}],
    ids=["heads", "width", "axes", "nothing"],
)
def test_a_catalog_that_is_not_the_truth_shows(wrong):
    made = built(WHOLE)
    catalog = find_blocks(from_proto(made.proto))
    attention, mlp = made.truth
    is_the_truth(catalog, (attention, mlp))
    with pytest.raises(AssertionError, match="which the truth does not have"):
        is_the_truth(catalog, (attention | wrong, mlp))


def test_a_refusal_for_another_reason_shows():
    made = built(Network((Attention(capped=True),)))
    catalog = find_blocks(from_proto(made.proto))
    (entry,) = made.truth
    is_the_truth(catalog, (entry,))
    with pytest.raises(AssertionError, match="rotated"):
        is_the_truth(catalog, (entry | {"because": {"qk": "rotated"}},))


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (MlpFold, "kept"),
        (QueryKeyFold, "key"),
        (ValueOutputFold, "value"),
        (ValueOutputFold, "weight"),
    ],
)
def test_a_wrong_map_shows(kind, field):
    proto = built(WHOLE).proto
    model = from_proto(proto)
    catalog, given = find_blocks(model), (feeds(proto, 3, 8),)
    right = turned(model, catalog)
    folds = [
        replace(fold, **{field: np.roll(getattr(fold, field), 1, axis=0)})
        if isinstance(fold, kind)
        else fold
        for fold in right.folds
    ]
    expected = run(proto, *given)
    check(run(operate(model, catalog, right).model, *given), expected)
    wrong = operate(model, catalog, replace(right, folds=tuple(folds))).model
    with pytest.raises(AssertionError):
        check(run(wrong, *given), expected)


def test_a_lost_name_shows():
    proto = built(WHOLE).proto
    other = from_proto(proto).proto()
    keeps_its_interface(other, proto)
    other.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "unknown"
    with pytest.raises(AssertionError):
        keeps_its_interface(other, proto)


def test_keeping_too_little_shows():
    proto = built(WHOLE).proto
    model = from_proto(proto)
    catalog = find_blocks(model)
    assert error_where_redundant(model, catalog, proto) <= EXACT
    assert error_where_redundant(model, catalog, proto, keep=one_less) > 1e3 * EXACT


def one_less(kept):
    """One channel fewer than is enough."""
    return kept[..., :-1]


def test_every_choice_is_drawn():
    """Networks would hold nothing together if a choice never met the others."""
    seen = {}

    @settings(FEW, max_examples=150)
    @given(networks())
    def draw(network):
        for part in (network, *network.parts):
            for entry in fields(part):
                values = seen.setdefault((type(part).__name__, entry.name), set())
                values.add(repr(getattr(part, entry.name)))

    draw()
    constant = {place for place, values in seen.items() if len(values) < 2}
    assert constant == set()
