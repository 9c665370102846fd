"""The smaller graph computes what its folds say, and everything else stays as it was."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest

from corp_onnx.blocks import Mlp, axes_of, find_blocks
from corp_onnx.blocks.linear import bias_of, weight_of
from corp_onnx.errors import SurgeryError
from corp_onnx.graph.model import from_proto
from corp_onnx.solve.folds import EXACT, MlpFold, QueryKeyFold, Solution, ValueOutputFold
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from tests.builders import (
    HEAD,
    HEADS,
    HIDDEN,
    TINY,
    WIDTH,
    Net,
    feeds,
    merge_heads,
    mix,
    projections,
    relu,
    sizes_of,
    split_heads,
)
from tests.full_width import narrowed, padded, run, squared_error, unchanged

ALL = pytest.mark.parametrize("name", TINY)

BOUND = 1e-10
"""Of ``‖ŷ - y‖² / ‖y‖²``: a relative error of 1e-5, rounding in float32 of a few hundred terms."""

HALF_BOUND = 1e-5
"""The same for models in float16, whose maps are rounded to 11 bits."""

VISIBLE = 1e-6
"""Errors of wrong results are at least as large."""


@cache
def found(name):
    model = from_proto(TINY[name](0).proto)
    return model, find_blocks(model)


@cache
def half_of(name):
    """The model with every axis cut to half: not what it was, but a model like any other."""
    model, catalog = found(name)
    return operate(model, catalog, narrowed(turned(model, catalog), 0.5)).model


def bound_of(name):
    return HALF_BOUND if "half" in name and "heads" not in name else BOUND


def errors(actual, expected, name):
    """Relative squared errors of two models at two batch and sequence sizes."""
    pairs = zip(run(actual, *inputs_of(name)), run(expected, *inputs_of(name)), strict=True)
    return [squared_error(*pair) for pair in pairs]


def inputs_of(name):
    return [feeds(TINY[name](0).proto, *size) for size in sizes_of(name)]


def only(solution, kind):
    return replace(solution, folds=tuple(f for f in solution.folds if isinstance(f, kind)))


# What is computed


@ALL
@pytest.mark.parametrize("make", [unchanged, turned])
def test_keeping_every_channel_gives_back_the_dense_function(name, make):
    model, catalog = found(name)
    made = operate(model, catalog, make(model, catalog)).model
    onnx.checker.check_model(made.proto(), full_check=True)
    assert max(errors(made, model, name)) <= bound_of(name)


@ALL
def test_every_axis_can_be_turned_alone(name):
    model, catalog = found(name)
    full = turned(model, catalog)
    kinds = {type(fold) for fold in full.folds}
    for kind in kinds if len(kinds) > 1 else ():
        made = operate(model, catalog, only(full, kind)).model
        assert max(errors(made, model, name)) <= bound_of(name)


@ALL
def test_a_narrow_cut_computes_what_zeros_at_full_width_do(name):
    model, catalog = found(name)
    small = half_of(name)
    large = operate(model, catalog, padded(turned(model, catalog), 0.5)).model
    onnx.checker.check_model(small.proto(), full_check=True)
    assert max(errors(small, large, name)) <= bound_of(name)
    assert min(errors(small, model, name)) > VISIBLE


COPIED = (
    "mlp mlp_gemm mlp_gated mlp_vectors mlp_sizes_read mlp_flattened mlp_tied separate "
    "packed_split packed_slice position_major transposed_keys attention_gemm batch_heads "
    "scale_on_both scale_at_run_time operator operator_scale sizes_read mask_added text_encoder"
).split()


@pytest.mark.parametrize("name", COPIED)
def test_removing_exact_copies_is_exact(name):
    dense = with_copies(*found(name))
    catalog = find_blocks(dense)
    small = operate(dense, catalog, without_copies(dense, catalog)).model
    assert max(errors(small, dense, name)) <= BOUND
    for block in find_blocks(small).blocks:
        widths = (block.width,) if isinstance(block, Mlp) else (block.head_width, block.value_width)
        assert widths in {(HIDDEN // 2,), (HEAD // 2, HEAD // 2)}


def halves(width):
    """Kept channels, and for each a removed one that is its copy."""
    order = np.random.default_rng(width).permutation(width)
    return order[: width // 2], order[width // 2 :]


def with_copies(model, catalog):
    """The model with half of all hidden, query, key and value channels copied from the others."""
    changed = model.graph.copy()
    nodes = {node.name: node for node in changed.nodes}
    for block in catalog.blocks:
        if isinstance(block, Mlp):
            kept, removed = halves(block.width)
            for source in block.sources:
                copy_columns(nodes, source.linear, source.channels[kept], source.channels[removed])
            for vector in block.vectors:
                copy_along(nodes[vector.node].inputs[vector.slot], vector.axis, kept, removed)
            continue
        for route in (block.query, block.key, block.value):
            kept, removed = halves(route.channels.shape[1])
            copy_columns(nodes, route.linear, route.channels[:, kept], route.channels[:, removed])
    return model.with_graph(changed)


def copy_columns(nodes, linear, kept, removed):
    node = nodes[linear.node]
    rows_are_outputs = node.op == "Conv" or bool(node.attrs.get("transB"))
    copy_along(node.inputs[1], 0 if rows_are_outputs else -1, kept, removed)
    adders = nodes[linear.bias_node].inputs if linear.bias_node else node.inputs[2:]
    for tensor in adders:
        if hasattr(tensor, "values"):
            copy_along(tensor, -1, kept, removed)


def copy_along(tensor, axis, kept, removed):
    values = np.array(tensor.values)
    columns = np.moveaxis(values, axis, -1)
    columns[..., removed] = columns[..., kept]
    tensor.values = values


def without_copies(model, catalog):
    nodes = {node.name: node for node in model.graph.nodes}
    opset = model.fingerprint.opset
    folds = []
    for block in catalog.blocks:
        last = block.down if isinstance(block, Mlp) else block.output.linear
        weight, bias = weight_of(nodes, last, opset), bias_of(nodes, last, opset)
        if isinstance(block, Mlp):
            kept, removed = halves(block.width)
            folds.append(MlpFold(block.id, kept, weight[kept] + weight[removed], bias, EXACT))
            continue
        kept, removed = halves(block.head_width)
        chosen = np.stack([np.eye(block.head_width)[:, kept]] * block.heads)
        folds.append(QueryKeyFold(block.id, 2 * chosen, chosen, EXACT))
        rows = np.zeros((block.heads, block.value_width, weight.shape[1]))
        rows[tuple(block.output.places.T)] = weight
        rows = rows[:, kept] + rows[:, removed]
        folds.append(ValueOutputFold(block.id, chosen, rows, bias, EXACT))
    return Solution("copies", tuple(folds))


# Wrong twins: each of these must show


def fold_with(kind, **changes):
    def wrong(model, catalog, solution):
        folds = [
            replace(f, **{k: change(f) for k, change in changes.items()})
            if isinstance(f, kind)
            else f
            for f in solution.folds
        ]
        return operate(model, catalog, replace(solution, folds=tuple(folds))).model

    return wrong


def block_with(change):
    def wrong(model, catalog, solution):
        blocks = tuple(change(block) for block in catalog.blocks)
        return operate(model, replace(catalog, blocks=blocks), solution).model

    return wrong


def route_with(role, **changes):
    def change(block):
        route = getattr(block, role)
        return replace(block, **{role: replace(route, **{k: c(route) for k, c in changes.items()})})

    return block_with(change)


def constant_zeroed(ending):
    def wrong(model, catalog, solution):
        made = operate(model, catalog, solution).model
        zeroed = [t for name, t in made.graph.tensors().items() if name.endswith(ending)]
        assert zeroed
        for tensor in zeroed:
            tensor.values = np.zeros_like(tensor.values)
        return made

    return wrong


def places_swapped(block):
    places = block.output.places[::-1]
    return replace(block, output=replace(block.output, places=places))


TWINS = {
    "query map transposed": ("separate", fold_with(QueryKeyFold, query=lambda f: f.query.mT)),
    "key map not inverted": ("separate", fold_with(QueryKeyFold, key=lambda f: f.query)),
    "query and key swapped": (
        "scale_on_key",
        fold_with(QueryKeyFold, query=lambda f: f.key, key=lambda f: f.query.mT),
    ),
    "maps of two heads swapped": (
        "packed_split",
        fold_with(QueryKeyFold, key=lambda f: f.key[::-1]),
    ),
    "value map transposed": ("batch_heads", fold_with(ValueOutputFold, value=lambda f: f.value.mT)),
    "rows of two heads swapped": (
        "position_major",
        fold_with(ValueOutputFold, weight=lambda f: f.weight[::-1]),
    ),
    "output bias dropped": ("separate", fold_with(ValueOutputFold, bias=lambda f: 0 * f.bias)),
    "down bias dropped": ("mlp_gemm", fold_with(MlpFold, bias=lambda f: 0 * f.bias)),
    "hidden order forgotten": ("mlp_gated", fold_with(MlpFold, kept=lambda f: np.sort(f.kept))),
    "query bias dropped": ("attention_gemm", constant_zeroed("query_bias_0")),
    "value bias dropped": ("late_bias", constant_zeroed("value_bias_0")),
    "scale of the query forgotten": (
        "scale_on_query",
        route_with("query", gain=lambda r: np.ones_like(r.gain)),
    ),
    "scale of one channel forgotten": (
        "scale_per_channel",
        route_with("key", gain=lambda r: np.where(np.arange(HEAD) == 1, 1, r.gain)),
    ),
    "late bias forgotten": ("late_bias", route_with("query", offset=lambda r: 0 * r.offset)),
    "two heads of the key swapped": (
        "transposed_keys",
        route_with("key", channels=lambda r: r.channels[::-1]),
    ),
    "places reversed": ("separate", block_with(places_swapped)),
    "vectors forgotten": ("mlp_vectors", block_with(lambda b: replace(b, vectors=()))),
}
"""A tiny model, and a surgery on it that has one thing wrong."""


@pytest.mark.parametrize("twin", TWINS)
def test_a_wrong_twin_shows(twin):
    name, wrong = TWINS[twin]
    model, catalog = found(name)
    made = wrong(model, catalog, turned(model, catalog))
    assert min(errors(made, model, name)) > VISIBLE


def without_scale(model):
    for node in model.graph.nodes:
        node.attrs.pop("scale", None)
    return model


NARROW_TWINS = {
    "scale follows the head width": (
        "scale_at_run_time",
        block_with(lambda block: replace(block, frozen=(), readers=())),
    ),
    "scale follows the head width in half precision": (
        "attention_half",
        block_with(lambda block: replace(block, frozen=(), readers=())),
    ),
    "scale of the operator follows the head width": (
        "operator",
        lambda *given: without_scale(operate(*given).model),
    ),
    "count of elements follows the hidden width": (
        "mlp_sizes_read",
        block_with(lambda block: replace(block, readers=())),
    ),
    "sizes follow the head width": (
        "sizes_read",
        block_with(lambda block: replace(block, readers=block.readers[:1])),
    ),
}
"""What is wrong only when the result is narrower."""


@pytest.mark.parametrize("twin", NARROW_TWINS)
def test_a_wrong_twin_shows_when_narrower(twin):
    name, wrong = NARROW_TWINS[twin]
    model, catalog = found(name)
    full = turned(model, catalog)
    large = operate(model, catalog, padded(full, 0.5)).model
    try:
        small = wrong(model, catalog, narrowed(full, 0.5))
    except SurgeryError:
        assert name == "sizes_read"
        return
    assert min(errors(small, large, name)) > VISIBLE


# What stays


@ALL
def test_the_dense_model_is_not_touched(name):
    model, catalog = found(name)
    before = model.proto().SerializeToString(deterministic=True)
    solution = narrowed(turned(model, catalog), 0.5)
    first = operate(model, catalog, solution).model.proto()
    assert model.proto().SerializeToString(deterministic=True) == before
    assert first == half_of(name).proto()


@ALL
def test_what_surrounds_the_graph_is_kept(name):
    dense, small = found(name)[0].proto(), half_of(name).proto()
    assert {(entry.domain, entry.version) for entry in small.opset_import} == {
        (entry.domain, entry.version) for entry in dense.opset_import
    }
    assert list(small.metadata_props) == list(dense.metadata_props) != []
    assert (small.producer_name, small.producer_version) == ("tiny", "1.0")
    assert small.ir_version == dense.ir_version
    assert list(small.graph.input) == list(dense.graph.input)
    assert list(small.graph.output) == list(dense.graph.output)


@ALL
def test_weights_keep_their_type_and_names_are_unique(name):
    model, made = found(name)[0], half_of(name)
    weight = np.float16 if "half" in name and "heads" not in name else np.float32
    new = {t.name: t for t in made.graph.tensors().values() if hasattr(t, "values")}
    new = {key: t for key, t in new.items() if key not in model.graph.tensors()}
    assert new
    assert {np.dtype(t.dtype) for t in new.values()} <= {np.dtype(weight), np.dtype(np.int64)}
    names = [node.name for node in made.graph.nodes]
    assert len(set(names)) == len(names)


@ALL
def test_the_result_can_be_cut_again(name):
    (_, catalog), small = found(name), half_of(name)
    again = find_blocks(small)
    assert [axes_of(block) for block in again.blocks] == [axes_of(b) for b in catalog.blocks]
    for before, after in zip(catalog.blocks, again.blocks, strict=True):
        for axis in axes_of(before):
            field = {"mlp": "width", "qk": "head_width", "vo": "value_width"}[axis]
            assert getattr(after, field) == round(0.5 * getattr(before, field))
    made = operate(small, again, turned(small, again, seed=1)).model
    assert max(errors(made, small, name)) <= bound_of(name)


@pytest.mark.parametrize("name", ["separate", "operator", "batch_heads", "sizes_read"])
def test_a_head_of_one_channel_is_still_found(name):
    model, catalog = found(name)
    small = operate(model, catalog, narrowed(turned(model, catalog), 0.2)).model
    again = find_blocks(small)
    (block,) = again.blocks
    assert (block.head_width, block.value_width) == (1, 1)
    made = operate(small, again, turned(small, again, seed=1)).model
    assert max(errors(made, small, name)) <= BOUND


def test_outputs_that_no_block_feeds_stay_bit_for_bit():
    for name, output in (("mlp_tied", 1), ("tied_attention", 1), ("query_seen", 1)):
        *_, given = inputs_of(name)
        before, after = (
            list(run(m, given)[0].values())[output] for m in (found(name)[0], half_of(name))
        )
        assert np.array_equal(before, after), name


def test_sizes_that_somebody_reads_stay_dense():
    (made,) = run(half_of("sizes_read"), inputs_of("sizes_read")[1])
    _, *sizes = made.values()
    expected = [[3, 7, HEADS * HEAD], [3, HEADS, 7, HEAD], [3, 7, HEADS * HEAD]]
    assert [size.tolist() for size in sizes] == expected


def test_parts_of_sizes_that_somebody_reads_stay_dense():
    net = Net(0)
    query, key, value = projections(net)
    y = merge_heads(net, mix(net, *(split_heads(net, part) for part in (query, key, value))))
    y = net("Add", "x", y)
    hidden = relu(net, net.linear(y, WIDTH, HIDDEN))
    sizes = [
        net("Shape", query, start=-1),
        net("Shape", key, start=1, end=2),
        net("Shape", hidden, end=-1),
        net("Shape", hidden, start=1),
    ]
    proto = net.build(net.linear(hidden, HIDDEN, WIDTH), *sizes)
    model = from_proto(proto)
    catalog = find_blocks(model)
    assert [axes_of(block) for block in catalog.blocks] == [("qk", "vo"), ("mlp",)]
    small = operate(model, catalog, narrowed(turned(model, catalog), 0.5)).model
    (made,) = run(small, feeds(proto, 3, 7))
    _, *sizes = made.values()
    assert [size.tolist() for size in sizes] == [[HEADS * HEAD], [7], [3, 7], [7, HIDDEN]]


def test_weights_that_are_shared_are_not_overwritten():
    model, made = found("mlp_tied")[0], half_of("mlp_tied")
    tied = next(node for node in model.graph.nodes if node.op == "MatMul").inputs[1].name
    assert len(made.graph.tensors()[tied].outputs) == 1
    assert np.array_equal(made.graph.tensors()[tied].values, model.graph.tensors()[tied].values)


def test_an_empty_solution_changes_nothing():
    model, catalog = found("transformer")
    surgery = operate(model, catalog, Solution("none", ()))
    assert surgery.model.proto() == model.proto()
    assert surgery.dense == surgery.pruned


def test_what_there_is_to_compute_is_counted_before_and_after():
    model, catalog = found("mlp")
    surgery = operate(model, catalog, narrowed(turned(model, catalog), 0.5))
    assert surgery.dense.total == 128 * 2 * WIDTH * HIDDEN
    assert surgery.pruned.total == surgery.dense.total // 2
    assert surgery.dense.params == 2 * WIDTH * HIDDEN + WIDTH + HIDDEN
    assert surgery.pruned.params == WIDTH * HIDDEN + WIDTH + HIDDEN // 2


def test_a_projection_that_something_else_needs_cannot_go():
    net = Net(0)
    query, key, value = projections(net)
    y = merge_heads(net, mix(net, *(split_heads(net, part) for part in (query, key, value))))
    model = from_proto(net.build(y, net("Exp", query)))
    catalog = find_blocks(model)
    (block,) = catalog.blocks
    assert axes_of(block) == ("vo",)
    forced = replace(catalog, blocks=(replace(block, refused={}, fragments=()),))
    with pytest.raises(SurgeryError, match="something outside their attention block still reads"):
        operate(model, forced, turned(model, forced))


@pytest.mark.parametrize("where", ["up", "down", "query"])
def test_a_bias_that_adds_an_axis_still_does(where):
    """Vectors ``[b, d]`` and a bias ``[1, 1, d]`` make ``[1, b, d]``."""
    net = Net(0)
    x = net.x("batch", WIDTH)

    def layer(name, x, rows, columns):
        shape = (1, 1, columns) if name == where else (columns,)
        return net("Add", net("MatMul", x, net.weight(rows, columns)), net.random(*shape))

    if where == "query":
        rows = [layer(role, x, WIDTH, HEADS * HEAD) for role in ("query", "key", "value")]
        heads = [net("Reshape", y, [1, -1, HEADS, HEAD]) for y in rows]
        query, key, value = (net("Transpose", y, perm=[0, 2, 1, 3]) for y in heads)
        y = merge_heads(net, mix(net, query, key, value))
    else:
        y = layer("down", relu(net, layer("up", x, WIDTH, HIDDEN)), HIDDEN, WIDTH)
    model = from_proto(net.build(y))
    catalog = find_blocks(model)
    assert catalog.blocks
    given = {"x": np.random.default_rng(0).standard_normal((4, WIDTH)).astype(np.float32)}
    (dense,) = run(model, given)
    (made,) = run(operate(model, catalog, turned(model, catalog)).model, given)
    assert {name: value.shape for name, value in made.items()} == {
        name: value.shape for name, value in dense.items()
    }
    assert squared_error(made, dense) <= BOUND
