"""What solving predicts is what the smaller model does, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from corp_onnx.blocks import Axis, Catalog, axes_of, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.graph.model import Model, from_proto
from corp_onnx.plan import uniform
from corp_onnx.solve import METHODS, Recipe, solve
from corp_onnx.solve.folds import MlpFold, Solution
from corp_onnx.solved import from_statistics
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.checks import Gates, check_promises
from corp_onnx.verify.promise import Measured, measured_errors
from corp_onnx.verify.verify import verify
from tests.builders import TINY, WIDTH, Net, feeds, mlp
from tests.inputs import activations, sentences
from tests.stream_builders import attend
from tests.tolerances import rounding

ROUNDING = rounding(width=200, dtype=np.float32)
"""Relative error of an output or a logit: sums of 24 float32 products and what is behind them."""

MODELS = (
    "mlp",
    "mlp_gated",
    "mlp_layerscale",
    "mlp_gemm",
    "mlp_indirect_weights",
    "packed_split",
    "packed_slice",
    "scale_on_both",
    "scale_per_channel",
    "late_bias",
    "position_major",
    "half_of_heads",
    "tokens_first",
    "mask_keeps",
    "cross_attention",
    "cross_attention_masked",
    "operator",
    "transformer",
    "tied_attention",
    "text_encoder",
)


def may_differ(error: float) -> float:
    """How far rounding moves a squared relative error: ``2 √error δ + δ²``."""
    return 2 * np.sqrt(error) * ROUNDING + ROUNDING**2


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    model: Model
    catalog: Catalog
    batches: list[dict[str, np.ndarray]]

    def solution(
        self, method: str, share: float = 0.5, axes: Sequence[Axis] = ("mlp", "qk")
    ) -> Solution:
        statistics = gather(self.model, self.catalog, self.batches)
        plan = uniform(self.catalog, dict.fromkeys(axes, share), align=1)
        return solve(self.model, self.catalog, plan, statistics, Recipe(method))

    def measured(self, pruned: Model, *, without_row_constants: bool = False) -> Measured:
        return measured_errors(
            self.model,
            self.catalog,
            pruned,
            find_blocks(pruned),
            self.batches,
            without_row_constants=without_row_constants,
        )


@pytest.fixture(scope="module")
def case(tiny) -> Callable[[str], Case]:
    def make(name: str) -> Case:
        model = tiny(name)
        proto = TINY[name](0).proto
        if name == "text_encoder":
            batches = [
                sentences(np.random.default_rng(seed), samples=6, length=9) for seed in range(3)
            ]
        else:
            batches = [feeds(proto, 4, 9, seed) for seed in range(3)]
        return Case(model, find_blocks(model), batches)

    return make


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_the_measured_error_is_the_predicted_one(case, name, method):
    made = case(name)
    solution = made.solution(method)
    measured = made.measured(
        operate(made.model, made.catalog, solution).model, without_row_constants=method == "best"
    )
    assert measured.keys() >= {(fold.block, fold.axis) for fold in solution.folds}
    assert len(solution.folds) == sum(
        axis != "vo" for b in made.catalog.blocks for axis in axes_of(b)
    )
    for fold in solution.folds:
        predicted = fold.evidence.error
        assert predicted > 1e-4
        assert abs(measured[fold.block, fold.axis] - predicted) <= may_differ(predicted), fold.block
    assert check_promises(solution, measured).passed


@pytest.mark.parametrize("name", ["mlp", "mask_keeps", "transformer"])
def test_nothing_removed_is_nothing_lost(case, name):
    made = case(name)
    solution = made.solution("corp", share=0.0)
    assert {fold.evidence.error for fold in solution.folds} == {0.0}
    measured = made.measured(operate(made.model, made.catalog, solution).model)
    assert max(measured.values()) <= ROUNDING**2


def test_mlps_that_share_a_layer_are_not_measured(case):
    made = case("mlp_chain")
    assert made.measured(operate(made.model, made.catalog, made.solution("corp")).model) == {}


def test_an_mlp_that_begins_in_an_output_projection_is_not_measured():
    """With narrower values that layer cannot take what it takes in the dense model."""
    net = Net(0)
    x = net.x()
    model = from_proto(net.build(net("Add", x, net.linear(attend(net, x), WIDTH, WIDTH))))
    made = Case(model, find_blocks(model), [{"x": activations(4)}])
    solution = made.solution("corp", axes=("mlp", "qk", "vo"))
    assert [(fold.block, fold.axis) for fold in solution.folds] == [
        ("attention.0", "qk"),
        ("attention.0", "vo"),
        ("mlp.0", "mlp"),
    ]
    measured = made.measured(operate(model, made.catalog, solution).model)
    assert set(measured) == {("attention.0", "qk")}


def test_padding_counts_in_no_measurement(case):
    """Outputs at padded positions may be anything, before and after."""
    made = case("text_encoder")
    pruned = operate(made.model, made.catalog, made.solution("corp")).model
    seen = [batch["seen"].astype(bool) for batch in made.batches]
    rng = np.random.default_rng(1)
    other = [
        batch | {"ids": np.where(mask, batch["ids"], rng.integers(0, 8, mask.shape))}
        for batch, mask in zip(made.batches, seen, strict=True)
    ]
    before, after = made.measured(pruned), replace(made, batches=other).measured(pruned)
    for block, error in before.items():
        assert abs(after[block] - error) <= may_differ(error)


# Wrong twins


def spoiled(model: Model, change: Callable[[np.ndarray], np.ndarray], word: str) -> Model:
    """A pruned model with one of its new weights changed."""
    proto = model.proto()
    changed = 0
    graph = from_proto(proto).graph.copy()
    for node in graph.nodes:
        for tensor in node.inputs:
            if word in tensor.name and hasattr(tensor, "values") and not changed:
                tensor.values = change(np.array(tensor.values))
                changed += 1
    assert changed == 1, word
    return model.with_graph(graph)


def zero_row(values: np.ndarray) -> np.ndarray:
    values[0] = 0
    return values


def swapped_rows(values: np.ndarray) -> np.ndarray:
    return values[[1, 0, *range(2, len(values))]]


def negated_column(values: np.ndarray) -> np.ndarray:
    values[:, 0] *= -1
    return values


@pytest.mark.parametrize(
    ("name", "block", "word", "change"),
    [
        ("mlp", "mlp.0", "mlp.0", swapped_rows),
        ("mlp", "mlp.0", "mlp.0", negated_column),
        ("transformer", "mlp.1", "mlp.1", zero_row),
        ("transformer", "attention.0", "attention.0", negated_column),
        ("transformer", "attention.1", "attention.1", swapped_rows),
        ("packed_split", "attention.0", "query_weight", np.zeros_like),
        ("packed_split", "attention.0", "key_bias", lambda values: values + 1),
    ],
)
def test_a_wrong_weight_breaks_the_promise_of_its_block(case, name, block, word, change):
    made = case(name)
    solution = made.solution("corp")
    pruned = operate(made.model, made.catalog, solution).model
    measured = made.measured(spoiled(pruned, change, word))
    check = check_promises(solution, measured)
    assert not check.passed
    assert check.found.startswith(f"{block} ")
    honest = made.measured(pruned)
    changed = [place for place in honest if abs(measured[place] - honest[place]) > may_differ(1.0)]
    assert [name for name, _ in changed] == [block]


def test_a_lost_offset_breaks_the_promise(case):
    """What the removed channels' means leave in the bias."""
    made = case("transformer")
    solution = made.solution("corp")
    folds = tuple(
        replace(fold, bias=np.zeros_like(fold.bias)) if isinstance(fold, MlpFold) else fold
        for fold in solution.folds
    )
    measured = made.measured(
        operate(made.model, made.catalog, replace(solution, folds=folds)).model
    )
    check = check_promises(solution, measured)
    assert not check.passed
    assert "mlp.0 mlp measured" in check.found
    assert "mlp.1 mlp measured" in check.found


# What counts as broken


def promised(case, error: float) -> Solution:
    (fold,) = case("mlp").solution("corp").folds
    evidence = replace(fold.evidence, error=error)
    return Solution("corp", (replace(fold, evidence=evidence),))


@pytest.mark.parametrize(
    ("predicted", "measured", "passed"),
    [
        (0.1, 0.149, True),
        (0.1, 0.151, False),
        (0.1, 0.0, True),
        (0.0, 1e-7, True),  # rounding
        (0.0, 1e-3, False),
        (0.1, np.nan, False),
        (0.1, np.inf, False),
        (np.inf, 0.1, True),
    ],
)
def test_a_promise_is_broken_beyond_one_and_a_half_times(case, predicted, measured, passed):
    check = check_promises(promised(case, predicted), {("mlp.0", "mlp"): measured})
    assert check.name == "promises"
    assert check.passed == passed


def test_a_block_that_never_varies_has_no_error(tiny):
    """Rounding is not measured against a variance of zero."""
    model = tiny("mlp")
    catalog = find_blocks(model)
    made = Case(model, catalog, [{"x": np.ones((4, 3, 10), np.float32)}])
    solution = made.solution("corp")
    measured = made.measured(operate(model, catalog, solution).model)
    assert solution.folds[0].evidence.error == 0
    assert measured == {("mlp.0", "mlp"): 0.0}


def test_a_block_whose_lost_mean_shows_is_caught_although_it_never_varies(tiny):
    model = tiny("mlp")
    catalog = find_blocks(model)
    made = Case(model, catalog, [{"x": np.ones((4, 3, 10), np.float32)}])
    solution = made.solution("none")
    measured = made.measured(operate(model, catalog, solution).model)
    assert solution.folds[0].evidence.error == np.inf
    assert measured == {("mlp.0", "mlp"): np.inf}


def test_blocks_whose_queries_cannot_be_cut_are_left_out():
    net = Net(0)
    hidden = mlp(net, net.x(), lambda net, y: net("Relu", y))
    model = from_proto(net.build(hidden))
    made = Case(model, find_blocks(model), [{"x": activations(4)}])
    measured = made.measured(operate(model, made.catalog, made.solution("corp")).model)
    assert set(measured) == {("mlp.0", "mlp")}


# Which samples decide


@pytest.mark.parametrize(
    ("unlike", "spoil", "passed"),
    [
        ((), None, True),
        ((5,), None, True),
        ((1, 2, 4), None, False),
        ((5,), negated_column, False),
        ((), negated_column, False),
        ((), lambda values: np.full_like(values, np.nan), False),
    ],
    ids=["none is unlike", "one is", "three are", "one is, weight wrong", "wrong", "no number"],
)
def test_one_sample_unlike_all_others_breaks_no_promise(tiny, unlike, spoil, passed):
    """It is promised on average over all samples, of which but a few are looked at."""
    model = tiny("mlp")
    catalog = find_blocks(model)
    batches = [{"x": activations(samples=2, seed=seed)} for seed in range(32)]
    plan = uniform(catalog, {"mlp": 0.5}, align=1)
    recipe = Recipe("corp")
    statistics = replace(
        gather(model, catalog, batches), held_out=tuple(batches[:2]), samples=len(batches)
    )
    rng = np.random.default_rng(0)
    seen = [
        {"x": rng.normal(scale=9, size=x.shape).astype(np.float32)} if at in unlike else batch
        for at, batch in enumerate(batches[:8])
        for x in batch.values()
    ]
    solved = from_statistics(model, catalog, plan, replace(statistics, seen=tuple(seen)), recipe)
    surgery = operate(model, catalog, solved.solution)
    if spoil is not None:
        surgery = replace(surgery, model=spoiled(surgery.model, spoil, "mlp.0"))
    found = verify(model, catalog, plan, solved, surgery, gates=Gates())
    (check,) = [check for check in found.checks if check.name == "promises"]
    assert check.passed == passed, check.found
    assert ("these samples differ" in check.found) == (len(unlike) == 1 and passed)
