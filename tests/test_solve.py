"""From a plan and statistics to new weights: what is kept, and what redundancy costs."""

from __future__ import annotations

import numpy as np
import pytest

from corp_onnx.blocks import find_blocks
from corp_onnx.blocks.linear import weight_of
from corp_onnx.calibration.calibrate import gather
from corp_onnx.errors import IllConditioned, PlanError
from corp_onnx.graph.model import from_proto
from corp_onnx.plan import uniform
from corp_onnx.session import open_session
from corp_onnx.solve import METHODS, Recipe, solve
from corp_onnx.solve.affine import recover_mlp
from corp_onnx.solve.bilinear import recover_query_key
from corp_onnx.solve.folds import MlpFold, QueryKeyFold
from corp_onnx.surgery.operate import operate
from tests.builders import HEAD, HEADS, HIDDEN, WIDTH, Net, merge_heads, mix, split_heads
from tests.inputs import activations
from tests.tolerances import distance, rounding

REDUNDANT = 1e-8
"""Relative squared error at which a redundant axis counts as cut without loss."""

VANISHING = 1e-10
"""A relative ridge that decides only where nothing else does."""


def solved(model, recipe, shares, *, x=None, align=1):
    catalog = find_blocks(model)
    statistics = gather(model, catalog, [{"x": activations() if x is None else x}])
    plan = uniform(catalog, shares, align=align)
    return catalog, statistics, solve(model, catalog, plan, statistics, recipe)


def squared_error(model, catalog, solution, x):
    small = operate(model, catalog, solution).model
    (before,), (after,) = (open_session(each).run({"x": x}).values() for each in (model, small))
    return distance(after, before) ** 2


# Redundancy


def noise(seed):
    """Inputs without correlations, which condition every system well."""
    return np.random.default_rng(seed).standard_normal((64, 7, WIDTH)).astype(np.float32)


def copies(seed, *, noise=0.0):
    """Hidden channels ``j + 7`` are affine in channel ``j``: ``relu(s u) + c``, ``s > 0``."""
    net = Net(seed)
    half = HIDDEN // 2
    up = net.random(WIDTH, half, gain=1.5 / np.sqrt(WIDTH))
    bias = net.random(half)
    stretch = net.rng.uniform(0.5, 2, half)
    other = up * stretch + noise * net.random(WIDTH, half)
    y = net("MatMul", net.x(), np.concatenate([up, other], axis=1))
    y = net("Relu", net("Add", y, np.concatenate([bias, bias * stretch])))
    y = net("Add", y, net.random(HIDDEN))
    return from_proto(net.build(net.linear(y, HIDDEN, WIDTH)))


def one_of_each_pair():
    choice = np.random.default_rng(1).integers(0, 2, HIDDEN // 2)
    return {("mlp.0", "mlp"): np.sort(np.arange(HIDDEN // 2) + choice * HIDDEN // 2)}


def test_affine_copies_of_channels_cost_nothing():
    x = activations(seed=1)
    recipe = Recipe("corp", ridge=VANISHING, kept=one_of_each_pair())
    model = copies(0)
    catalog, _, solution = solved(model, recipe, {"mlp": 0.5})
    assert squared_error(model, catalog, solution, x) <= REDUNDANT
    assert solution.folds[0].evidence.error <= REDUNDANT
    assert solution.folds[0].evidence.unexplained <= REDUNDANT


@pytest.mark.parametrize("method", ["mean", "none"])
def test_copies_cost_something_without_the_repair(method):
    model = copies(0)
    recipe = Recipe(method, kept=one_of_each_pair())
    catalog, _, solution = solved(model, recipe, {"mlp": 0.5})
    assert squared_error(model, catalog, solution, activations(seed=1)) > 1e-2


def test_almost_copies_cost_something():
    """The wrong twin: what is no copy is not free."""
    model = copies(0, noise=0.1)
    recipe = Recipe("corp", ridge=VANISHING, kept=one_of_each_pair())
    catalog, _, solution = solved(model, recipe, {"mlp": 0.5})
    assert squared_error(model, catalog, solution, activations(seed=1)) > 100 * REDUNDANT


def test_hidden_channels_of_low_rank_need_no_more_than_their_rank():
    """Any four channels will do, so the ranking may choose which."""
    net = Net(0)
    low = net.random(WIDTH, 4) @ net.random(4, HIDDEN)
    y = net("Neg", net("Add", net("MatMul", net.x(), low), net.random(HIDDEN)))
    model = from_proto(net.build(net.linear(y, HIDDEN, WIDTH)))
    recipe = Recipe("corp", ridge=VANISHING)
    catalog, _, solution = solved(model, recipe, {"mlp": 10 / HIDDEN}, x=noise(0))
    assert len(solution.folds[0].kept) == 4
    assert squared_error(model, catalog, solution, noise(1)) <= REDUNDANT


def well_conditioned(net, rank):
    """``[rank, HEAD]``: the first ``rank`` coordinates by themselves are an orthonormal basis."""
    first = np.linalg.qr(net.random(rank, rank))[0]
    second = net.random(rank, HEAD)
    return np.concatenate([first, second[:, : HEAD - rank]], axis=1)


def low_rank_attention(rank):
    """Queries and keys, biases included, lie in ``rank`` dimensions of every head."""
    net = Net(0)
    net.x()
    made = []
    for _ in range(2):
        bases = np.stack([well_conditioned(net, rank) for _ in range(HEADS)])
        weight = np.einsum("ihr,hre->ihe", net.random(WIDTH, HEADS, rank), bases)
        bias = np.einsum("hr,hre->he", net.random(HEADS, rank), bases)
        y = net("MatMul", "x", weight.reshape(WIDTH, -1))
        made.append(split_heads(net, net("Add", y, bias.reshape(-1))))
    value = split_heads(net, net.linear("x", WIDTH, HEADS * HEAD))
    return from_proto(net.build(merge_heads(net, mix(net, *made, value))))


def test_queries_and_keys_of_low_rank_need_no_more_than_their_rank():
    model = low_rank_attention(3)
    kept = {("attention.0", "qk"): np.tile(np.arange(3), (HEADS, 1))}
    recipe = Recipe("corp", ridge=VANISHING, kept=kept)
    catalog, _, solution = solved(model, recipe, {"qk": 0.5}, x=noise(0))
    assert solution.folds[0].query.shape == (HEADS, HEAD, 3)
    assert squared_error(model, catalog, solution, noise(1)) <= REDUNDANT
    assert solution.folds[0].evidence.error <= REDUNDANT


@pytest.mark.parametrize(("rank", "method"), [(4, "corp"), (3, "none"), (3, "mean")])
def test_one_more_dimension_or_no_repair_costs_something(rank, method):
    model = low_rank_attention(rank)
    recipe = Recipe(method, ridge=VANISHING)
    catalog, _, solution = solved(model, recipe, {"qk": 0.5}, x=noise(0))
    assert squared_error(model, catalog, solution, noise(1)) > 100 * REDUNDANT


# What is kept


def test_channels_that_are_given_are_kept_in_their_order(tiny):
    model = tiny("mlp")
    kept = np.array([13, 2, 5])
    recipe = Recipe("corp", kept={("mlp.0", "mlp"): kept})
    catalog, _, solution = solved(model, recipe, {"mlp": 11 / HIDDEN})
    assert solution.folds[0].kept.tolist() == [13, 2, 5]
    (block,) = find_blocks(operate(model, catalog, solution).model).blocks
    assert block.width == 3


def test_coordinates_that_are_given_are_kept_head_by_head(tiny):
    model = tiny("separate")
    kept = np.array([[0, 1, 2], [1, 4, 5]])
    _, _, solution = solved(model, Recipe("corp", kept={("attention.0", "qk"): kept}), {"qk": 0.5})
    (fold,) = solution.folds
    for maps in (fold.query, fold.key):
        for head, coordinates in enumerate(kept):
            assert np.flatnonzero(np.abs(maps[head]).sum(axis=1)).tolist() == coordinates.tolist()


def test_by_default_the_channels_of_highest_energy_are_kept(tiny):
    _, statistics, solution = solved(tiny("mlp"), Recipe("corp"), {"mlp": 0.5})
    moments = statistics.sites["mlp.0.hidden"]
    energy = np.diagonal(moments.gram)
    assert solution.folds[0].kept.tolist() == sorted(np.argsort(-energy)[:7].tolist())


def test_by_default_the_coordinates_of_highest_energy_are_kept(tiny):
    _, statistics, solution = solved(tiny("separate"), Recipe("none"), {"qk": 0.5})
    expected = [
        sorted(np.argsort(-energy)[:3].tolist()) for energy in statistics.energies["attention.0"]
    ]
    (fold,) = solution.folds
    assert [np.flatnonzero(head.any(axis=1)).tolist() for head in fold.query] == expected
    assert [np.flatnonzero(head.any(axis=1)).tolist() for head in fold.key] == expected


def lopsided():
    """Hidden channel 0 is loud, but hardly read; all others are of like energy and weight."""
    net = Net(0)
    up = net.random(WIDTH, HIDDEN)
    up[:, 0] *= 4
    y = net("Relu", net("MatMul", net.x(), up))
    down = net.random(HIDDEN, WIDTH)
    down[0] *= 1e-4
    return from_proto(net.build(net("MatMul", y, down)))


def test_the_energy_norm_ranking_also_counts_weights():
    kept = {
        ranking: solved(lopsided(), Recipe("corp", ranking=ranking), {"mlp": 0.5})[2].folds[0].kept
        for ranking in ("energy", "energy-norm")
    }
    assert 0 in kept["energy"]
    assert 0 not in kept["energy-norm"]


@pytest.mark.parametrize("name", ["mlp", "mlp_gated", "mlp_gemm"])
def test_the_energy_norm_ranking_counts_every_weight_of_a_channel(tiny, name):
    model = tiny(name)
    catalog, statistics, solution = solved(
        model, Recipe("corp", ranking="energy-norm"), {"mlp": 0.5}
    )
    (block,) = catalog.blocks
    nodes = {node.name: node for node in model.graph.nodes}
    scores = np.diagonal(statistics.sites["mlp.0.hidden"].gram).copy()
    scores *= np.linalg.norm(weight_of(nodes, block.down, 18), axis=1)
    for source in block.sources:
        columns = np.linalg.norm(weight_of(nodes, source.linear, 18), axis=0)
        scores *= columns[source.channels]
    assert solution.folds[0].kept.tolist() == sorted(np.argsort(-scores)[:7].tolist())


@pytest.mark.parametrize("name", ["packed_split", "position_major", "scale_per_channel"])
def test_the_energy_norm_ranking_of_query_key_counts_both_columns(tiny, name):
    model = tiny(name)
    catalog, statistics, solution = solved(
        model, Recipe("none", ranking="energy-norm"), {"qk": 0.5}
    )
    (block,) = catalog.blocks
    nodes = {node.name: node for node in model.graph.nodes}
    scores = statistics.energies["attention.0"].copy()
    for route in (block.query, block.key):
        weight = weight_of(nodes, route.linear, 18)[:, route.channels] * route.gain
        scores *= np.linalg.norm(weight, axis=0)
    expected = [sorted(np.argsort(-head)[:3].tolist()) for head in scores]
    found = [np.flatnonzero(head.any(axis=1)).tolist() for head in solution.folds[0].query]
    assert found == expected


def test_the_best_ranking_is_not_the_worst_one(tiny):
    """The wrong twin of a ranking keeps the quietest channels, and loses more."""
    model = tiny("mlp")
    _, statistics, best = solved(model, Recipe("none"), {"mlp": 0.5})
    energy = np.diagonal(statistics.sites["mlp.0.hidden"].gram)
    quietest = {("mlp.0", "mlp"): np.sort(np.argsort(energy)[:7])}
    _, _, worst = solved(model, Recipe("none", kept=quietest), {"mlp": 0.5})
    assert worst.folds[0].evidence.error > 1.5 * best.folds[0].evidence.error


# The records


@pytest.mark.parametrize("method", ["corp", "mean", "none"])
def test_folds_are_what_the_solvers_give(tiny, method):
    model = tiny("transformer")
    _, statistics, solution = solved(model, Recipe(method, ridge=1e-2), {"mlp": 0.5, "qk": 0.5})
    assert solution.method == method
    assert [fold.block for fold in solution.folds] == [
        "attention.0",
        "mlp.0",
        "attention.1",
        "mlp.1",
    ]
    nodes = {node.name: node for node in model.graph.nodes}
    blocks = {block.id: block for block in find_blocks(model).blocks}
    for fold in solution.folds:
        if isinstance(fold, MlpFold):
            linear = blocks[fold.block].down
            bias = np.asarray(nodes[linear.bias_node].inputs[1].values, np.float64)
            expected = recover_mlp(
                statistics.sites[f"{fold.block}.hidden"],
                fold.kept,
                weight_of(nodes, linear, 18),
                bias,
                repair=method,
                ridge=1e-2,
            )
            assert distance(fold.weight, expected.weight) <= rounding(width=HIDDEN)
            assert distance(fold.bias, expected.bias) <= rounding(width=HIDDEN)
            assert fold.evidence.error == expected.error
        else:
            assert isinstance(fold, QueryKeyFold)
            kept = np.array([np.flatnonzero(head.any(axis=1)) for head in fold.query])
            expected = recover_query_key(
                statistics.sites[f"{fold.block}.query"],
                statistics.sites[f"{fold.block}.key"],
                kept,
                repair=method,
                ridge=1e-2,
            )
            assert np.array_equal(fold.query, expected.query)
            assert np.array_equal(fold.key, expected.key)


def test_a_repair_predicts_less_error_than_none(tiny):
    errors = {}
    for method in METHODS:
        _, _, solution = solved(tiny("transformer"), Recipe(method), {"mlp": 0.5, "qk": 0.5})
        errors[method] = [fold.evidence.error for fold in solution.folds]
    for best, corp, mean, none in zip(*(errors[method] for method in METHODS), strict=True):
        assert best < corp < mean <= none


def test_solving_twice_gives_the_same_bits(tiny):
    first, second = (
        solved(tiny("transformer"), Recipe("corp"), {"mlp": 0.5, "qk": 0.5})[2] for _ in range(2)
    )
    for one, other in zip(first.folds, second.folds, strict=True):
        names = ("kept", "weight", "bias") if isinstance(one, MlpFold) else ("query", "key")
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


# Requests that cannot be met


@pytest.mark.parametrize("ridge", [-1.0, -1e-9, np.nan, np.inf])
def test_a_ridge_that_is_none_is_refused(tiny, ridge):
    with pytest.raises(PlanError, match=r"--ridge .* is no regularisation; it must be 0 or more"):
        solved(tiny("mlp"), Recipe("corp", ridge=ridge), {"mlp": 0.5})


def test_an_unknown_ranking_is_refused_with_those_that_there_are(tiny):
    with pytest.raises(PlanError, match="no ranking is called 'size'; choose one of energy, ener"):
        solved(tiny("mlp"), Recipe("corp", ranking="size"), {"mlp": 0.5})


def test_a_singular_system_without_ridge_is_refused_with_a_remedy():
    net = Net(0)
    low = net.random(WIDTH, 3) @ net.random(3, HIDDEN)
    y = net("Neg", net("MatMul", net.x(), low))
    model = from_proto(net.build(net.linear(y, HIDDEN, WIDTH)))
    with pytest.raises(IllConditioned, match="more samples or raise --ridge"):
        solved(model, Recipe("corp", ridge=0.0), {"mlp": 0.5})


def test_the_model_is_not_changed(tiny):
    model = tiny("transformer")
    before = model.proto().SerializeToString(deterministic=True)
    solved(model, Recipe("corp", ranking="energy-norm"), {"mlp": 0.5, "qk": 0.5})
    assert model.proto().SerializeToString(deterministic=True) == before
