"""What must hold of every model, whoever wrote it; the zoo and random networks are held to it."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from corp_onnx.blocks import Mlp, axes_of, find_blocks
from corp_onnx.blocks.catalog import named_as
from corp_onnx.blocks.records import linears_of
from corp_onnx.graph.macs import count
from corp_onnx.graph.shapes import evaluate
from corp_onnx.plan import Cut, Plan, uniform
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import MlpFold, QueryKeyFold, Solution, ValueOutputFold
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from corp_onnx.verify.checks import check_promises, check_structure
from corp_onnx.verify.promise import measured_errors
from tests.full_width import narrowed, run, squared_error

BOUND, HALF_BOUND = 1e-9, 1e-5
"""Of ``‖ŷ - y‖² / ‖y‖²`` at ratio 0, where nothing but rounding is lost; the latter in float16."""

LARGE_SHARE = 0.01
"""Linear layers above this share of all MACs must be in a block or in a refusal."""

SHARES = {"mlp": 0.5, "qk": 0.5}
"""What is solved for. Values have no solver yet; where they can be cut, the first half stays."""


def offered(catalog):
    """The axes that a model offers to be solved for."""
    axes = {axis for block in catalog.blocks for axis in axes_of(block)}
    return [axis for axis in SHARES if axis in axes]


def unchanged_by_ratio_0(model, catalog, statistics):
    """The model after all of surgery with nothing removed."""
    plan = uniform(catalog, dict.fromkeys(offered(catalog), 0.0), align=1)
    return operate(model, catalog, solve(model, catalog, plan, statistics, Recipe("corp"))).model


# The catalog


def is_the_truth(catalog, truth):
    """Whether the catalog holds the blocks of the truth, each with its axes, and no other.

    A block of which nothing can be cut may be a refusal instead. Where the truth has a word of the
    reason for which an axis is refused, it must be in what is said.
    """
    missing, unknown, wrong = list(truth), [], []
    for block in catalog.blocks:
        fitting = [entry for entry in missing if fits(block, entry)]
        if not fitting:
            unknown.append(block)
            continue
        # Two blocks of which nothing can be cut are told apart by their reasons.
        entry = min(fitting, key=lambda entry: len(unsaid(block, entry)))
        missing.remove(entry)
        wrong += unsaid(block, entry)
    lost = [entry for entry in missing if entry["cut"]]
    said = "\n".join(f"refused {item.op} {item.node}: {item.reason}" for item in catalog.refusals)
    more = [*map(shown, unknown)]
    assert more == [], f"{more}, which the truth does not have; it lacks {lost}\n{said}"
    assert lost == [], said
    assert len(missing) <= len(catalog.refusals), f"silent about {missing}"
    assert wrong == [], wrong
    words = [word for entry in missing for word in entry.get("because", {}).values()]
    assert [word for word in words if not re.search(word, said)] == [], said


def unsaid(block, entry):
    """What a block says of its axes instead of the reasons that the truth knows."""
    return [
        f"{block.id} {axis}: {block.refused[axis]!r}, not {word!r}"
        for axis, word in entry.get("because", {}).items()
        if not re.search(word, block.refused[axis])
    ]


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


def mentions_everything(model, catalog):
    """Every Softmax and every large linear layer is in a block or in a refusal."""
    known = nodes_of(catalog) | {item.node for item in catalog.refusals}
    counts = count(model.graph, evaluate(model.graph, catalog.sizes))
    attentions = [n for n in model.graph.nodes if n.op == "Softmax" or "Attention" in n.op]
    large = [
        node
        for node in model.graph.nodes
        if counts.by_node.get(node.name, 0) > LARGE_SHARE * counts.total and is_linear(node)
    ]
    assert attentions or large
    silent = [f"{n.op} {n.name}" for n in (*attentions, *large) if n.name not in known]
    assert silent == [], f"silent about {silent}"


def nodes_of(catalog):
    """The anchors and the linear layers of all blocks."""
    anchors = {block.anchor for block in catalog.blocks if not isinstance(block, Mlp)}
    return anchors | {linear.node for block in catalog.blocks for linear in linears_of(block)}


def is_linear(node):
    """Whether a product has an operand that no input of the model reaches."""
    if node.op == "Conv":
        points = node.attrs.get("kernel_shape") or node.inputs[1].shape[2:]
        return node.attrs.get("group", 1) == 1 and set(points) == {1}
    return node.op in {"MatMul", "Gemm"} and any(map(is_constant, node.inputs[:2]))


def is_constant(tensor):
    if isinstance(tensor, gs.Constant):
        return True
    return bool(tensor.inputs) and all(map(is_constant, tensor.inputs[0].inputs))


# Half a model


def keeps_its_promises(model, catalog, given, samples, inputs, *, bound=BOUND):
    """Half a model computes what zeros at full width do, and every block errs as was predicted.

    Args:
        model: The whole.
        catalog: Its blocks.
        given: The model as protobuf, as it was before loading.
        samples: Statistics, and the batches that they are of.
        inputs: What to run both on.
        bound: As for `check`.

    Returns:
        What the half gives for these inputs.
    """
    statistics, batches = samples
    plan, solved, values = halved(model, catalog, statistics)
    solution = Solution("halved", (*solved.folds, *values.folds))
    small = operate(model, catalog, solution).model
    found_again = named_as(find_blocks(small), catalog)
    structure = check_structure(plan, small, model, found_again)
    assert structure.passed, structure.found
    assert [axes_of(b) for b in found_again.blocks] == [axes_of(b) for b in catalog.blocks]
    proto = small.proto()
    onnx.checker.check_model(proto, full_check=True)
    keeps_its_interface(proto, given)
    results = run(small, *inputs)
    wide = run(operate(model, catalog, widened(solution, catalog)).model, *inputs)
    check(results, wide, bound)
    if offered(catalog):
        promises = check_promises(
            solved, measured_errors(model, catalog, small, found_again, batches)
        )
        assert promises.passed, promises.found
    return results


def check(results, expected, bound=BOUND):
    """Whether two runs of several inputs agree but for rounding."""
    for pair in zip(results, expected, strict=True):
        assert squared_error(*pair) <= bound


def halved(model, catalog, statistics):
    """Half of every axis that can be cut: of values the first half, in another basis."""
    axes = offered(catalog)
    plan, solved = Plan(()), Solution("nothing", ())
    if axes:
        plan = uniform(catalog, {axis: SHARES[axis] for axis in axes}, align=1)
        solved = solve(model, catalog, plan, statistics, Recipe("corp"))
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
