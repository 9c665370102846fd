"""Block by block: promises hold, nothing removed is nothing changed, errors are undone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from corp_onnx import example
from corp_onnx.blocks import find_blocks
from corp_onnx.blocks.catalog import named_as
from corp_onnx.calibration.calibrate import gather
from corp_onnx.data.dataset import open_data
from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.graph.model import from_proto, load
from corp_onnx.plan import Plan, uniform
from corp_onnx.sequential import fit as module
from corp_onnx.sequential.fit import fit_in_sequence
from corp_onnx.sequential.fitter import Fitter
from corp_onnx.session import open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import OutputFold
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.checks import check_promises
from corp_onnx.verify.promise import measured_errors, stream_errors
from tests import stream_builders
from tests.builders import TINY
from tests.full_width import run, squared_error
from tests.inputs import activations, sentences
from tests.redundant import plan_of, with_redundancy
from tests.stream_builders import stacked
from tests.tolerances import rounding

PARTS, BATCHES, SAMPLES = 2, 2, 12
ALL = {"mlp": 0.5, "qk": 0.5, "vo": 0.5}
NOTHING = dict.fromkeys(ALL, 0.0)
PRODUCTS = {"MatMul", "Gemm", "Conv"}
UNCHANGED, UNCHANGED_HALF = 1e-9, 1e-5
"""Relative squared error of rounding, in numbers of 24 and of 11 bits."""
ROUNDING = rounding(width=1000, dtype=np.float32)

NAMES = [
    *("pre_norm", "layer_scale", "post_norm", "parallel", "parallel_packed"),
    *("chained", "gemm", "no_last_layer"),
    *("convolutions", "text_encoder", "transformer", "mlp_chain", "mlp_tied", "tied_attention"),
    *("sizes_read", "mixed_sizes_read", "without_output", "cross_attention", "half"),
    *("class_token", "differential"),
]


@cache
def model_of(name):
    if name in stream_builders.LAYERS:
        proto = stacked(name)
    elif name in {"gemm", "no_last_layer", "convolutions", "class_token"}:
        proto = getattr(stream_builders, name)()
    elif name == "half":
        proto = stacked("pre_norm", dtype=np.float16)
    else:
        proto = TINY[name](0).proto
    model = from_proto(proto)
    return model, find_blocks(model)


def batch_of(name, seed, samples=SAMPLES):
    if name == "text_encoder":
        return sentences(np.random.default_rng(seed), samples=samples, length=9)
    x = activations(samples, 12, seed)
    if name == "convolutions":
        return {"x": np.moveaxis(x, 2, 1).reshape(samples, -1, 3, 4)}
    if name == "cross_attention":
        return {"x": x, "context": activations(samples, 9, seed + 50)[..., :-1]}
    return {"x": x.astype(np.float16) if name == "half" else x}


def parts_of(name, parts=PARTS):
    return [
        [batch_of(name, BATCHES * part + place) for place in range(BATCHES)]
        for part in range(parts)
    ]


def fit(name, shares=ALL, *, parts=None, recipe=None, **options):
    model, catalog = model_of(name)
    plan = uniform(catalog, shares, align=1)
    given = parts_of(name) if parts is None else parts
    return fit_in_sequence(model, catalog, plan, given, recipe or Recipe(), **options)


def error_of(name, solution, seed=99):
    model, catalog = model_of(name)
    given = batch_of(name, seed)
    small = operate(model, catalog, solution).model
    return squared_error(run(small, given)[0], run(model, given)[0])


def measured(name, solution, batches, **weights):
    model, catalog = model_of(name)
    small = operate(model, catalog, solution).model
    logits = measured_errors(
        *(model, catalog, small, named_as(find_blocks(small), catalog), batches),
        axes=("qk",),
        behind_pruned=True,
        without_row_constants=True,
    )
    return logits | stream_errors(model, catalog, small, solution, batches, **weights)


@pytest.mark.parametrize("name", NAMES)
def test_promises_hold_on_the_samples_that_were_fitted(name):
    fitted = fit(name)
    solution = fitted.solution
    batches = [batch for part in parts_of(name) for batch in part]
    found = measured(name, solution, batches, emphases=fitted.emphases)
    assert check_promises(solution, found).passed
    if name == "half":
        return
    for fold in solution.folds:
        predicted = fold.evidence.error
        if (fold.block, fold.axis) in found and not twins(name):
            exact = found[fold.block, fold.axis]
            assert abs(exact - predicted) <= 2 * np.sqrt(predicted) * ROUNDING + ROUNDING**2


def test_what_is_promised_of_tokens_that_are_read_is_not_what_all_alike_do():
    """The wrong twin of the test above, where tokens count differently."""
    fitted = fit("class_token")
    assert fitted.emphases
    found = measured(
        "class_token", fitted.solution, [b for part in parts_of("class_token") for b in part]
    )
    assert any(
        abs(found[fold.block, fold.axis] - fold.evidence.error) > 0.01 * fold.evidence.error
        for fold in fitted.solution.folds
        if (fold.block, fold.axis) in found and fold.axis != "qk"
    )


def twins(name):
    return any(block.twins for block in model_of(name)[1].blocks)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_removed_is_nothing_changed(name):
    bound = UNCHANGED_HALF if name == "half" else UNCHANGED
    assert error_of(name, fit(name, NOTHING).solution) <= bound


def test_something_removed_shows():
    """The wrong twin of the bound above."""
    assert error_of("pre_norm", fit("pre_norm").solution) > 100 * UNCHANGED_HALF


@pytest.mark.parametrize("name", ["pre_norm", "post_norm", "layer_scale", "parallel"])
def test_without_a_second_part_nothing_is_refitted(name):
    joined = [batch for part in parts_of(name) for batch in part]
    solution = fit(name, {"qk": 0.5}, parts=[joined]).solution
    model, catalog = model_of(name)
    nodes = {node.name: node for node in model.graph.nodes}
    blocks = {block.id: block for block in catalog.blocks}
    outputs = [fold for fold in solution.folds if isinstance(fold, OutputFold)]
    assert len(outputs) == 2
    for fold in outputs:
        assert fold.evidence.unseen is None
        weight = nodes[blocks[fold.block].output.linear.node].inputs[1].values
        assert np.allclose(fold.weight, weight, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_product_runs_more_often_than_four_plain_passes_run_it(monkeypatch, name):
    """Once dense; as cut so far, what the values, then the logits, then the last layer read."""
    ran = Counter()

    def counted(part, runtime):
        session = open_session(part, runtime)

        def run_counted(fed):
            ran.update(node.name for node in part.graph.nodes if node.op in PRODUCTS)
            return session.run(fed)

        return SimpleNamespace(run=run_counted)

    monkeypatch.setattr("corp_onnx.sequential.line.open_session", counted)
    fit(name)
    assert 2 <= max(ran.values()) / (PARTS * BATCHES) <= 4


def test_the_refit_helps_where_data_are_plenty():
    name = "pre_norm"
    parts = [[batch_of(name, seed, 64) for seed in seeds] for seeds in ((0, 1), (2, 3))]
    fitted = fit(name, parts=parts).solution
    alone = fit(name, parts=[[batch for part in parts for batch in part]]).solution
    assert error_of(name, fitted) < error_of(name, alone)


def test_the_dense_stream_is_the_target(monkeypatch):
    """The wrong twin: a target taken from the pruned tape leaves earlier errors as they are."""
    name = "pre_norm"
    parts = [[batch_of(name, seed, 64) for seed in seeds] for seeds in ((0, 1), (2, 3))]
    right = error_of(name, fit(name, parts=parts).solution)
    fitter = module._fit

    def confused(line, segment, *rest):
        read = line.dense.read

        def own(batch, names=None):
            if names is not None and list(names) == [segment.streams[0].tensor]:
                part = line.part(segment)
                fed = line.pruned.read(batch, segment.inputs)
                return open_session(part.model).run(fed, list(names))
            return read(batch, names)

        monkeypatch.setattr(
            type(line.dense),
            "read",
            lambda tape, *a: own(*a) if tape is line.dense else tape_read(tape, *a),
        )
        try:
            return fitter(line, segment, *rest)
        finally:
            monkeypatch.setattr(type(line.dense), "read", tape_read)

    tape_read = module.Tape.read
    monkeypatch.setattr(module, "_fit", confused)
    assert error_of(name, fit(name, parts=parts).solution) > 1.01 * right


def test_padding_changes_no_fold():
    """The same texts in longer batches give the same folds."""
    short = [[sentences(np.random.default_rng(seed), samples=24, length=9)] for seed in (0, 1)]
    longer = [
        [
            {
                "ids": np.pad(batch["ids"], ((0, 0), (0, 4)), constant_values=3),
                "seen": np.pad(batch["seen"], ((0, 0), (0, 4))),
            }
            for batch in part
        ]
        for part in short
    ]
    counted = [[batch | {"seen": np.ones_like(batch["seen"])} for batch in part] for part in longer]
    one, other, wrong = (
        fit("text_encoder", parts=parts).solution for parts in (short, longer, counted)
    )
    for a, b in zip(one.folds, other.folds, strict=True):
        assert abs(a.evidence.error / b.evidence.error - 1) <= 1e-3
    assert abs(error_of("text_encoder", one) / error_of("text_encoder", other) - 1) <= 1e-2
    differ = [
        abs(a.evidence.error / b.evidence.error - 1)
        for a, b in zip(one.folds, wrong.folds, strict=True)
    ]
    assert max(differ) > 0.05


@pytest.mark.parametrize(
    "name", ["pre_norm", "post_norm", "parallel", "layer_scale", "convolutions"]
)
@pytest.mark.parametrize("way", ["one shot", "in sequence"])
def test_removing_what_is_redundant_is_exact(name, way):
    model, catalog = model_of(name)
    dense = with_redundancy(model, catalog)
    cuts = uniform(catalog, ALL, align=1).cuts
    exact = {(cut.block, cut.axis): cut.to for cut in plan_of(catalog, dense).cuts}
    plan = Plan(tuple(cut for cut in cuts if exact.get((cut.block, cut.axis), cut.to) <= cut.to))
    assert len(plan.cuts) == len(cuts)
    rng = np.random.default_rng(0)
    shape = batch_of(name, 0)["x"].shape
    batches = [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(6)]
    recipe = Recipe(ridge=1e-6)
    if way == "one shot":
        solution = solve(dense.model, catalog, plan, gather(dense.model, catalog, batches), recipe)
    else:
        parts = [batches[:3], batches[3:]]
        solution = fit_in_sequence(dense.model, catalog, plan, parts, recipe).solution
    given = {"x": rng.standard_normal(shape).astype(np.float32)}
    small = operate(dense.model, catalog, solution).model
    assert squared_error(run(small, given)[0], run(dense.model, given)[0]) <= 1e-8
    less = uniform(catalog, dict.fromkeys(ALL, 0.7), align=1)
    stats = gather(dense.model, catalog, batches)
    narrow = operate(dense.model, catalog, solve(dense.model, catalog, less, stats, recipe)).model
    assert squared_error(run(narrow, given)[0], run(dense.model, given)[0]) > 1e-4


def test_every_block_is_told_and_no_fold_is_lost():
    told = []
    fitted = fit("parallel", on_block=told.append)
    _, catalog = model_of("parallel")
    assert told == [block.id for block in catalog.blocks]
    cuts = {(cut.block, cut.axis) for cut in uniform(catalog, ALL, align=1).cuts}
    for solution in (fitted.solution, fitted.bare):
        assert {(fold.block, fold.axis) for fold in solution.folds} == cuts
    assert fitted.solution.in_sequence
    assert error_of("parallel", fitted.solution) < error_of("parallel", fitted.bare)


@pytest.mark.parametrize("name", ["pre_norm", "post_norm"])
def test_a_spoiled_fold_breaks_its_promise(name):
    solution = fit(name).solution
    batches = [batch for part in parts_of(name) for batch in part]
    for place, fold in enumerate(solution.folds):
        if fold.axis == "qk":
            continue
        wrong = replace(fold, weight=np.array(fold.weight)[::-1])
        folds = (*solution.folds[:place], wrong, *solution.folds[place + 1 :])
        check = check_promises(solution, measured(name, replace(solution, folds=folds), batches))
        assert not check.passed
        assert fold.block in check.found


@pytest.mark.slow
def test_best_is_better_than_the_paper_on_pictures_that_neither_has_seen():
    model = load(example.MODEL)
    catalog = find_blocks(model)
    plan = uniform(catalog, {"mlp": 0.5, "qk": 0.5}, align=1)
    inputs = open_session(model).inputs
    seen = Preprocessing.beside(example.MODEL)
    data = open_data(str(example.CALIBRATION), inputs, preprocessing=seen).take(
        np.arange(0, 1024, 4)
    )
    parts = [list(half.batches(16)) for half in data.split(0.5, 0)]
    best = fit_in_sequence(model, catalog, plan, parts, Recipe()).solution
    statistics = gather(model, catalog, [batch for part in parts for batch in part])
    paper = solve(model, catalog, plan, statistics, Recipe("corp"))
    test = open_data(str(example.TEST), inputs, preprocessing=seen).take(np.arange(200))
    (given,) = test.batches(200)
    (dense,) = run(model, given)
    errors = [
        squared_error(run(operate(model, catalog, solution).model, given)[0], dense)
        for solution in (best, paper)
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize(("shape", "per_channel"), [((8, 1000, 4), 48), ((8, 40, 25, 4), 192)])
def test_more_positions_of_a_map_count_than_tokens(shape, per_channel):
    batches = 2
    line = SimpleNamespace(of_part=(0,) * batches, seed=0)
    fitter = Fitter(line, None, None, SimpleNamespace(padding=None), ())
    tokens = np.zeros(shape)
    counted = fitter._enough_of(fitter._seen(tokens, {}), tokens, 0)
    assert len(counted) == pytest.approx(per_channel * shape[-1] / batches, rel=0.1)
