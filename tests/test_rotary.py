"""Rotated queries and keys: pairs are found, cut and repaired as if it were written out."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest

from corp_onnx import cli
from corp_onnx.blocks import Attention, axes_of, find_blocks
from corp_onnx.blocks.layouts import arrange
from corp_onnx.calibration.calibrate import gather
from corp_onnx.calibration.moments import Moments
from corp_onnx.calibration.sites import channels_last, operand
from corp_onnx.errors import PlanError
from corp_onnx.graph.extracts import exposed
from corp_onnx.graph.model import from_proto, load
from corp_onnx.plan import uniform
from corp_onnx.solve import METHODS, Recipe, solve
from corp_onnx.solve.folds import EXACT, QueryKeyFold, Solution, ValueOutputFold
from corp_onnx.solve.rotary import (
    curve_of,
    eliminated_pairs,
    pair_grams,
    pair_maps,
    positions_of,
    recover_pairs,
    whole_pairs,
)
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from corp_onnx.verify.confirm import confirmed
from corp_onnx.verify.promise import measured_errors
from corp_onnx.verify.verify import blocks_of
from tests import zoo_models
from tests.attention_builders import (
    HEAD,
    HEADS,
    MORE,
    angles,
    built,
    merged,
    packed,
    packed_with,
    products,
    rotated,
    rotated_in_pairs,
    split,
)
from tests.builders import WIDTH, feeds
from tests.full_width import run, squared_error, unchanged

HALVES = [[0, 3], [1, 4], [2, 5]]
NEIGHBOURS = [[0, 1], [2, 3], [4, 5]]
FORMS = {
    "packed_rotated": (HALVES, None),
    "packed_rotated_in_pairs": (NEIGHBOURS, None),
    "packed_rotated_but_first": (HALVES, (1, 1)),
    "packed_wholly_rotated": (HALVES, None),
}
ZOO = [
    name
    for name in zoo_models.NAMES
    if zoo_models.module_of(name)
    in {
        *("hf_llama", "hf_llama_eager", "hf_mistral", "hf_gemma", "hf_smollm3", "hf_modernbert"),
        *("hf_dinov3", "timm_dinov3", "timm_dinov3_eager", "timm_dinov3_plus"),
        *("timm_eva02", "timm_eva02_eager", "timm_eva02_large"),
    }
]
SIZES = ((1, 5), (3, 7))

BOUND = 1e-10
"""Of ``‖ŷ - y‖² / ‖y‖²``: rounding in float32 of a few hundred terms."""

VISIBLE = 1e-6
"""Errors of wrong results are at least as large."""

ALL = pytest.mark.parametrize("name", [*FORMS, *ZOO])


@cache
def found(name):
    proto = MORE[name](0).proto if name in MORE else zoo_models.load(name)
    model = from_proto(proto)
    catalog = find_blocks(model, rotary=True)
    given = [
        zoo_models.feeds(name, *size) if name in ZOO else feeds(proto, *size) for size in SIZES
    ]
    return model, catalog, given


def rotated_blocks(catalog):
    return [b for b in catalog.blocks if isinstance(b, Attention) and b.rotation is not None]


def error(actual, expected, given):
    pairs = zip(run(actual, *given), run(expected, *given), strict=True)
    return max(squared_error(*pair) for pair in pairs)


def alone(solution):
    """Queries and keys only."""
    folds = tuple(fold for fold in solution.folds if isinstance(fold, QueryKeyFold))
    return replace(solution, folds=folds)


@pytest.mark.parametrize("name", FORMS)
def test_pairs_are_found_as_they_are_written(name):
    _, catalog, _ = found(name)
    (block,) = rotated_blocks(catalog)
    pairs, skipped = FORMS[name]
    assert axes_of(block) == ("qk", "vo")
    for route in (block.query, block.key):
        assert route.rotation.pairs.tolist() == pairs
        assert route.rotation.skipped == skipped


@pytest.mark.parametrize("name", ZOO)
def test_real_exports_offer_their_rotated_queries_and_keys(name):
    _, catalog, _ = found(name)
    blocks = rotated_blocks(catalog)
    assert blocks
    assert all("qk" in axes_of(block) for block in blocks)


def test_without_being_asked_for_they_are_refused_with_a_hint():
    (block,) = find_blocks(from_proto(MORE["packed_rotated"](0).proto)).blocks
    assert axes_of(block) == ("vo",)
    assert "see --rotary" in block.refused["qk"]


@ALL
def test_what_is_summed_is_what_enters_the_product(name):
    """Statistics turn what a projection gives by themselves; the graph has it turned."""
    model, catalog, given = found(name)
    for route in (r for b in rotated_blocks(catalog) for r in (b.query, b.key)):
        wanted = [route.linear.output, *route.rotation.tensors, route.operand]
        for seen in run(exposed(model, wanted), *given):
            tokens, turned_there = (
                channels_last(route, seen[route.linear.output]),
                seen[route.operand],
            )
            as_it_was = replace(route, rotation=None)
            ours, plain = (
                arrange(
                    route.layout,
                    operand(one, tokens, seen).reshape(*tokens.shape[:-1], *route.channels.shape),
                    turned_there.shape,
                )
                for one in (route, as_it_was)
            )
            np.testing.assert_allclose(ours, turned_there, rtol=1e-4, atol=1e-5)
            assert np.abs(plain - turned_there).max() > 0.1


@ALL
@pytest.mark.parametrize("make", [unchanged, turned])
def test_keeping_every_pair_gives_back_the_dense_function(name, make):
    model, catalog, given = found(name)
    made = operate(model, catalog, make(model, catalog)).model
    onnx.checker.check_model(made.proto(), full_check=True)
    assert error(made, model, given) <= BOUND


@ALL
def test_values_can_go_alone_and_what_is_packed_with_them_comes_back_turned(name):
    model, catalog, given = found(name)
    full = turned(model, catalog)
    folds = tuple(fold for fold in full.folds if isinstance(fold, ValueOutputFold))
    made = operate(model, catalog, replace(full, folds=folds)).model
    assert error(made, model, given) <= BOUND


def keys_apart(net):
    """Queries are packed with values, keys have a layer of their own."""
    both = net.linear(net.x(), WIDTH, 2 * HEADS * HEAD)
    query, value = (
        split(net, y, HEADS) for y in net("Split", both, outputs=2, axis=2, num_outputs=2)
    )
    keys = split(net, net.linear("x", WIDTH, HEADS * HEAD), HEADS)
    turned_ones = (rotated_in_pairs(net, y) for y in (query, keys))
    return merged(net, products(net, *turned_ones, value), value=HEAD)


def test_queries_that_come_back_keep_the_order_of_their_channels():
    """The keys are not written anew: they would meet other channels."""
    proto = built(keys_apart)(0).proto
    model, given = from_proto(proto), [feeds(proto, *size) for size in SIZES]
    catalog = find_blocks(model, rotary=True)
    full = turned(model, catalog)
    (values,) = (fold for fold in full.folds if isinstance(fold, ValueOutputFold))
    assert error(operate(model, catalog, full).model, model, given) <= BOUND
    made = operate(model, catalog, replace(full, folds=(values,))).model
    assert error(made, model, given) <= BOUND


@pytest.mark.parametrize("name", FORMS)
def test_factors_that_do_not_cancel_show(name):
    """The wrong twin: queries get ``1 / c`` of the keys' ``c`` instead of ``1 / c̄``."""
    model, catalog, given = found(name)
    solution = alone(turned(model, catalog))

    def conjugated(fold):
        pairs = rotated_blocks(catalog)[0].rotation.pairs
        count = fold.query.shape[2] // 2
        order = [
            pairs.tolist().index([i, j]) for i, j in zip(*np.split(fold.positions, 2), strict=True)
        ]
        first = pairs[order, 0]
        factors = (
            fold.query[:, first, np.arange(count)]
            + 1j * fold.query[:, first, count + np.arange(count)]
        )
        return replace(fold, query=pair_maps(pairs, np.array(order), factors.conj()))

    wrong = replace(solution, folds=tuple(map(conjugated, solution.folds)))
    assert error(operate(model, catalog, solution).model, model, given) <= BOUND
    assert error(operate(model, catalog, wrong).model, model, given) > VISIBLE


@pytest.mark.parametrize("name", [*FORMS, "hf_llama.ts17", "timm_eva02.dynamo18", "hf_dinov3.ts17"])
def test_fewer_pairs_compute_what_zeros_at_full_width_do(name):
    model, catalog, given = found(name)

    def cut(kept, factors):
        folds = []
        for block in rotated_blocks(catalog):
            pairs = block.rotation.pairs
            maps = [
                pair_maps(pairs, kept, np.tile(factors, (len(route.channels), 1)))
                for route in (block.query, block.key)
            ]
            folds.append(QueryKeyFold(block.id, *maps, EXACT, positions_of(pairs, kept)))
        return operate(model, catalog, Solution("by hand", tuple(folds))).model

    count = catalog_width(catalog) // 2
    small = cut(np.array([1]), np.ones(1))
    large = cut(np.arange(count), (np.arange(count) == 1).astype(float))
    assert error(small, large, given) <= BOUND
    assert error(small, model, given) > VISIBLE
    again = rotated_blocks(blocks_of(small, catalog))
    assert [block.head_width for block in again] == [2] * len(rotated_blocks(catalog))


def catalog_width(catalog):
    (width,) = {block.head_width for block in rotated_blocks(catalog)}
    return width


@pytest.mark.parametrize("name", [*FORMS, "hf_llama.dynamo18", "timm_dinov3.dynamo18"])
@pytest.mark.parametrize("method", METHODS)
def test_promises_hold_on_what_was_calibrated(name, method):
    model, catalog, _ = found(name)
    make = (
        zoo_models.feeds
        if name in ZOO
        else lambda _, *size, seed: feeds(model.proto(), *size, seed)
    )
    batches = [make(name, 4, 9, seed=seed) for seed in range(3)]
    statistics = gather(model, catalog, batches)
    plan = uniform(catalog, {"qk": 0.5}, align=1)
    solution = solve(model, catalog, plan, statistics, Recipe(method, ridge=1e-9))
    small = operate(model, catalog, solution).model
    measured = measured_errors(
        *(model, catalog, small, blocks_of(small, catalog), batches),
        axes=("qk",),
        without_row_constants=method == "best",
    )
    for cut in plan.cuts:
        promised = solution.of(cut.block, "qk").evidence.error
        if rotation_of(catalog, cut.block):
            assert cut.to % 2 == 0
            assert measured[cut.block, "qk"] == pytest.approx(promised, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", ["packed_rotated", "packed_rotated_in_pairs"])
def test_the_paper_keeps_the_pairs_of_most_energy_and_best_those_that_are_missed_most(name):
    model, catalog, _ = found(name)
    statistics = gather(model, catalog, [feeds(model.proto(), 6, 9, seed) for seed in range(3)])
    plan, (block,) = uniform(catalog, {"qk": 0.5}, align=1), rotated_blocks(catalog)
    pairs = block.rotation.pairs

    def kept(recipe):
        fold = solve(model, catalog, plan, statistics, recipe).of(block.id, "qk")
        return {tuple(pair) for pair in np.reshape(fold.positions, (2, -1)).T.tolist()}

    energies = np.zeros_like(statistics.energies[block.id])
    energies[:, pairs] = [[10.0, 0.0], [1.0, 1.5], [2.0, 1.0]]
    by_energy = replace(statistics, energies={block.id: energies})
    fold = solve(model, catalog, plan, by_energy, Recipe("corp")).of(block.id, "qk")
    assert sorted(fold.positions) == sorted(pairs[[0, 2]].ravel())
    sites = (statistics.sites[f"{block.id}.{role}"] for role in ("query", "centred_key"))
    order, _ = eliminated_pairs(pair_grams(*sites, block.key_heads, pairs), ridge=1e-3)
    assert kept(Recipe("best", refit=False)) == {tuple(pair) for pair in pairs[order[-2:]].tolist()}
    chosen = {(block.id, "qk"): np.tile(pairs[[0, 2]].ravel(), (len(block.key.channels), 1))}
    assert kept(Recipe("corp", kept=chosen)) == {tuple(pair) for pair in pairs[[0, 2]].tolist()}


def rotation_of(catalog, name):
    return next(block.rotation for block in catalog.blocks if block.id == name)


def test_a_rotation_that_is_none_is_found_out_by_the_data():
    """Both channels of a pair at angles of their own: no factor of the pair passes through."""

    def uneven(net, y):
        turn, half = net("Mul", angles(net, HEAD), 1.0 + np.arange(HEAD) / 7), HEAD // 2
        first = net("Slice", y, [0], [half], [3])
        second = net("Slice", y, [half], [2**60], [3])
        swapped = net("Concat", net("Neg", second), first, axis=3)
        return net("Add", net("Mul", y, net("Cos", turn)), net("Mul", swapped, net("Sin", turn)))

    proto = built(packed_with(uneven))(0).proto
    model = from_proto(proto)
    catalog = find_blocks(model, rotary=True)
    assert "qk" in axes_of(catalog.blocks[0])
    (block,) = confirmed(model, catalog, [feeds(proto, 3, 7)]).blocks
    assert axes_of(block) == ("vo",)
    (right,) = confirmed(*found("packed_rotated")[:2], found("packed_rotated")[2]).blocks
    assert axes_of(right) == ("qk", "vo")


def scaled_on_the_way(net, y):
    turn = angles(net, HEAD)
    half = HEAD // 2
    first = net("Slice", y, [0], [half], [3])
    second = net("Slice", y, [half], [2**60], [3])
    swapped = net("Mul", net("Concat", net("Neg", second), first, axis=3), 0.5)
    return net("Add", net("Mul", y, net("Cos", turn)), net("Mul", swapped, net("Sin", turn)))


def the_same_twice(net, y):
    turn = net("Cos", angles(net, HEAD))
    half = HEAD // 2
    first = net("Slice", y, [0], [half], [3])
    second = net("Slice", y, [half], [2**60], [3])
    swapped = net("Concat", second, first, axis=3)
    return net("Add", net("Mul", y, turn), net("Mul", swapped, net("Sin", angles(net, HEAD))))


def angles_apart(net, y):
    """Constant tables, in which the channels of a pair have angles of their own."""
    turn = np.arange(1, HEAD + 1, dtype=np.float32)[None]
    half = HEAD // 2
    first = net("Slice", y, [0], [half], [3])
    second = net("Slice", y, [half], [2**60], [3])
    swapped = net("Concat", net("Neg", second), first, axis=3)
    return net("Add", net("Mul", y, np.cos(turn)), net("Mul", swapped, np.sin(turn)))


def swap(net, y, negative=lambda net, y: net("Neg", y)):
    """``-b | a`` of the halves ``a | b``."""
    first = net("Slice", y, [0], [HEAD // 2], [3])
    second = net("Slice", y, [HEAD // 2], [2**60], [3])
    return net("Concat", negative(net, second), first, axis=3)


def terms(net, y, swapped, *tables):
    """The sum of both products, with the tables of angles or others."""
    turn = angles(net, HEAD)
    cosine, sine = tables or (net("Cos", turn), net("Sin", turn))
    return net("Add", net("Mul", y, cosine), net("Mul", swapped, sine))


def fading(net, y):
    """Besides angles there are factors that follow from the position (xPos)."""
    fade = net("Sigmoid", angles(net, HEAD))
    turn = angles(net, HEAD)
    left, right = (
        net("Mul", net("Mul", part, net(op, turn)), fade)
        for part, op in ((y, "Cos"), (swap(net, y), "Sin"))
    )
    return net("Add", left, right)


def gained(net, y):
    """One term is multiplied with a constant vector too."""
    gain = np.linspace(0.5, 2, HEAD, dtype=np.float32)
    return terms(net, net("Mul", y, gain), swap(net, y))


def reflected(net, y):
    """The sign of a half is changed by a factor: both halves gain, or both lose."""
    first = net("Slice", y, [0], [HEAD // 2], [3])
    second = net("Slice", y, [HEAD // 2], [2**60], [3])
    both = net("Neg", second), net("Mul", first, -1.0)
    return terms(net, y, net("Concat", *both, axis=3))


def cut_in_windows(net, y):
    """Turned first, then tokens are split over two axes."""
    rows = net(
        "Reshape", net("Transpose", rotated(net, y), perm=[0, 2, 1, 3]), [0, -1, 1, HEADS, HEAD]
    )
    return net("Transpose", rows, perm=[0, 1, 3, 2, 4])


REFUSED = {
    "fading": (fading, "several tables of angles turn it"),
    "gained": (gained, "several tables of angles turn it"),
    "reflected by a factor": (reflected, "turned by something else than pairs"),
    "angles apart": (angles_apart, "both channels of a pair are turned by angles of their own"),
    "scaled": (scaled_on_the_way, "it is scaled or shifted while it is turned"),
    "reflected": (the_same_twice, "it is turned by something else than pairs of channels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_turns_no_pairs_is_refused_with_the_reason(name):
    make, reason = REFUSED[name]
    (block,) = find_blocks(from_proto(built(packed_with(make))(0).proto), rotary=True).blocks
    assert axes_of(block) == ("vo",)
    assert reason in block.refused["qk"]


NEGATIONS = {
    "by a factor": lambda net, y: net("Mul", y, -1.0),
    "from nothing": lambda net, y: net("Sub", np.float32(0), y),
    "by a division": lambda net, y: net("Div", y, -1.0),
}


@pytest.mark.parametrize("name", NEGATIONS)
def test_a_sign_may_be_changed_in_any_way(name):
    def make(net, y):
        return terms(net, y, swap(net, y, NEGATIONS[name]))

    require_exact(built(packed_with(make))(0).proto)


def require_exact(proto, wrong=None):
    """In another basis a model is what it was, at all sizes, and queries and keys can be cut."""
    model, given = from_proto(proto), [feeds(proto, *size) for size in SIZES]
    catalog = find_blocks(model, rotary=True)
    assert all("qk" in axes_of(block) for block in rotated_blocks(catalog))
    assert rotated_blocks(catalog)
    made = operate(model, catalog, turned(model, catalog)).model
    assert error(made, model, given) <= BOUND
    return model, catalog, given


def cached(net, y):
    """Tables are constants, of which as many rows are taken as there are tokens in the operand."""
    turn = np.arange(64)[:, None] * (0.1 + np.arange(HEAD) % (HEAD // 2))
    end = net("Shape", y, start=2, end=3)
    tables = (
        net("Slice", make(turn).astype(np.float32), [0], end, [0]) for make in (np.cos, np.sin)
    )
    return terms(net, y, swap(net, y), *tables)


def test_tables_may_follow_from_the_size_of_what_they_turn():
    require_exact(built(packed_with(cached))(0).proto)


def channels_first(net, y):
    """Turned with its channels before its tokens, and so are the tables."""
    turned_over = net("Transpose", y, perm=[0, 1, 3, 2])
    turn = net("Transpose", angles(net, HEAD), perm=[1, 0])
    first = net("Slice", turned_over, [0], [HEAD // 2], [2])
    second = net("Slice", turned_over, [HEAD // 2], [2**60], [2])
    swapped = net("Concat", net("Neg", second), first, axis=2)
    made = net(
        "Add", net("Mul", turned_over, net("Cos", turn)), net("Mul", swapped, net("Sin", turn))
    )
    return net("Transpose", made, perm=[0, 1, 3, 2])


def test_tables_may_have_their_axes_in_another_order():
    _, catalog, _ = require_exact(built(packed_with(channels_first))(0).proto)
    (block,) = rotated_blocks(catalog)
    assert block.rotation.cosine.order == (1, 0)


def test_constant_tables_are_kept_once():
    """Two blocks turn queries and keys by the same angles: one table of cosines, one of sines."""
    model, catalog, _ = found("timm_dinov3.dynamo18")
    made = operate(model, catalog, unchanged(model, catalog)).model
    kept = {name for name in made.graph.tensors() if "/angles" in name}
    assert len(rotated_blocks(catalog)) == 2
    assert len(kept) == 2


def sized(net):
    """The width of a rotated query is a factor of the output."""
    query, keys, value = packed(net)
    query = rotated(net, query)
    mixed = merged(net, products(net, query, rotated(net, keys), value), value=HEAD)
    width = net("Gather", net("Shape", query), np.int64(3), axis=0)
    return net("Mul", mixed, net("Cast", width, to=onnx.TensorProto.FLOAT))


def test_who_asks_for_the_width_of_what_is_turned_goes_on_hearing_the_same():
    model, catalog, given = require_exact(built(sized)(0).proto)
    (block,) = rotated_blocks(catalog)
    pairs = block.rotation.pairs

    def cut(kept, factors):
        maps = [
            pair_maps(pairs, kept, np.tile(factors, (len(route.channels), 1)))
            for route in (block.query, block.key)
        ]
        fold = QueryKeyFold(block.id, *maps, EXACT, positions_of(pairs, kept))
        return operate(model, catalog, Solution("by hand", (fold,))).model

    small, large = cut(np.array([1]), np.ones(1)), cut(np.arange(3), np.array([0.0, 1.0, 0.0]))
    assert error(small, large, given) <= BOUND


def placed(net, y):
    """Positions are an input; the first two tokens are not turned."""
    if all(value.name != "places" for value in net.inputs):
        net.input("places", "batch", "tokens", dtype=np.int64)
    first, others = net("Slice", y, [0], [2], [2]), net("Slice", y, [2], [2**60], [2])
    place = net("Cast", net("Slice", "places", [2], [2**60], [1]), to=onnx.TensorProto.FLOAT)
    speeds = (0.1 + np.arange(HEAD) % (HEAD // 2)).astype(np.float32)
    turn = net("Unsqueeze", net("Mul", net("Unsqueeze", place, [2]), speeds), [1])
    made = terms(net, others, swap(net, others), net("Cos", turn), net("Sin", turn))
    return net("Concat", first, made, axis=2)


def test_a_cut_rotation_is_found_again_where_positions_are_given():
    """Its tables are filled up for the tokens that are not turned, and follow an input."""
    model, catalog, _ = require_exact(built(packed_with(placed))(0).proto)
    batches = [feeds(model.proto(), 6, 9, seed) for seed in range(3)]
    statistics = gather(model, catalog, batches)
    solution = solve(model, catalog, uniform(catalog, {"qk": 0.5}, align=1), statistics, Recipe())
    small = operate(model, catalog, solution).model
    again = blocks_of(small, catalog)
    assert [axes_of(block) for block in again.blocks] == [("qk", "vo")]
    measured = measured_errors(model, catalog, small, again, batches, axes=("qk",))
    assert set(measured) == {(block.id, "qk") for block in catalog.blocks}


def test_tokens_that_are_split_later_are_refused():
    proto = built(packed_with(cut_in_windows))(0).proto
    for block in find_blocks(from_proto(proto), rotary=True).blocks:
        assert "qk" not in axes_of(block)


def in_turn(net):
    """One set of weights twice, turned in other pairs the second time."""
    y = net.x()
    weights = [net.random(WIDTH, HEADS * HEAD) for _ in range(3)]
    last = net.random(HEADS * HEAD, WIDTH)
    for turn in (rotated, rotated_in_pairs):
        query, keys, value = (split(net, net("MatMul", y, weight), HEADS) for weight in weights)
        mixed = net(
            "Transpose", products(net, turn(net, query), turn(net, keys), value), perm=[0, 2, 1, 3]
        )
        y = net("Add", y, net("MatMul", net("Reshape", mixed, [0, 0, HEADS * HEAD]), last))
    return y


def test_blocks_of_the_same_weights_that_are_turned_otherwise_are_no_twins():
    catalog = find_blocks(from_proto(built(in_turn)(0).proto), rotary=True)
    first, second = rotated_blocks(catalog)
    assert (first.rotation.pairs != second.rotation.pairs).any()
    assert first.twins == second.twins == ()
    alike = find_blocks(from_proto(built(in_turn)(0).proto)).blocks
    assert all(len(block.twins) == 2 for block in alike)


def shown(net):
    query, keys, value = packed(net)
    swapped = net("Neg", net("Slice", query, [HEAD // 2], [2**60], [3]))
    first = net("Slice", query, [0], [HEAD // 2], [3])
    turn = angles(net, HEAD)
    terms = (
        net("Mul", query, net("Cos", turn)),
        net("Mul", net("Concat", swapped, first, axis=3), net("Sin", turn)),
    )
    mixed = products(net, net("Add", *terms), rotated(net, keys), value)
    return merged(net, mixed, value=HEAD), net("Relu", swapped)


def test_what_is_read_on_the_way_is_refused():
    (block,) = find_blocks(from_proto(built(shown)(0).proto), rotary=True).blocks
    assert axes_of(block) == ("vo",)
    assert "is also read by Relu" in block.refused["qk"]


def test_a_part_of_the_channels_is_refused():
    proto = MORE["packed_part_rotated"](0).proto
    (block,) = find_blocks(from_proto(proto), rotary=True).blocks
    assert "only a part of the channels of a head is turned" in block.refused["qk"]


# From the command line.


@pytest.fixture
def exported(tmp_path):
    """A language model with rotary positions as a file, and token numbers to calibrate on."""
    name = "hf_llama.ts17"
    onnx.save(zoo_models.load(name), tmp_path / "dense.onnx")
    batches = [zoo_models.feeds(name, 8, seed=seed) for seed in range(8)]
    tokens = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    np.savez(tmp_path / "data.npz", **tokens)
    return tmp_path


def command(capsys, folder, verb, *options):
    """Exit status and JSON document of a verb on the file."""
    status = cli.main([verb, str(folder / "dense.onnx"), *map(str, options), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_inspect_shows_them_when_asked(exported, capsys):
    _, plain = command(capsys, exported, "inspect")
    _, asked = command(capsys, exported, "inspect", "--rotary")
    axes = [
        [b["prunable"] for b in d["blocks"] if b["kind"] == "attention"] for d in (plain, asked)
    ]
    assert axes == [[["vo"]] * 2, [["qk", "vo"]] * 2]


@pytest.mark.parametrize("method", ["best", "corp"])
def test_prune_cuts_pairs_when_asked(exported, capsys, method):
    small = exported / "small.onnx"
    options = ["-o", small, "--data", exported / "data.npz", "--method", method, "--align", 1]
    _, document = command(capsys, exported, "prune", *options, "--qk", 0.34, "--rotary")
    assert [(b["cuts"]["qk"]["from"], b["cuts"]["qk"]["to"]) for b in document["blocks"]] == [
        (12, 8),
        (12, 8),
    ]
    checks = {check["name"]: check["passed"] for check in document["checks"]}
    assert checks["structure"]
    assert checks["promises"]  # random weights leave little to repair
    blocks = find_blocks(load(small), rotary=True).blocks
    assert {b.head_width for b in blocks if isinstance(b, Attention)} == {8}


def test_prune_leaves_them_alone_unless_asked(exported, capsys):
    small = exported / "small.onnx"
    data = ["--data", exported / "data.npz", "--qk", 0.5]
    status = cli.main(["prune", *map(str, [exported / "dense.onnx", "-o", small, *data])])
    assert status == 3
    assert "see --rotary" in capsys.readouterr().err
    assert not small.exists()


def test_statistics_of_them_are_gathered_when_asked(exported, capsys):
    for flags, passes in ([], False), (["--rotary"], True):
        statistics, small = exported / "statistics.npz", exported / "small.onnx"
        data = ["-o", statistics, "--data", exported / "data.npz"]
        command(capsys, exported, "calibrate", *data, *flags)
        options = ["-o", small, "--stats", statistics, "--qk", 0.34, "--align", 1, "--rotary"]
        status = cli.main(["prune", str(exported / "dense.onnx"), *map(str, options)])
        assert (status in {0, 1}) == passes, capsys.readouterr().err  # 1: little to repair
        assert small.exists() == passes


def test_a_budget_spends_on_pairs_too(exported, capsys):
    small = exported / "small.onnx"
    options = ["-o", small, "--data", exported / "data.npz", "--align", 1, "--macs", 0.7]
    _, document = command(capsys, exported, "prune", *options, "--rotary")
    widths = [b["cuts"]["qk"]["to"] for b in document["blocks"] if "qk" in b["cuts"]]
    assert len(widths) == 2
    assert all(width % 2 == 0 for width in widths)


# The closed form, against what is written out.

TOKENS, PAIRS, KEY_HEADS = 40, 5, np.array([0, 0, 1])


@pytest.fixture(scope="module")
def drawn():
    """Queries ``[n, 3, 10]`` and keys ``[m, 2, 10]``, correlated across pairs, and the pairs."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((2 * PAIRS, 2 * PAIRS)) * np.geomspace(1, 0.1, 2 * PAIRS)
    query = rng.standard_normal((TOKENS, 3, 2 * PAIRS)) @ mixing
    key = rng.standard_normal((TOKENS + 7, 2, 2 * PAIRS)) @ mixing + 0.3
    pairs = rng.permutation(2 * PAIRS).reshape(-1, 2)
    return query, key, pairs


def features(drawn):
    """Real and, negated, imaginary parts of ``q k̄`` of all pairs of tokens, by head."""
    query, key, pairs = drawn
    made = []
    for head, group in enumerate(KEY_HEADS):
        q, k = (x[:, pairs[:, 0]] + 1j * x[:, pairs[:, 1]] for x in (query[:, head], key[:, group]))
        products = (q[:, None] * k[None].conj()).reshape(-1, len(pairs))
        made.append(np.concatenate([products.real, -products.imag], axis=1))
    return np.stack(made)


def grams_of(drawn):
    query, key, pairs = drawn
    return pair_grams(Moments.of(query), Moments.of(key), KEY_HEADS, pairs)


def test_grams_are_those_of_all_pairs_of_tokens(drawn):
    made = features(drawn)
    expected = made.swapaxes(1, 2) @ made / made.shape[1]
    np.testing.assert_allclose(grams_of(drawn), expected, rtol=1e-10, atol=1e-12)
    wrong = grams_of((*drawn[:2], drawn[2][:, ::-1]))
    assert not np.allclose(wrong, expected, rtol=1e-3)


@pytest.mark.parametrize("kept", [[0], [1, 3], [0, 2, 4]])
def test_factors_are_those_of_least_squares(drawn, kept):
    query, key, pairs = drawn
    maps = recover_pairs(
        grams_of(drawn), np.array(kept), pairs, KEY_HEADS, repair="corp", ridge=0.0
    )
    lost = total = bare = 0.0
    for head, of_head in enumerate(features(drawn)):
        some = [*kept, *np.add(kept, PAIRS)]
        dense = of_head[:, :PAIRS].sum(axis=1)
        weights, *_ = np.linalg.lstsq(of_head[:, some], dense, rcond=None)
        expected = of_head[:, some] @ weights
        q, k = (
            query[:, head] @ maps.query[head],
            key[:, KEY_HEADS[head]] @ maps.key[KEY_HEADS[head]],
        )
        np.testing.assert_allclose((q @ k.T).reshape(-1), expected, rtol=1e-8, atol=1e-8)
        lost += np.square(dense - expected).sum()
        bare += np.square(dense - of_head[:, kept].sum(axis=1)).sum()
        total += np.square(dense).sum()
    assert maps.error == pytest.approx(lost / total, rel=1e-8)
    assert maps.unexplained == pytest.approx(lost / bare, rel=1e-8)
    assert sorted(positions_of(pairs, np.array(kept))) == sorted(pairs[kept].ravel())


def test_without_repair_pairs_stay_what_they_were(drawn):
    query, _, pairs = drawn
    maps = recover_pairs(
        grams_of(drawn), np.array([1, 2]), pairs, KEY_HEADS, repair="none", ridge=0.1
    )
    np.testing.assert_array_equal(
        query[:, 0] @ maps.query[0], query[:, 0][:, positions_of(pairs, np.array([1, 2]))]
    )
    assert maps.unexplained == pytest.approx(1.0)


def test_pairs_go_one_by_one_where_the_others_make_up_for_them_best(drawn):
    grams = grams_of(drawn)
    order, errors = eliminated_pairs(grams, ridge=1e-9)

    def left(gone):
        kept = np.setdiff1d(np.arange(PAIRS), gone)
        return recover_pairs(grams, kept, drawn[2], KEY_HEADS, repair="corp", ridge=1e-9).error

    for step in range(PAIRS - 1):
        others = np.setdiff1d(np.arange(PAIRS), order[:step])
        trials = {pair: left([*order[:step], pair]) for pair in others}
        assert min(trials, key=trials.get) == order[step]
        assert errors[step + 1] == pytest.approx(trials[order[step]], rel=1e-4)
    assert errors[-1] == pytest.approx(1.0, rel=1e-6)
    assert curve_of(errors)[[0, 1, 2, 2 * PAIRS]].tolist() == [
        *[errors[-1]] * 2, errors[-2], 0.0
    ]  # fmt: skip


def test_of_two_equal_pairs_one_goes(drawn):
    query, key, pairs = drawn
    query, key = query.copy(), key.copy()
    for array in (query, key):
        array[..., pairs[4]] = array[..., pairs[0]]
    order, errors = eliminated_pairs(grams_of((query, key, pairs)), ridge=1e-7)
    assert order[0] in {0, 4}
    assert errors[1] < 1e-5 < errors[2]
    assert order[1] not in {0, 4}


def test_chosen_channels_are_whole_pairs():
    pairs = np.array([[0, 2], [1, 3]])
    assert whole_pairs(np.array([[0, 2], [2, 0]]), pairs).tolist() == [0]
    for kept in ([[0, 1]], [[0, 2], [1, 3]], [[0]]):
        with pytest.raises(PlanError, match="whole pairs of channels, the same in every head"):
            whole_pairs(np.array(kept), pairs)


def test_widths_are_even_whatever_the_alignment():
    _, catalog, _ = found("packed_rotated")
    (cut,) = uniform(catalog, {"qk": 0.5}, align=1).cuts
    assert (cut.width, cut.to) == (6, 4)
    plain = find_blocks(from_proto(MORE["packed_grouped"](0).proto))
    (cut,) = uniform(plain, {"qk": 0.5}, align=1).cuts
    assert cut.to == 3
