"""Widths for a latency, on a target whose times are known exactly."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

from corp_onnx import example
from corp_onnx.allocation import deadline as deadlines
from corp_onnx.allocation import latency_table
from corp_onnx.allocation.deadline import Deadline, Timed, scheduled
from corp_onnx.allocation.latency_table import LatencyTable, kind_of
from corp_onnx.allocation.probes import Probe, probe
from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.commands import Source
from corp_onnx.errors import PlanError
from corp_onnx.graph.model import load
from corp_onnx.latency.stopwatch import Lane, Stopwatch
from corp_onnx.pipeline import Settings, prune
from corp_onnx.plan import uniform
from corp_onnx.precision import Request
from corp_onnx.session import open_session
from corp_onnx.solve import Recipe
from tests.fake_target import Abacus, Clock

ALIGN = 8


def data(_):
    session = open_session(example.MODEL)
    return Source(str(example.CALIBRATION), samples=64).open(example.MODEL, session)


@pytest.fixture(scope="module")
def known():
    """The bundled model, calibrated and probed."""
    model = load(example.MODEL)
    catalog = find_blocks(model)
    batches = list(data(model).batches(32))
    statistics = gather(model, catalog, batches)
    probes = probe(model, catalog, statistics, batches[:1], Recipe(), align=ALIGN)
    return model, catalog, statistics, probes


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Tables are the same for all tests: the target's times are."""
    return tmp_path_factory.mktemp("tables")


@pytest.fixture
def clock(monkeypatch):
    return Clock().install(monkeypatch)


def schedule(known, limit, target, folder, *, in_ms=False, batch=1):
    asked = Deadline(limit, in_ms, target, Stopwatch(batch, warmup=0, runs=1), folder)
    return scheduled(example.MODEL, *known, asked, align=ALIGN)


def alone(width, *, macs=1.0, axis="mlp"):
    return Probe((f"{axis}.0",), axis, width, np.zeros(width + 1), macs, macs)


# The table


def test_costs_are_linear_between_the_widths_that_were_timed():
    one = alone(10)
    (cost,) = LatencyTable(8.0, {kind_of(one): {2: 4.0, 6: 7.0}}).costs([one])
    saved = cost[-1] - cost
    assert saved[[10, 8, 6, 4, 2]] == pytest.approx([0.0, 0.5, 1.0, 2.5, 4.0])
    assert saved[0] == saved[2]  # below what was timed nothing is promised


def test_axes_of_one_kind_share_what_is_saved():
    two, other = [alone(4), alone(4)], alone(4, axis="vo")
    table = LatencyTable(8.0, {kind_of(two[0]): {2: 4.0}, kind_of(other): {2: 6.0}})
    saved = [cost[-1] - cost[2] for cost in table.costs([*two, other])]
    assert saved == pytest.approx([2.0, 2.0, 2.0])


def test_a_wider_variant_that_looked_faster_counts_as_no_slower():
    one = alone(8)
    (cost,) = LatencyTable(8.0, {kind_of(one): {2: 5.0, 4: 4.5, 6: 9.0}}).costs([one])
    assert (np.diff(cost) >= 0).all()
    assert cost[4] == cost[2]


def test_the_table_has_what_the_clock_says(known, clock, tmp_path):
    *_, probes = known
    target = Abacus(clock)
    trial = deadlines._Trial(
        example.MODEL, *known, Deadline(0.5, False, target, Stopwatch(), tmp_path), ALIGN
    )
    table = latency_table.measured(probes, trial.shrunk, target, Stopwatch(), align=ALIGN)
    for one, cost in zip(probes, table.costs(probes), strict=True):
        saved_ns = (cost[-1] - cost[one.width // 2]) * 1e6
        assert saved_ns == pytest.approx(_weights(one) * one.width / 2, rel=0.02)


def _weights(one):
    """Weights of one channel: a row or column in each of two matrices, in every head."""
    width_in, heads = {"mlp": (64, 1), "qk": (64, 2), "vo": (64, 2)}[one.axis]
    return 2 * width_in * heads * len(one.blocks)


def test_a_table_is_measured_once_for_all_that_it_depends_on(known, clock, tmp_path):
    schedule(known, 0.7, Abacus(clock), tmp_path)
    first = clock.runs
    schedule(known, 0.6, Abacus(clock), tmp_path)
    second = clock.runs - first
    assert second < first / 3
    for other in ({"batch": 2}, {"tile": 2}):
        before = clock.runs
        target = Abacus(clock, tile=other.pop("tile", 1))
        schedule(known, 0.6, target, tmp_path, **other)
        assert clock.runs - before > first / 2
    assert len(list(tmp_path.iterdir())) == 3


def test_a_table_serves_only_the_axes_that_it_was_measured_for(known, clock, tmp_path):
    """Fewer samples may leave an axis alone that more samples let be cut."""
    *others, probes = known
    few = [probe for probe in probes if probe.axis != "vo"]
    schedule((*others, few), 0.8, Abacus(clock), tmp_path)
    found = schedule(known, 0.6, Abacus(clock), tmp_path)
    assert {cut.axis for cut in found.plan.cuts if cut.to < cut.width} >= {"mlp"}
    assert len(list(tmp_path.iterdir())) == 2


# The deadline


@pytest.mark.parametrize("limit", [0.9, 0.7, 0.5])
def test_the_time_that_was_asked_for_is_met(known, clock, tables, limit):
    found = schedule(known, limit, Abacus(clock, fixed_ns=20_000), tables)
    assert 0.95 * limit <= found.tries[-1].measured <= limit
    assert len({(cut.axis, cut.to) for cut in found.plan.cuts}) > 3  # widths of their own


def test_milliseconds_are_met_too(known, clock, tables):
    target = Abacus(clock, fixed_ns=20_000)
    race = Stopwatch(warmup=0, runs=1).race([Lane(example.MODEL, target)])
    dense_ms = race.latencies[0].median_ms
    found = schedule(known, 0.6 * dense_ms, target, tables, in_ms=True)
    assert 0.95 * 0.6 <= found.tries[-1].measured <= 0.6
    assert found.limit == pytest.approx(0.6)


def test_the_clock_corrects_a_table_that_is_wrong(known, clock, tables, monkeypatch):
    """Everything seems to save twice what it does; one try would miss the limit."""
    honest = LatencyTable.costs
    monkeypatch.setattr(
        LatencyTable, "costs", lambda table, probes: [2 * c for c in honest(table, probes)]
    )
    target = Abacus(clock, fixed_ns=20_000)
    found = schedule(known, 0.6, target, tables)
    assert len(found.tries) > 1
    assert 0.95 * 0.6 <= found.tries[-1].measured <= 0.6
    monkeypatch.setattr(deadlines, "TRIES", 1)
    assert schedule(known, 0.6, target, tables).tries[-1].measured > 0.6


def test_a_time_that_hardly_falls_at_first_is_not_undercut(known, clock, tables, monkeypatch):
    """What is saved then says nothing of how far to go: that lies between two aims."""
    honest = deadlines._Trial._share

    def late(trial, widths):
        share = honest(trial, widths)
        return 0.85 + 0.15 * share if share > 0.5 else 0.3 + 0.6 * share

    monkeypatch.setattr(deadlines._Trial, "_share", late)
    found = schedule(known, 0.55, Abacus(clock), tables)
    kept = [one.measured for one in found.tries if one.measured <= 0.55]
    assert max(kept) >= 0.95 * 0.55


def test_one_lucky_race_decides_nothing(known, clock, tables, monkeypatch):
    target = Abacus(clock)
    honest = deadlines._Trial._raced
    raced = set()

    def lucky(trial, widths):
        race = honest(trial, widths)
        if tuple(widths.values()) in raced:
            return race
        raced.add(tuple(widths.values()))
        dense, cut = race.speedups
        return replace(race, speedups=(dense, replace(cut, ratio=1.03 * cut.ratio)))

    monkeypatch.setattr(deadlines._Trial, "_raced", lucky)
    found = schedule(known, 0.6, target, tables)
    assert 0.95 * 0.6 <= share_of(found.plan, known, target, tables) <= 0.6


def share_of(plan, known, target, folder):
    """Of the dense time, by the exact clock."""
    asked = Deadline(0.5, False, target, Stopwatch(), folder)
    trial = deadlines._Trial(example.MODEL, *known, asked, ALIGN)
    to = {(cut.block, cut.axis): cut.to for cut in plan.cuts}
    *_, probes = known
    return trial._share([to[one.blocks[0], one.axis] for one in probes])


def test_it_does_less_harm_than_cutting_alike_to_the_same_time(known, clock, tables):
    _, catalog, _, probes = known
    target = Abacus(clock)
    found = schedule(known, 0.6, target, tables)
    alike = uniform(catalog, dict.fromkeys(("mlp", "qk", "vo"), 0.5), align=ALIGN)

    def harm(plan):
        to = {(cut.block, cut.axis): cut.to for cut in plan.cuts}
        return sum(float(one.harm[to[one.blocks[0], one.axis]]) for one in probes)

    share = share_of(alike, known, target, tables)
    same = schedule(known, share, target, tables)
    assert same.tries[-1].measured <= share
    assert harm(same.plan) < 0.8 * harm(alike)
    assert harm(found.plan) > 0


def test_a_time_that_cannot_be_reached_gives_the_nearest_and_says_so(clock, tables, tmp_path):
    target = Abacus(clock, fixed_ns=10_000_000)
    asked = Deadline(0.3, False, target, Stopwatch(warmup=0, runs=3), tables)
    result = prune(
        *(example.MODEL, tmp_path / "out.onnx", data),
        budget=asked,
        settings=Settings(recipe=Recipe("corp")),
    )
    (check,) = (check for check in result.verification.checks if check.name == "latency")
    assert not check.passed
    assert "asked for 0.300; nothing nearer was found" in check.found
    assert not result.verification.passed
    assert (tmp_path / "out.onnx").is_file()


def test_the_finished_model_is_timed_once_more(clock, tables, tmp_path):
    target = Abacus(clock, fixed_ns=20_000)
    asked = Deadline(0.7, False, target, Stopwatch(warmup=0, runs=3), tables)
    result = prune(
        *(example.MODEL, tmp_path / "out.onnx", data),
        budget=asked,
        settings=Settings(recipe=Recipe("corp")),
    )
    assert result.deadline is not None
    assert 0.95 * 0.7 <= result.deadline.share <= 0.7
    slower = replace(result.deadline.race, speedups=(result.deadline.race.speedups[0],) * 2)
    assert not replace(result.deadline, race=slower).check().passed


def test_what_is_timed_is_what_is_written(clock, tables, tmp_path):
    built = []

    class Rounding(Abacus):
        """Would take the float32 model for fp16."""

        def rounds_by_itself(self, precision):
            return True

        def build(self, model, folder, precision):
            weights = {tensor.data_type for tensor in onnx.load(model).graph.initializer}
            built.append((precision, onnx.TensorProto.FLOAT16 in weights))
            return super().build(model, folder, precision)

    output = tmp_path / "out.onnx"
    prune(
        *(example.MODEL, output, data),
        budget=Deadline(0.7, False, Rounding(clock), Stopwatch(warmup=0, runs=1), tables),
        settings=Settings(recipe=Recipe("corp"), request=Request("fp16")),
    )
    weights = {tensor.data_type for tensor in onnx.load(output).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in weights
    assert set(built) == {("fp32", False), ("fp16", True)}


@pytest.mark.parametrize(("limit", "in_ms"), [(0, False), (1.5, False), (-1, True)])
def test_a_limit_that_is_none_is_refused(limit, in_ms):
    with pytest.raises(PlanError, match="--latency"):
        Deadline(limit, in_ms, Abacus())


def test_tables_that_cannot_be_kept_are_measured_all_the_same(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    table = LatencyTable(1.0, {"mlp": {2: 0.5}})
    assert latency_table.cached(lambda: table, {"a": 1}, blocked / "cache") == table
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize("name", ["cores", "devices", "_version"])
def test_a_table_of_another_machine_or_version_is_not_taken(tmp_path, monkeypatch, name):
    first, second = LatencyTable(1.0, {}), LatencyTable(2.0, {})
    latency_table.cached(lambda: first, {"a": 1}, tmp_path)
    monkeypatch.setattr(latency_table, name, lambda: "another")
    assert latency_table.cached(lambda: second, {"a": 1}, tmp_path) == second


@pytest.mark.parametrize("text", ["{", "[]", '{"whole_ms": 1.0, "variants_ms": {"mlp": [1]}}'])
def test_a_damaged_table_is_measured_again(tmp_path, caplog, text):
    table = LatencyTable(1.25, {"mlp": {2: 0.5}})
    latency_table.cached(lambda: table, {"a": 1}, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    assert latency_table.cached(lambda: table, {"a": 1}, tmp_path) == table
    assert "is measured again" in caplog.text
    assert json.loads(path.read_text())["whole_ms"] == 1.25


def test_of_several_that_keep_the_limit_the_slowest_is_taken_else_the_fastest():
    found = {(1,): Timed(0.5, 0.4), (2,): Timed(0.5, 0.48), (3,): Timed(0.5, 0.6)}
    assert deadlines._best(found, 0.5) == (2,)
    assert deadlines._best(found, 0.3) == (1,)


def test_a_table_is_of_the_types_that_were_timed(known, clock, tmp_path):
    for types in (Request(), Request(weight_only="int8"), Request(weight_only="int8")):
        watch = Stopwatch(warmup=0, runs=1)
        asked = Deadline(0.7, False, Abacus(clock), watch, tmp_path)
        scheduled(example.MODEL, *known, asked, align=ALIGN, request=types)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_timed_is_refused_before_any_work(tmp_path, clock):
    sizes = {"image": (4, 1, 28, 28)}
    asked = Deadline(0.5, False, Abacus(clock), Stopwatch(8, sizes))
    with pytest.raises(PlanError, match="a batch of 4"):
        prune(example.MODEL, tmp_path / "out.onnx", lambda _: pytest.fail("work"), budget=asked)


def test_a_kept_table_is_read_as_it_was(tmp_path):
    table = LatencyTable(1.25, {"mlp 8 1 1": {2: 0.5, 4: 0.75}})
    assert latency_table.cached(lambda: table, {"a": 1}, tmp_path) == table
    assert latency_table.cached(lambda: pytest.fail("again"), {"a": 1}, tmp_path) == table
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["whole_ms"] == 1.25
