"""How far apart two models are, and whether a smaller one is what was planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.errors import DataError, PlanError, VerificationError
from corp_onnx.graph.inputs import InputSpec
from corp_onnx.graph.model import from_proto
from corp_onnx.plan import Cut, Plan, uniform
from corp_onnx.session import Session, open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.checks import (
    Check,
    Verification,
    check_gates,
    check_promises,
    check_repair,
    check_structure,
    rounding_error,
)
from corp_onnx.verify.comparison import Comparison, Remembered, comparable, compare, with_masks
from tests.builders import TINY
from tests.inputs import activations, sentences
from tests.stream_builders import stacked
from tests.tolerances import rounding


@dataclass(frozen=True, slots=True)
class Functions:
    """Stands for ONNX Runtime: outputs are functions of the input ``x``."""

    by_name: dict[str, Callable[[np.ndarray], np.ndarray]]

    def run(self, names, feeds):
        return [self.by_name[name](feeds["x"]) for name in names]


def fixed(by_name):
    spec = InputSpec("x", np.dtype(np.float32), (None, None))
    return Session((spec,), tuple(by_name), Functions(by_name))


def same(x):
    return x


def compared(first, second, batches=None, **options):
    x = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]], np.float32)
    given = [{"x": x}] if batches is None else batches
    return compare(fixed(first), fixed(second), given, **options)


# Errors


def test_the_relative_error_is_the_squared_distance_over_the_squared_norm():
    found = compared({"y": same}, {"y": lambda x: 0.9 * x})
    assert found.relative_error == pytest.approx(0.01, rel=rounding(width=9, dtype=np.float32))
    shifted = compared({"y": same}, {"y": lambda x: x + 1})
    assert shifted.relative_error == pytest.approx(6 / 30)
    assert shifted.relative_errors == {"y": pytest.approx(6 / 30)}


def test_the_error_is_not_symmetric_and_not_the_unsquared_one():
    """Wrong twins of the definition, on numbers that tell them apart."""
    error = compared({"y": same}, {"y": lambda x: 3 * x}).relative_error
    assert error == pytest.approx(4.0)
    assert compared({"y": lambda x: 3 * x}, {"y": same}).relative_error == pytest.approx(4 / 9)


def test_the_overall_error_weighs_outputs_by_their_size():
    functions = {"large": lambda x: 10 * x, "small": same}
    found = compared(functions, functions | {"small": lambda x: 2 * x})
    assert found.relative_errors == {"large": 0.0, "small": pytest.approx(1.0)}
    assert found.relative_error == pytest.approx(1 / 101)
    assert found.output == "large"


def test_batches_count_by_their_samples():
    rows = np.arange(1, 11, dtype=np.float32)[:, None]
    whole = [{"x": rows}]
    parts = [{"x": rows[:7]}, {"x": rows[7:]}]
    bent = {"y": lambda x: np.minimum(x, 5)}
    once, twice = (compared({"y": same}, bent, batches) for batches in (whole, parts))
    assert once.relative_error == pytest.approx(twice.relative_error)
    assert once.samples == twice.samples == 10


def test_an_output_that_is_zero_has_no_error_unless_it_changes():
    zero = {"y": np.zeros_like}
    assert compared(zero, zero).relative_error == 0
    assert compared(zero, {"y": same}).relative_error == np.inf


def test_scalars_and_half_precision_are_compared():
    found = compared({"y": lambda x: np.array(x.sum())}, {"y": lambda x: np.array(2 * x.sum())})
    assert found.relative_error == pytest.approx(1)
    halves = {"y": lambda x: (1000 * x).astype(np.float16)}
    assert compared(halves, halves).relative_error == 0


def test_outputs_that_are_no_floating_point_numbers_are_left_out():
    functions = {"ids": lambda x: x.astype(np.int64), "y": same}
    found = compared(functions, functions | {"ids": lambda x: 7 + x.astype(np.int64)})
    assert found.relative_error == 0
    assert set(found.relative_errors) == {"y"}
    with pytest.raises(PlanError, match="none of the outputs ids holds floating-point numbers"):
        compared({"ids": functions["ids"]}, functions)


def test_only_common_outputs_are_compared():
    found = compared({"y": same, "z": same}, {"other": same, "z": same})
    assert set(found.relative_errors) == {"z"}
    with pytest.raises(PlanError, match="no output 'name' in common: y and z"):
        compared({"y": same}, {"z": same})


def test_a_named_output_is_the_only_one_that_counts():
    functions = {"y": same, "z": same}
    found = compared(functions, functions | {"y": np.zeros_like}, output="z")
    assert (found.output, found.relative_error) == ("z", 0)
    with pytest.raises(PlanError, match="no output 'w' in common"):
        compared(functions, functions, output="w")


def test_nan_of_the_dense_model_is_an_error_and_nan_of_the_other_a_failed_gate():
    nan = {"y": lambda x: x * np.nan}
    with pytest.raises(DataError, match="output 'y' of the dense model holds NaN"):
        compared(nan, {"y": same})
    found = compared({"y": same}, nan)
    assert np.isnan(found.relative_error)
    assert not check_repair(found, found).passed
    (gate,) = check_gates(found, max_error=1.0, min_agreement=None)
    assert not gate.passed


def test_another_shape_is_an_error():
    with pytest.raises(VerificationError, match=r"'y' has shape \(3, 2\).*\(3, 1\) in the other"):
        compared({"y": same}, {"y": lambda x: x[:, :1]})


def test_a_reference_that_remembers_runs_once_on_every_batch():
    seen = []

    def counted(x):
        seen.append(len(x))
        return x

    dense, other = fixed({"y": counted}), fixed({"y": lambda x: 2 * x})
    batches = [{"x": np.ones((size, 2), np.float32)} for size in (1, 2)]
    again = Remembered(dense)
    found = [compare(again, other, batches).relative_error for _ in range(3)]
    assert seen == [1, 2]
    assert found == [compare(dense, other, batches).relative_error] * 3 == [1.0] * 3


def test_no_samples_are_an_error():
    with pytest.raises(DataError, match="no samples to compare on"):
        compared({"y": same}, {"y": same}, batches=[])


def test_what_stands_at_padding_is_not_compared(tiny):
    """The other model reads other words there, and says other things of these."""
    model = tiny("text_encoder")
    texts = sentences(np.random.default_rng(0), samples=6, length=9)
    hidden = texts["seen"] == 0
    (output,) = (tensor.name for tensor in model.graph.outputs)
    other = open_session(model).run({**texts, "ids": np.where(hidden, 7, texts["ids"])})[output]
    stub = Session((), (output,), SimpleNamespace(run=lambda names, feeds: [other]))
    shown, padding = with_masks(model, find_blocks(model).blocks)
    found = compare(open_session(shown), stub, [texts], padding=padding)
    assert found.relative_error <= rounding(width=200, dtype=np.float32) ** 2
    assert compare(open_session(shown), stub, [texts]).relative_error > 0.01
    other[0, 0] += 1
    assert compare(open_session(shown), stub, [texts], padding=padding).relative_error > 0.01


@pytest.mark.parametrize("open_axis", [True, False])
def test_numbers_at_padding_are_not_compared_where_there_is_one_for_every_token(open_axis):
    """As where an answer starts; a last axis of fixed size holds classes instead."""
    proto = TINY["text_encoder"](0).proto
    (end,) = proto.graph.output
    proto.graph.node.append(helper.make_node("ReduceSum", [end.name], ["starts"], keepdims=0))
    proto.graph.node[-1].input.append("last")
    proto.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "last"))
    shape = ["batch", "tokens" if open_axis else 9]
    end.CopyFrom(helper.make_tensor_value_info("starts", TensorProto.FLOAT, shape))
    model = from_proto(proto)
    texts = sentences(np.random.default_rng(0), samples=6, length=9)
    other = open_session(model).run(texts)["starts"].copy()
    other[texts["seen"] == 0] += 100
    stub = Session((), ("starts",), SimpleNamespace(run=lambda names, feeds: [other]))
    shown, padding = with_masks(model, find_blocks(model).blocks)
    found = compare(open_session(shown), stub, [texts], padding=padding)
    assert (found.relative_error == 0, found.top1_agreement == 1) == (open_axis, open_axis)


# Directions and classes


def test_the_cosine_is_the_mean_over_vectors():
    turned = {"y": lambda x: np.stack([x[:, 0], -x[:, 1]], axis=1)}
    found = compared({"y": same}, turned)
    assert found.cosine == pytest.approx(((9 - 16) / 25 + 1 - 1) / 3)


def test_the_cosine_of_nothing_with_nothing_is_one():
    assert compared({"y": np.zeros_like}, {"y": np.zeros_like}).cosine == 1


def test_an_output_that_vanished_or_broke_has_no_direction():
    assert compared({"y": same}, {"y": np.zeros_like}).cosine == 0
    assert np.isnan(compared({"y": same}, {"y": lambda x: x * np.nan}).cosine)


def test_agreement_counts_equal_largest_entries():
    found = compared({"y": same}, {"y": lambda x: x * [1, 0.1]})
    assert found.top1_agreement == pytest.approx(2 / 3)


def test_accuracy_is_of_both_models_over_all_batches():
    x = np.eye(4, dtype=np.float32)
    batches = [{"x": x[:3]}, {"x": x[3:]}]
    rolled = {"y": lambda x: np.roll(x, 1, axis=1)}
    found = compared({"y": same}, rolled, batches, labels=[0, 1, 3, 0])
    assert found.top1 == {"dense": 0.5, "pruned": 0.5}
    assert compared({"y": same}, rolled, batches).top1 is None
    all_right = compared({"y": same}, {"y": same}, batches, labels=[0, 1, 2, 3])
    assert all_right.top1 == {"dense": 1.0, "pruned": 1.0}


def test_labels_that_do_not_fit_the_output_are_an_error():
    tokens = {"y": lambda x: np.stack([x, x], axis=1)}
    with pytest.raises(DataError, match="3 labels for 6 output vectors"):
        compared(tokens, tokens, labels=[0, 1, 2])


# Gates


def comparison(error=0.1, agreement=0.9):
    return Comparison(8, "y", error, {"y": error}, 1.0, agreement)


@pytest.mark.parametrize(
    ("max_error", "min_agreement", "passed"),
    [
        (None, None, []),
        (0.1, None, [True]),
        (0.0999, None, [False]),
        (0.0, None, [False]),
        (None, 0.9, [True]),
        (None, 0.901, [False]),
        (0.2, 0.95, [True, False]),
    ],
)
def test_gates(max_error, min_agreement, passed):
    checks = check_gates(comparison(), max_error=max_error, min_agreement=min_agreement)
    assert [check.passed for check in checks] == passed


def test_a_gate_says_what_was_found_and_wanted():
    first, second = check_gates(comparison(), max_error=0.05, min_agreement=0.99)
    assert first == Check("max-error", False, "1.000e-01, at most 0.05 wanted")
    assert second == Check("min-agreement", False, "0.900, at least 0.99 wanted")


@pytest.mark.parametrize(
    ("repaired", "unrepaired", "passed"), [(1.0, 2.0, True), (2.0, 2.0, True), (3.0, 2.0, False)]
)
def test_a_repair_must_not_do_harm(repaired, unrepaired, passed):
    assert check_repair(comparison(repaired), comparison(unrepaired)).passed == passed


@pytest.mark.parametrize(
    ("name", "error", "passed"),
    [("half", 5e-7, True), ("half", 5e-6, False), ("transformer", 5e-7, False)],
)
def test_rounding_is_no_harm(name, error, passed):
    """Nothing is cut: without repair the output is the dense one, bit by bit."""
    dtype = np.float16 if name == "half" else np.float32
    rounding = rounding_error(from_proto(stacked("pre_norm", dtype=dtype)))
    assert check_repair(comparison(error), comparison(0.0), rounding).passed == passed


def test_everything_must_pass():
    good, bad = Check("a", True, ""), Check("b", False, "")
    assert Verification((good, good), comparison()).passed
    assert not Verification((good, bad), comparison()).passed


# Structure


@pytest.fixture(scope="module")
def cut(tiny):
    """A model, its plan, and what surgery makes of it."""
    model = tiny("transformer")
    catalog = find_blocks(model)
    statistics = gather(model, catalog, [{"x": activations()}])
    plan = uniform(catalog, {"mlp": 0.5, "qk": 0.5}, align=1)
    solution = solve(model, catalog, plan, statistics, Recipe("corp"))
    return model, plan, operate(model, catalog, solution).model


def structure(cut, plan=None, edit=None):
    """The check of the pruned model, changed by ``edit`` after it was looked at."""
    model, planned, pruned = cut
    other = pruned if edit is None else changed(pruned, edit)
    return check_structure(plan or planned, other, model, find_blocks(pruned))


def test_a_model_as_planned_passes(cut):
    check = structure(cut)
    assert check == Check("structure", True, "valid, same interface, 4 widths as planned")


def test_another_width_than_planned_fails_with_block_and_axis(cut):
    _, plan, _ = cut
    cuts = [replace(each, to=each.to + (each.block == "mlp.1")) for each in plan.cuts]
    check = structure(cut, Plan(tuple(cuts)))
    assert check == Check("structure", False, "other widths than planned: mlp.1 mlp")


def test_a_model_that_was_not_cut_fails(cut):
    model, plan, _ = cut
    check = check_structure(plan, model, model, find_blocks(model))
    assert not check.passed
    assert check.found.count(" qk") == 2


def test_a_block_that_is_gone_fails(cut):
    _, plan, _ = cut
    check = structure(cut, Plan((*plan.cuts, Cut("mlp.2", "mlp", 4, 2))))
    assert check.found == "other widths than planned: mlp.2 mlp"


def changed(model, edit):
    proto = model.proto()
    edit(proto.graph)
    return from_proto(proto)


def rename_output(graph):
    name = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["renamed" if output == name else output for output in node.output]
    graph.output[0].name = "renamed"


def other_type(graph):
    graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


@pytest.mark.parametrize("edit", [rename_output, other_type])
def test_another_interface_fails(cut, edit):
    check = structure(cut, edit=edit)
    assert not check.passed
    assert check.found.startswith("the interface changed from [('x', ")


def unknown_attribute(graph):
    graph.node[0].attribute.append(onnx.helper.make_attribute("invented", 1))


def too_short_a_weight(graph):
    """A kept weight without its last column."""
    weight = next(tensor for tensor in graph.initializer if len(tensor.dims) == 2)
    array = onnx.numpy_helper.to_array(weight)[:, :-1]
    weight.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), weight.name))


@pytest.mark.parametrize("edit", [unknown_attribute, too_short_a_weight])
def test_a_model_that_is_not_valid_fails(cut, edit):
    check = structure(cut, edit=edit)
    assert not check.passed
    assert check.found.startswith("not valid ONNX: ")
    assert "\n" not in check.found


def test_what_was_not_valid_before_counts_for_nothing(cut):
    """An optimiser may write an operator into an opset that does not have it."""
    model, plan, pruned = cut
    before, after = (changed(each, unknown_attribute) for each in (model, pruned))
    check = check_structure(plan, after, before, find_blocks(pruned))
    assert check.passed
    assert check.found.startswith("no less valid than before (")
    both = changed(after, too_short_a_weight)
    assert check_structure(plan, both, model, find_blocks(pruned)).passed is False


# Internal tensors


def test_any_tensor_can_be_compared(cut):
    model, _, pruned = cut
    (block, *_) = find_blocks(model).blocks
    name = block.output.linear.output
    sessions = [open_session(comparable(each, name)) for each in (model, pruned)]
    found = compare(*sessions, [{"x": activations(4)}], output=name)
    assert set(found.relative_errors) == {name}
    assert 0 < found.relative_error < 1


def test_without_a_name_the_model_is_compared_as_it_is(cut):
    model, _, _ = cut
    assert comparable(model, None) is model


def test_a_tensor_that_is_not_there_is_refused_with_those_of_like_name(cut):
    model, _, _ = cut
    (output,) = model.graph.outputs
    with pytest.raises(
        PlanError, match=rf"no tensor '{output.name}x'; close to it are {output.name}"
    ):
        comparable(model, f"{output.name}x")
    with pytest.raises(PlanError, match=r"no tensor 'ÄÖÜ'$"):
        comparable(model, "ÄÖÜ")


# Promises


@dataclass(frozen=True, slots=True)
class Fold:
    """One axis of a block, and the error that was predicted of it."""

    block: str
    axis: str
    evidence: SimpleNamespace


@pytest.mark.parametrize(
    ("found", "predicted", "kept"),
    [
        (0.14, 0.1, True),
        (0.16, 0.1, False),
        (np.inf, np.inf, True),
        (np.inf, 0.1, False),
        (0.1, 0.0, False),
        (np.nan, 0.1, False),
    ],
)
def test_a_promise_is_held_to_what_was_predicted(found, predicted, kept):
    solution = SimpleNamespace(folds=[Fold("mlp.0", "mlp", SimpleNamespace(error=predicted))])
    assert check_promises(solution, {("mlp.0", "mlp"): found}).passed is kept
