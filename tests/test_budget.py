"""Unequal widths within a budget."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corp_onnx.allocation.budget import Budget, within
from corp_onnx.allocation.probes import Probe, probe
from corp_onnx.blocks import Catalog, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.errors import PlanError
from corp_onnx.graph.model import from_proto
from corp_onnx.plan import uniform
from corp_onnx.session import open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.comparison import compare
from tests.builders import TINY, feeds
from tests.inputs import sentences

ALIGN = 4


def curve(width: int, weight: float, power: float) -> np.ndarray:
    """Convex and falling: nothing is lost at full width."""
    return weight * (1 - np.arange(width + 1) / width) ** power


def made(*axes: tuple[int, float, float, float]) -> tuple[Probe, ...]:
    return tuple(
        Probe((f"mlp.{place}",), "mlp", width, curve(width, weight, power), macs, macs)
        for place, (width, weight, power, macs) in enumerate(axes)
    )


def catalog_of(total: int) -> Catalog:
    return Catalog((), (), {}, total, total, {})


def harm(probes, plan) -> float:
    widths = {cut.block: cut.to for cut in plan}
    return sum(probe.harm[widths[probe.blocks[0]]] for probe in probes)


def planned(probes, kept: float, *, rest: int = 100):
    blocks = tuple(_Block(probe.blocks[0]) for probe in probes)
    total = int(sum(probe.width * probe.macs for probe in probes)) + rest
    catalog = Catalog(blocks, (), {}, total, total, {})
    return total, within(catalog, probes, Budget("macs", kept), align=ALIGN).cuts


@pytest.mark.parametrize(("step", "multiple"), [(1, ALIGN), (2, ALIGN), (6, 3 * ALIGN)])
def test_channels_that_go_together_do(step, multiple):
    (one,) = made((48, 1.0, 2.0, 10.0))
    for kept in (0.9, 0.7, 0.5):
        _, (cut,) = planned((replace(one, step=step),), kept)
        assert cut.to % multiple == 0
    assert any(planned((one,), kept)[1][0].to % (3 * ALIGN) for kept in (0.9, 0.7, 0.5))


class _Block:
    def __init__(self, name: str) -> None:
        self.id = name


PROBES = made((16, 1.0, 2.0, 10.0), (12, 0.1, 1.5, 20.0), (8, 0.5, 3.0, 5.0))


def best_by_trying(probes, total, kept) -> float:
    """The least harm over all aligned widths that keep the budget."""
    choices = [range(ALIGN, probe.width + 1, ALIGN) for probe in probes]
    least = np.inf
    for widths in itertools.product(*choices):
        saved = sum((p.width - w) * p.macs for p, w in zip(probes, widths, strict=True))
        if total - saved <= kept * total:
            least = min(least, sum(p.harm[w] for p, w in zip(probes, widths, strict=True)))
    return least


@pytest.mark.parametrize("kept", [0.9, 0.8, 0.7, 0.6, 0.5])
def test_a_budget_is_kept_with_little_harm(kept):
    total, cuts = planned(PROBES, kept)
    macs = {probe.blocks[0]: probe.macs for probe in PROBES}
    saved = sum((cut.width - cut.to) * macs[cut.block] for cut in cuts)
    assert total - saved <= kept * total
    assert all(cut.to % ALIGN == 0 or cut.to == cut.width for cut in cuts)
    # Greedy along convex curves is optimal but for the last step, of one multiple of ALIGN.
    step = max(np.max(probe.harm[:-ALIGN] - probe.harm[ALIGN:]) for probe in PROBES)
    least = best_by_trying(PROBES, total, kept)
    assert least <= harm(PROBES, cuts) <= least + step


def test_where_it_hurts_least_most_is_taken():
    _, cuts = planned(PROBES, 0.8)
    dear, cheap, _ = cuts
    assert cheap.to / cheap.width < dear.to / dear.width
    twin = made((16, 0.01, 2.0, 10.0), (12, 1.0, 1.5, 20.0), (8, 0.5, 3.0, 5.0))  # the other way
    _, cuts = planned(twin, 0.8)
    assert cuts[0].to / cuts[0].width < cuts[1].to / cuts[1].width


@settings(max_examples=30, deadline=None)
@given(st.floats(0.4, 0.95), st.integers(0, 50))
def test_a_smaller_budget_never_does_less_harm(kept, seed):
    rng = np.random.default_rng(seed)
    axes = [(16, rng.uniform(0.1, 1), rng.uniform(1.2, 3), rng.uniform(5, 20)) for _ in range(4)]
    probes = made(*axes)
    _, more = planned(probes, min(1.0, kept + 0.05))
    _, less = planned(probes, kept)
    assert harm(probes, less) >= harm(probes, more) - 1e-12


def test_all_may_be_kept():
    _, cuts = planned(PROBES, 1.0)
    assert all(cut.to == cut.width for cut in cuts)


def test_a_budget_that_cannot_be_kept_is_refused_with_what_can():
    with pytest.raises(PlanError, match=r"--macs 0\.1 cannot be kept: .* 0\.\d\d\d of the macs"):
        planned(PROBES, 0.1)


@pytest.mark.parametrize("kept", [0.0, -0.5, 1.1, np.nan])
def test_a_budget_that_is_no_share_is_refused(kept):
    with pytest.raises(PlanError, match="is not a share to keep"):
        Budget("macs", kept)


# With a model


@pytest.fixture(scope="module")
def transformer():
    proto = TINY["transformer"](0).proto
    model = from_proto(proto)
    catalog = find_blocks(model)
    batches = [feeds(proto, 4, 9, seed) for seed in range(4)]
    statistics = gather(model, catalog, batches)
    probes = probe(model, catalog, statistics, batches[:1], Recipe(), align=1)
    return model, catalog, statistics, probes, batches


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_what_is_planned_is_what_is_left(transformer, unit):
    model, catalog, statistics, probes, _ = transformer
    plan = within(catalog, probes, Budget(unit, 0.7), align=1)
    done = operate(model, catalog, solve(model, catalog, plan, statistics, Recipe()))
    before, after = (
        (done.dense.total, done.pruned.total)
        if unit == "macs"
        else (done.dense.params, done.pruned.params)
    )
    assert 0.6 * before < after <= 0.7 * before


def test_harm_is_what_was_measured_at_half_width(transformer):
    model, catalog, statistics, probes, batches = transformer
    for found in probes:
        shares = {found.axis: 0.5}
        plan = uniform(catalog, shares, align=1)
        alone = type(plan)(tuple(cut for cut in plan.cuts if cut.block in found.blocks))
        small = operate(model, catalog, solve(model, catalog, alone, statistics, Recipe())).model
        error = compare(open_session(model), open_session(small), batches[:1]).relative_error
        assert found.harm[alone.cuts[0].to] == pytest.approx(error, rel=1e-3)
        assert found.harm[found.width] == pytest.approx(0.0, abs=1e-6)
        assert found.macs > 0 < found.params


def test_what_stands_at_padding_does_no_harm(tiny):
    model = tiny("text_encoder")
    catalog = find_blocks(model)
    texts = sentences(np.random.default_rng(0), samples=6, length=9)
    other = {**texts, "ids": np.where(texts["seen"] == 0, 7, texts["ids"])}
    statistics = gather(model, catalog, [texts])
    found, again = (
        probe(model, catalog, statistics, [given], Recipe(), align=1) for given in (texts, other)
    )
    for one, two in zip(found, again, strict=True):
        assert one.harm[1] > 0
        np.testing.assert_allclose(one.harm, two.harm, rtol=1e-3)


def test_unequal_widths_do_less_harm_than_equal_ones(transformer):
    model, catalog, statistics, probes, batches = transformer

    def error(plan) -> tuple[float, float]:
        done = operate(model, catalog, solve(model, catalog, plan, statistics, Recipe()))
        found = compare(open_session(model), open_session(done.model), batches)
        return found.relative_error, done.pruned.total / done.dense.total

    equal, share = error(uniform(catalog, {"mlp": 0.4, "qk": 0.4, "vo": 0.4}, align=1))
    unequal, left = error(within(catalog, probes, Budget("macs", share), align=1))
    assert left <= share
    assert unequal < equal
