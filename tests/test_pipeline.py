"""The whole story: what is written, what is recorded, and what is left after a failure."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from corp_onnx import work
from corp_onnx.allocation.budget import Budget, within
from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import calibrate
from corp_onnx.clock import Clock
from corp_onnx.data.batching import first
from corp_onnx.data.dataset import open_data
from corp_onnx.errors import DataError, NothingPrunable, OutputError, PlanError, TooFewSamples
from corp_onnx.graph.model import load
from corp_onnx.pipeline import Settings, prune, sweep
from corp_onnx.precision import Request
from corp_onnx.session import open_session
from corp_onnx.solve import METHODS, Recipe
from corp_onnx.verify.checks import Gates
from tests.builders import HEAD, HIDDEN, TINY, WIDTH, Net
from tests.inputs import activations
from tests.tolerances import distance, rounding

HALF = {"mlp": 0.5, "qk": 0.5}


def data_of(path, source):
    return lambda model: open_data(str(source), open_session(path).inputs)


def pruned(files, output, **options):
    shares = options.pop("shares_removed", HALF)
    given = Settings(**{"align": 1, "recipe": Recipe("corp")} | options)
    data = data_of(files.model, files.data)
    return prune(files.model, output, data, shares_removed=shares, settings=given)


def outputs(path, x):
    return open_session(Path(path)).run({"x": x})


@pytest.fixture(scope="module")
def result(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("pruned") / "small.onnx"
    return pruned(files, output), output


def test_the_result_is_a_smaller_model_that_still_does_its_work(files, result):
    record, output = result
    dense, small = onnx.load(files.model), onnx.load(output)
    onnx.checker.check_model(small, full_check=True)
    assert [value.name for value in small.graph.output] == [
        value.name for value in dense.graph.output
    ]
    assert output.stat().st_size < files.model.stat().st_size
    widths = {block.id: block.width for block in find_blocks(load(output)).blocks}
    half = {"attention": HEAD, "mlp": HIDDEN // 2}
    assert widths == {name: half[name.partition(".")[0]] for name in widths}
    assert record.surgery.pruned.total < record.surgery.dense.total

    x = activations(20, seed=9)
    (before,), (after,) = (outputs(path, x).values() for path in (files.model, output))
    assert distance(after, before) ** 2 < 0.02


def test_every_stage_leaves_its_record(result):
    record, _ = result
    assert list(record.seconds) == [
        "load",
        "blocks",
        "confirm",
        "calibrate",
        "solve",
        "surgery",
        "verify",
        "save",
    ]
    assert all(seconds >= 0 for seconds in record.seconds.values())
    assert (record.solved.samples, record.solved.solution.method) == (51, "corp")
    assert [check.name for check in record.verification.checks] == [
        "structure",
        "promises",
        "repair",
    ]
    assert record.verification.passed
    assert record.verification.comparison.samples == 13


def test_the_repair_helps_on_samples_it_has_not_seen(files, tmp_path):
    errors = {}
    for method in METHODS:
        record = pruned(files, tmp_path / f"{method}.onnx", recipe=Recipe(method))
        errors[method] = record.verification.comparison.relative_error
    assert errors["best"] < errors["corp"] < min(errors["mean"], errors["none"])


@pytest.mark.parametrize("name", ["model", "text"])
def test_nothing_removed_gives_back_the_function(files, tmp_path, name):
    model, data = (files.folder / f"{name}.onnx", files.folder / f"{name}.npz")
    data = files.data if name == "model" else data
    output = tmp_path / "same.onnx"
    nothing = {"mlp": 0.0, "qk": 0.0}
    record = prune(model, output, data_of(model, data), shares_removed=nothing)  # by best
    assert record.verification.passed
    assert {cut.to for cut in record.plan.cuts} == {HEAD, HIDDEN}
    tolerance = rounding(width=200, dtype=np.float32) ** 2
    assert record.verification.comparison.relative_error <= tolerance
    assert output.read_bytes() != model.read_bytes()  # the surgery was done


def test_a_pruned_model_runs_at_sizes_that_were_never_calibrated(result):
    _, output = result
    for samples, tokens in ((1, 1), (3, 40)):
        (y,) = outputs(output, activations(samples, tokens)).values()
        assert y.shape == (samples, 3)


def test_a_pruned_model_can_be_pruned_again(files, result, tmp_path):
    _, output = result
    again = tmp_path / "smaller.onnx"
    record = prune(
        output,
        again,
        data_of(output, files.data),
        shares_removed={"mlp": 0.3},
        settings=Settings(align=1),
    )
    assert record.verification.passed
    assert {cut.width for cut in record.plan.cuts} == {HIDDEN // 2}


def test_statistics_from_a_file_give_the_same_file(files, tmp_path):
    model = load(files.model)
    data = data_of(files.model, files.data)(model)
    calibrate(model, find_blocks(model), data).save(tmp_path / "statistics.npz")
    pruned(files, tmp_path / "first.onnx")
    prune(
        files.model,
        tmp_path / "second.onnx",
        tmp_path / "statistics.npz",
        shares_removed=HALF,
        settings=Settings(align=1, recipe=Recipe("corp")),
    )
    first, second = ((tmp_path / f"{name}.onnx").read_bytes() for name in ("first", "second"))
    assert first == second


def test_the_seed_decides_what_is_held_out(files, tmp_path):
    errors = [
        pruned(files, tmp_path / "out.onnx", seed=seed).verification.comparison.relative_error
        for seed in (1, 1, 2)
    ]
    assert errors[0] == errors[1] != errors[2]


def test_progress_is_told_every_sample(files, tmp_path):
    counted = []
    pruned(files, tmp_path / "out.onnx", on_batch=counted.append)
    assert sum(counted) == 51


# Verdicts


@pytest.mark.parametrize(
    ("gates", "failed"),
    [
        (Gates(max_error=0.0), ["max-error"]),
        (Gates(max_error=1.0), []),
        (Gates(min_agreement=1.0, max_error=1e-9), ["max-error"]),
    ],
)
def test_gates_are_held_against_held_out_samples(files, tmp_path, gates, failed):
    record = pruned(files, tmp_path / "out.onnx", gates=gates)
    checks = record.verification.checks
    assert [check.name for check in checks if not check.passed] == failed
    assert record.verification.passed == (not failed)
    assert (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_error": -0.1}, "--max-error -0.1 is no limit"),
        ({"max_error": np.nan}, "--max-error nan is no limit"),
        ({"min_agreement": 1.1}, "--min-agreement 1.1 is no share"),
        ({"min_agreement": np.nan}, "--min-agreement nan is no share"),
    ],
)
def test_gates_that_are_none_are_refused(limits, message):
    with pytest.raises(PlanError, match=message):
        Gates(**limits)


def test_no_repair_is_not_compared_with_itself(files, tmp_path):
    record = pruned(files, tmp_path / "out.onnx", recipe=Recipe("none"))
    assert [check.name for check in record.verification.checks] == ["structure", "promises"]


def test_a_repair_that_does_harm_fails(files, tmp_path, monkeypatch):
    """The wrong twin of a repair: every fold gets a bias that the next norm does not undo."""
    from corp_onnx import solved
    from corp_onnx.solve.folds import MlpFold

    def spoiled(*arguments):
        solution = solve(*arguments)
        if solution.method == "none":
            return solution
        return replace(
            solution,
            folds=tuple(
                replace(fold, bias=fold.bias + wrong) if isinstance(fold, MlpFold) else fold
                for fold in solution.folds
            ),
        )

    wrong = 3.0 * (-1) ** np.arange(WIDTH)
    solve = solved.solve
    monkeypatch.setattr(solved, "solve", spoiled)
    record = pruned(files, tmp_path / "out.onnx")
    failed = [check.name for check in record.verification.checks if not check.passed]
    assert failed == ["promises", "repair"]


# Failures


def failing(files, error, match, *, folder, **options):
    with pytest.raises(error, match=match):
        pruned(files, **options)
    assert not list(folder.iterdir())


def test_nothing_is_written_when_a_request_cannot_be_met(files, tmp_path):
    output = tmp_path / "out.onnx"
    for options, error, match in [
        ({"shares_removed": {"mlp": 1.5}}, PlanError, "--mlp 1.5"),
        ({"align": 0}, PlanError, "--align 0"),
        ({"sizes": {"y": (1, 2)}}, PlanError, "inputs of the model are x"),
        ({"sizes": {"x": (1, 2, 9)}}, PlanError, "does not fit"),
    ]:
        failing(files, error, match, folder=tmp_path, output=output, **options)


def test_nothing_is_written_when_the_data_do_not_do(files, tmp_path):
    for make, error, match in [
        (lambda x: x[:2, :5], TooFewSamples, "fewer than the 14 channels"),
        (lambda x: x * np.nan, DataError, "is not finite"),
        (lambda x: x[..., :9], DataError, "has|gives"),
    ]:
        np.save(files.folder / "odd.npy", make(activations()))
        odd = replace(files, data=files.folder / "odd.npy")
        failing(odd, error, match, folder=tmp_path, output=tmp_path / "out.onnx")


def test_nothing_prunable_is_said_before_data_are_read(files, tmp_path):
    def unread(model):
        raise AssertionError("data were opened")

    with pytest.raises(NothingPrunable):
        prune(files.model, tmp_path / "out.onnx", unread, shares_removed={})
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_said_before_the_work(files, tmp_path):
    missing = replace(files, model=tmp_path / "none.onnx")
    with pytest.raises(OutputError, match="nowhere does not exist"):
        pruned(missing, tmp_path / "nowhere" / "out.onnx")


def test_the_dense_model_is_not_written_over(files, tmp_path):
    dense = tmp_path / "dense.onnx"
    dense.write_bytes(files.model.read_bytes())
    (tmp_path / "link.onnx").symlink_to(dense)
    for output in (dense, tmp_path / "link.onnx"):
        with pytest.raises(OutputError, match="is a file that is read; name another one"):
            pruned(replace(files, model=dense), output)
    assert dense.read_bytes() == files.model.read_bytes()


def test_files_that_are_read_are_not_written_over(files, tmp_path, command):
    dense, weights = tmp_path / "dense.onnx", tmp_path / "dense.weights"
    onnx.save(
        *(onnx.load(files.model), dense),
        **{"save_as_external_data": True, "size_threshold": 0, "location": weights.name},
    )
    data, statistics = tmp_path / "data.npz", tmp_path / "statistics.npz"
    data.write_bytes(files.data.read_bytes())
    given = ("--data", data)
    assert command("calibrate", dense, *given, "-o", statistics).status == 0
    read = {path: path.read_bytes() for path in (dense, weights, data, statistics)}
    for arguments in (
        *(("calibrate", dense, *given, "-o", path) for path in (dense, weights, data)),
        *(("prune", dense, *given, "-o", path) for path in (dense, weights, data)),
        ("prune", dense, "--stats", statistics, "-o", statistics),
        ("bench", dense, "--plot", dense),
    ):
        ended = command(*arguments)
        assert ended.status == 2
        assert "is a file that is read; name another one to write" in ended.message
    with pytest.raises(OutputError, match="is a file that is read"):
        sweep(
            *(dense, {dense: Budget("macs", 0.8), tmp_path / "a.onnx": Budget("macs", 0.7)}),
            data_of(dense, data),
        )
    assert {path: path.read_bytes() for path in read} == read


def test_statistics_that_keep_nothing_to_verify_with_are_refused(files, tmp_path):
    model = load(files.model)
    data = data_of(files.model, files.data)(model)
    statistics = replace(calibrate(model, find_blocks(model), data), held_out=())
    statistics.save(tmp_path / "statistics.npz")
    with pytest.raises(DataError, match="keep no samples to verify with"):
        prune(
            files.model,
            tmp_path / "out.onnx",
            tmp_path / "statistics.npz",
            shares_removed=HALF,
            settings=Settings(align=1),
        )
    assert not (tmp_path / "out.onnx").exists()


def test_an_older_result_survives_a_failure(files, tmp_path):
    output = tmp_path / "out.onnx"
    output.write_text("older")
    with pytest.raises(PlanError):
        pruned(files, output, align=0)
    assert output.read_text() == "older"


# Budgets


def written(tmp_path, proto, *, samples=64, seed=0):
    """A model and data for it, as files."""
    onnx.save(proto, tmp_path / "model.onnx")
    x = np.random.default_rng(seed).standard_normal((samples, 9, WIDTH)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    return tmp_path / "model.onnx", data_of(tmp_path / "model.onnx", tmp_path / "data.npz")


def gated_without_bias():
    net = Net(0)
    gate, up = (net.linear("x", WIDTH, HIDDEN, bias=False) for _ in range(2))
    net.x()
    hidden = net("Mul", net("Sigmoid", gate), up)
    return net.build(net.linear(hidden, HIDDEN, WIDTH, bias=False))


@pytest.mark.parametrize(
    ("proto", "budget"),
    [
        (lambda: TINY["mlp_chain"](0).proto, Budget("macs", 0.4)),
        (lambda: TINY["mlp_chain"](0).proto, Budget("macs", 0.35)),
        (gated_without_bias, Budget("params", 1.0)),
    ],
    ids=["a layer between two axes", "the same, less", "biases that are new"],
)
def test_a_budget_is_kept_where_costs_do_not_add_up(tmp_path, monkeypatch, proto, budget):
    path, data = written(tmp_path, proto())

    def left():
        given = Settings(align=1)
        result = prune(path, tmp_path / "out.onnx", data, budget=budget, settings=given)
        (check,) = (each for each in result.verification.checks if each.name == budget.unit)
        return budget.share(result.surgery), check.passed

    share, passed = left()
    assert passed
    assert 0.85 * budget.kept < share <= budget.kept
    monkeypatch.setattr(work, "within", lambda *args, left, **options: within(*args, **options))
    share, passed = left()  # the wrong twin adds costs up, and is told of
    assert share > budget.kept
    assert not passed


def test_a_sweep_goes_on_without_budgets_that_cannot_be_kept(files, tmp_path, caplog):
    outputs = {tmp_path / f"{kept:g}.onnx": Budget("macs", kept) for kept in (0.8, 0.01)}
    data = data_of(files.model, files.data)
    found = sweep(files.model, outputs, data, settings=Settings(align=1))
    assert list(found) == [tmp_path / "0.8.onnx"]
    assert "--macs 0.01 cannot be kept" in caplog.text
    assert not (tmp_path / "0.01.onnx").exists()


def test_what_can_be_kept_at_the_least_is_enough_to_ask_for(files, tmp_path):
    data, settings = data_of(files.model, files.data), Settings(align=1)

    def cut(kept):
        budget = Budget("macs", kept)
        return prune(files.model, tmp_path / "out.onnx", data, budget=budget, settings=settings)

    with pytest.raises(PlanError, match="cannot be kept") as caught:
        cut(0.01)
    (least,) = re.findall(r"can be, ([0-9.]+) of the macs", str(caught.value))
    assert cut(float(least)).verification.passed


def test_axes_are_probed_on_samples_however_small_the_batches():
    batches = [{"x": np.zeros((size, 3))} for size in (1, 7, 8, 4, 4)]
    assert [len(batch["x"]) for batch in first(batches, 16)] == [1, 7, 8]
    assert len(list(first(batches * 9, 1000))) == 45


# Batches of one size


def test_best_takes_what_corp_takes_of_a_model_with_a_fixed_batch(tmp_path):
    proto = TINY["mlp"](0).proto
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims, (32, 9, WIDTH), strict=True):
        dim.dim_value = size
    path, data = written(tmp_path, proto, samples=96)
    given = Settings(align=1)
    result = prune(path, tmp_path / "out.onnx", data, shares_removed={"mlp": 0.5}, settings=given)
    assert result.verification.passed
    (fold,) = result.solved.solution.folds
    assert fold.evidence.unseen is not None  # in two halves of one batch each
    path, data = written(tmp_path, proto, samples=64)
    result = prune(path, tmp_path / "out.onnx", data, shares_removed={"mlp": 0.5}, settings=given)
    assert result.solved.solution.folds[0].evidence.unseen is None


# The clock


def test_visits_to_a_stage_add_up(monkeypatch):
    times = iter([0.0, 1.0, 10.0, 12.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = Clock()
    for _ in range(2):
        with clock.stage("solve"):
            pass
    assert clock.seconds == {"solve": 3.5}


def test_a_sweep_writes_models_in_the_precision_that_is_asked_for(files, tmp_path):
    settings = Settings(align=1, recipe=Recipe("corp"), request=Request("fp16", limit=1.0))
    budgets = {tmp_path / "small.onnx": Budget("macs", 0.8)}
    sweep(files.model, budgets, data_of(files.model, files.data), settings=settings)
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds


def test_an_axis_that_no_block_offers_is_told_once(tmp_path, caplog):
    model = tmp_path / "mlp.onnx"
    onnx.save(TINY["mlp"](0).proto, model)
    np.save(tmp_path / "x.npy", activations())
    data = data_of(model, tmp_path / "x.npy")
    prune(model, tmp_path / "small.onnx", data, shares_removed=HALF, settings=Settings(align=1))
    assert caplog.text.count("no block offers the axis 'qk'") == 1
