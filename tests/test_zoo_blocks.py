"""On every model of the zoo: blocks are the truth, ratio 0 is exact, half a model is whole."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cache

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from corp_onnx import graph, surgery
from corp_onnx.blocks import Mlp, axes_of, find_blocks
from corp_onnx.blocks.catalog import named_as
from corp_onnx.blocks.records import linears_of
from corp_onnx.calibrate import gather
from corp_onnx.macs import count
from corp_onnx.plan import Cut, Plan, uniform
from corp_onnx.promise import measured_errors
from corp_onnx.shapes import evaluate
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import MlpFold, QueryKeyFold, Solution, ValueOutputFold
from corp_onnx.surgery import operate
from corp_onnx.verify import check_promises, check_structure
from tests.full_width import narrowed, run, squared_error, turned
from tests.zoo_models import NAMES, TOKENS, TRUTH, feeds, load, module_of

pytestmark = pytest.mark.slow

BOUND, HALF_BOUND = 1e-9, 1e-5
"""Of ``‖ŷ - y‖² / ‖y‖²`` at ratio 0, where nothing but rounding is lost; the latter in float16."""

VISIBLE = 1e-3
"""Of the same measure at half the width: what was cut did something."""

LARGE_SHARE = 0.01
"""Linear layers above this share of all MACs must be in a block or in a refusal."""

SHARES = {"mlp": 0.5, "qk": 0.5}
"""What is solved for. Values have no solver yet; where they can be cut, the first half stays."""


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    """A model of the zoo: all tests of one model run together, and share what they found."""
    yield request.param
    for shared in (found, statistics_of, varied):
        shared.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def rarely_collected():
    """Graphs are many small objects: looking for garbage among them takes a sixth of the time."""
    usual = gc.get_threshold()
    gc.set_threshold(50_000, 20, 50)
    yield
    gc.set_threshold(*usual)


@pytest.fixture(autouse=True)
def uncounted(monkeypatch):
    """Counting MACs takes longer than cutting; it is tested elsewhere."""
    monkeypatch.setattr(surgery, "evaluate", lambda *_: None)
    monkeypatch.setattr(surgery, "count", lambda *_: None)


@cache
def found(name):
    model = graph.from_proto(load(name))
    return model, find_blocks(model)


@cache
def statistics_of(name):
    """Moments over some thirty samples, of two lengths where it may vary; and the samples."""
    model, catalog = found(name)
    batches = [feeds(name, 16, tokens, seed=tokens) for tokens in (TOKENS, TOKENS - 3)]
    return gather(model, catalog, batches), batches


@cache
def varied(name):
    """Inputs of batches, and lengths, that were not traced; and what the file makes of them."""
    inputs = (feeds(name, 1, TOKENS + 4), feeds(name, 3, TOKENS - 3))
    return inputs, run(load(name), *inputs)


def offered(name):
    """The axes that a model offers to be solved for."""
    _, catalog = found(name)
    axes = {axis for block in catalog.blocks for axis in axes_of(block)}
    return [axis for axis in SHARES if axis in axes]


def fits(block, entry):
    """Whether a block is the one of an entry of the truth, with exactly the axes that it says."""
    axes = {*axes_of(block)}
    if isinstance(block, Mlp) != ("mlp" in entry) or axes != {*entry["cut"]}:
        return False
    if isinstance(block, Mlp):
        return block.width == entry["mlp"]
    return not axes or (
        (block.heads, block.kv_heads) == (entry["attention"], entry["kv_heads"])
        and ("qk" not in axes or block.head_width == entry["head_width"])
        and ("vo" not in axes or block.value_width == entry["value_width"])
    )


def shown(block):
    """A block in the words of the truth."""
    if isinstance(block, Mlp):
        sizes = {"mlp": block.width}
    else:
        sizes = {"attention": block.heads, "kv_heads": block.kv_heads}
        sizes |= {"head_width": block.head_width, "value_width": block.value_width}
    return sizes | {"cut": list(axes_of(block)), "refused": dict(block.refused)}


def test_the_catalog_is_the_truth(name):
    """A block of which nothing can be cut may be a refusal instead."""
    _, catalog = found(name)
    missing, unknown = list(TRUTH[module_of(name)]), []
    for block in catalog.blocks:
        entry = next((entry for entry in missing if fits(block, entry)), None)
        if entry is None:
            unknown.append(block)
        else:
            missing.remove(entry)
    lost = [entry for entry in missing if entry["cut"]]
    said = "\n".join(f"refused {item.op} {item.node}: {item.reason}" for item in catalog.refusals)
    assert [*map(shown, unknown)] == [], f"which the truth does not have; it lacks {lost}"
    assert lost == [], said
    assert len(missing) <= len(catalog.refusals), f"silent about {missing}"


def test_every_refusal_gives_a_reason_and_is_about_no_block(name):
    _, catalog = found(name)
    reasons = [item.reason for item in catalog.refusals]
    reasons += [reason for block in catalog.blocks for reason in block.refused.values()]
    assert all(len(reason.split()) > 3 for reason in reasons)
    assert nodes_of(catalog).isdisjoint(item.node for item in catalog.refusals)


def test_every_softmax_and_every_large_linear_layer_is_mentioned(name):
    model, catalog = found(name)
    known = nodes_of(catalog) | {item.node for item in catalog.refusals}
    counts = count(model.graph, evaluate(model.graph, catalog.sizes))
    attentions = [n for n in model.graph.nodes if n.op == "Softmax" or "Attention" in n.op]
    large = [
        node
        for node in model.graph.nodes
        if counts.by_node.get(node.name, 0) > LARGE_SHARE * counts.total and is_linear(node)
    ]
    assert attentions or large
    assert [f"{n.op} {n.name}" for n in (*attentions, *large) if n.name not in known] == []


def nodes_of(catalog):
    """The anchors and the linear layers of all blocks."""
    anchors = {block.anchor for block in catalog.blocks if not isinstance(block, Mlp)}
    return anchors | {linear.node for block in catalog.blocks for linear in linears_of(block)}


def is_linear(node):
    """Whether a product has an operand that no input of the model reaches."""
    if node.op == "Conv":
        return node.attrs.get("group", 1) == 1 and tuple(node.inputs[1].shape[2:]) == (1, 1)
    return node.op in {"MatMul", "Gemm"} and any(map(is_constant, node.inputs[:2]))


def is_constant(tensor):
    if isinstance(tensor, gs.Constant):
        return True
    return bool(tensor.inputs) and all(map(is_constant, tensor.inputs[0].inputs))


def test_ratio_0_gives_back_the_dense_function(name):
    model, catalog = found(name)
    axes = offered(name)
    if not axes:
        pytest.skip("no axis that is solved for")
    plan = uniform(catalog, dict.fromkeys(axes, 0.0), align=1)
    solution = solve(model, catalog, plan, statistics_of(name)[0], Recipe())
    inputs, expected = varied(name)
    check(run(operate(model, catalog, solution).model, *inputs), expected, bound(name))


def test_another_basis_gives_back_the_dense_function(name):
    model, catalog = found(name)
    if not any(map(axes_of, catalog.blocks)):
        pytest.skip("no axis that can be cut")
    inputs, expected = varied(name)
    made = run(operate(model, catalog, turned(model, catalog)).model, *inputs)
    check(made, expected, bound(name))


def test_half_a_model_is_whole_and_keeps_its_promises(name):
    """What is left computes what zeros at full width do, and every block errs as was predicted."""
    model, catalog = found(name)
    if not any(map(axes_of, catalog.blocks)):
        pytest.skip("no axis that can be cut")
    plan, solved, values = halved(name)
    solution = Solution("halved", (*solved.folds, *values.folds))
    small = operate(model, catalog, solution).model
    found_again = named_as(find_blocks(small), catalog)
    structure = check_structure(plan, small, model, found_again)
    assert structure.passed, structure.found
    assert [axes_of(b) for b in found_again.blocks] == [axes_of(b) for b in catalog.blocks]
    keeps_its_interface(small.proto(), load(name))
    inputs, expected = varied(name)
    results = run(small, *inputs)
    wide = run(operate(model, catalog, widened(solution, catalog)).model, *inputs)
    check(results, wide, bound(name))
    assert min(squared_error(*pair) for pair in zip(results, expected, strict=True)) > VISIBLE
    if offered(name):
        measured = measured_errors(model, catalog, small, found_again, statistics_of(name)[1])
        promises = check_promises(solved, measured)
        assert promises.passed, promises.found


def halved(name):
    """Half of every axis that can be cut: of values the first half, in another basis."""
    model, catalog = found(name)
    axes = offered(name)
    plan, solved = Plan(()), Solution("nothing", ())
    if axes:
        plan = uniform(catalog, {axis: SHARES[axis] for axis in axes}, align=1)
        solved = solve(model, catalog, plan, statistics_of(name)[0], Recipe())
    folds = [f for f in turned(model, catalog).folds if isinstance(f, ValueOutputFold)]
    values = narrowed(Solution("first half", tuple(folds)), 0.5)
    cuts = [
        Cut(whole.block, "vo", whole.value.shape[2], half.value.shape[2])
        for whole, half in zip(folds, values.folds, strict=True)
    ]
    return Plan((*plan.cuts, *cuts)), solved, values


def widened(solution, catalog):
    """The same function at full width: zeros for what was cut."""
    blocks = {block.id: block for block in catalog.blocks}
    return Solution("widened", tuple(_widened(fold, blocks[fold.block]) for fold in solution.folds))


def _widened(fold, block):
    if isinstance(fold, MlpFold):
        kept = np.concatenate([fold.kept, np.setdiff1d(np.arange(block.width), fold.kept)])
        return replace(fold, kept=kept, weight=_with_zeros(fold.weight, 0, block.width))
    if isinstance(fold, QueryKeyFold):
        query, key = (_with_zeros(part, 2, block.head_width) for part in (fold.query, fold.key))
        return replace(fold, query=query, key=key)
    value = _with_zeros(fold.value, 2, block.value_width)
    return replace(fold, value=value, weight=_with_zeros(fold.weight, 1, block.value_width))


def _with_zeros(values, axis, size):
    """``values`` with zeros behind them along an axis, up to a size."""
    missing = [(0, 0)] * values.ndim
    missing[axis] = (0, size - values.shape[axis])
    return np.pad(values, missing)


def bound(name):
    return HALF_BOUND if name.endswith("fp16") else BOUND


def check(results, expected, at_most):
    for pair in zip(results, expected, strict=True):
        assert squared_error(*pair) <= at_most


def keeps_its_interface(small, whole):
    """Names, types and dynamic axes of inputs and outputs; opset, producer and metadata."""
    for made, given in zip(values_of(small), values_of(whole), strict=True):
        assert made.SerializeToString() == given.SerializeToString()
    opsets, before = (
        {entry.domain: entry.version for entry in model.opset_import} for model in (small, whole)
    )
    assert opsets[""] == before[""]
    assert opsets.items() <= before.items()
    assert small.metadata_props == whole.metadata_props
    assert (small.producer_name, small.ir_version) == (whole.producer_name, whole.ir_version)


def values_of(model):
    return (*model.graph.input, *model.graph.output)


def test_the_truth_offers_every_axis_in_most_models():
    for axis in ("mlp", "qk", "vo"):
        offering = [name for name in NAMES if any(axis in b["cut"] for b in TRUTH[module_of(name)])]
        assert len(offering) > len(NAMES) / 2
