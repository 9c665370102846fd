"""The Attention operator of opset 23 and 24, in every form of its operands and masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from corp_onnx.blocks import Mlp, axes_of, find_blocks
from corp_onnx.blocks.records import Mask
from corp_onnx.calibration.calibrate import gather
from corp_onnx.calibration.masks import visible
from corp_onnx.graph.model import from_proto
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from tests.builders import WIDTH, Net, feeds, mlp, relu
from tests.full_width import narrowed, padded, run, squared_error, unchanged

HEADS, HEAD, VALUE = 4, 6, 4
SIZES = ((1, 5), (3, 7))
BOUND, VISIBLE = 1e-10, 1e-6
"""As in ``test_surgery``."""


def attention(*, rank=4, kv_heads=2, value=VALUE, mask=None, opset=23, wrong=False, **attrs):
    """One attention, with heads on an axis of their own or inside the last one."""
    net = Net(0, opset=opset)
    net.x()
    sizes = [(HEADS, HEAD), (kv_heads, HEAD), (kv_heads, value)]
    operands = [net.linear("x", WIDTH, heads * size) for heads, size in sizes]
    if rank == 4:
        operands = [
            net("Transpose", net("Reshape", y, [0, 0, heads, size]), perm=[0, 2, 1, 3])
            for y, (heads, size) in zip(operands, sizes, strict=True)
        ]
    else:
        attrs |= {"q_num_heads": HEADS, "kv_num_heads": kv_heads}
    given = masks(net, mask)
    if wrong:
        attrs["scale"] = 0.9 * attrs.get("scale", 1 / np.sqrt(HEAD))
    y = net("Attention", *operands, *given, **attrs)
    if rank == 4:
        y = net("Reshape", net("Transpose", y, perm=[0, 2, 1, 3]), [0, 0, HEADS * value])
    return net.build(net.linear(y, HEADS * value, WIDTH))


def masks(net, kind):
    """The mask of an attention, and what may come behind it."""
    if kind is None:
        return []
    if kind == "counts":
        seen = net.input("seen", "batch", "tokens", dtype=np.int64)
        return ["", "", "", net("ReduceSum", seen, [1], keepdims=0)]
    axes, dtype = kind
    if dtype is bool:
        seen = net.input("keeps", "batch", "tokens", dtype=bool)
    else:
        seen = net.input("added", "batch", "tokens")
    tokens = net("Shape", "x", start=1, end=2)
    if axes == 4:
        rows = net("Unsqueeze", seen, [1, 2])
        return [net("Expand", rows, net("Concat", [1, 1], tokens, [1], axis=0))]
    lead = [HEADS] if axes == 3 else []
    first = net("Gather", seen, np.int64(0))
    return [net("Expand", first, net("Concat", *([lead] if lead else []), tokens, tokens, axis=0))]


FORMS = [
    *({"rank": rank, "kv_heads": heads} for rank in (3, 4) for heads in (1, 2, HEADS)),
    {"rank": 3, "is_causal": 1, "opset": 24},
    {"rank": 4, "is_causal": 1, "scale": 0.3},
    {"value": HEAD, "opset": 24},
    *({"rank": rank, "mask": (axes, kind)} for rank in (3, 4) for axes in (2, 3, 4)
      for kind in (bool, float)),
    {"rank": 3, "mask": "counts", "opset": 24},
    {"rank": 4, "mask": "counts", "opset": 24},
]  # fmt: skip
ALL = pytest.mark.parametrize("form", FORMS, ids=str)


@ALL
def test_both_axes_are_found_and_cut(form):
    proto = attention(**form)
    model = from_proto(proto)
    catalog = find_blocks(model)
    (block,) = catalog.blocks
    assert axes_of(block) == ("qk", "vo")
    assert (block.heads, block.kv_heads) == (HEADS, form.get("kv_heads", 2))
    assert (block.head_width, block.value_width) == (HEAD, form.get("value", VALUE))
    given = [feeds(proto, *size) for size in SIZES]
    before, full = run(proto, *given), turned(model, catalog)
    for solution in (unchanged(model, catalog), full):
        made = operate(model, catalog, solution).model
        for pair in zip(run(made, *given), before, strict=True):
            assert squared_error(*pair) < BOUND
    for fold in full.folds:
        made = operate(model, catalog, replace(full, folds=(fold,))).model
        assert squared_error(run(made, given[1])[0], before[1]) < BOUND
    small = operate(model, catalog, narrowed(full, 0.5)).model
    large = operate(model, catalog, padded(full, 0.5)).model
    results = run(small, *given)
    for pair in zip(results, run(large, *given), strict=True):
        assert squared_error(*pair) < BOUND
    for other in (before, run(attention(**form, wrong=True), *given)):
        for pair in zip(results, other, strict=True):
            assert squared_error(*pair) > VISIBLE


def padding_of(**form):
    (block,) = find_blocks(from_proto(attention(**form))).blocks
    return block.padding


def test_a_mask_of_every_sample_says_what_is_padding():
    assert padding_of(mask=(4, bool)).kind == "keeps"
    assert padding_of(mask=(4, float)).kind == "added"
    assert padding_of(mask="counts", opset=24).kind == "counts"


@pytest.mark.parametrize("axes", [2, 3])
def test_a_mask_that_all_samples_share_says_nothing_of_padding(axes):
    """Its first axis counts queries, or heads."""
    assert padding_of(mask=(axes, bool)) is None


def test_counts_are_of_the_first_tokens():
    seen = visible(Mask("mask", "counts"), np.array([3, 1]), rows=8)
    assert seen.tolist() == [[True, True, True, False], [True, False, False, False]]


def test_padding_that_is_counted_enters_no_statistic():
    proto = attention(mask="counts", opset=24)
    model = from_proto(proto)
    catalog = find_blocks(model)
    batch = feeds(proto, 3, 7)
    changed = {**batch, "x": batch["x"].copy()}
    changed["x"][0, -2:] = 100
    kept = {**changed, "seen": np.ones_like(batch["seen"])}
    one, same, other = (total(gather(model, catalog, [given])) for given in (batch, changed, kept))
    assert one == pytest.approx(same)
    assert other > 10 * one


def total(statistics):
    """The sum of all second moments of an attention's queries."""
    return float(np.abs(statistics.sites["attention.0.query"].scatter).sum())


# Refusals


def refused(*inputs, outputs=1, shown=(), **attrs):
    """Axes of the only attention and reasons against the others, beside an MLP."""
    net = Net(0, opset=24)
    net.x()
    operands = [net.linear("x", WIDTH, HEADS * HEAD) for _ in range(3)]
    given = [value(net) if callable(value) else value for value in inputs]
    made = net("Attention", *operands, *given, outputs=outputs, q_num_heads=HEADS,
               kv_num_heads=HEADS, **attrs)  # fmt: skip
    tensors = [made] if outputs == 1 else made
    y = net("Add", net.linear(tensors[0], HEADS * HEAD, WIDTH), mlp(net, "x", relu))
    catalog = find_blocks(from_proto(net.build(y, *(tensors[place] for place in shown))))
    found = [block for block in catalog.blocks if not isinstance(block, Mlp)]
    assert len(catalog.blocks) - len(found) == 1
    reasons = [item.reason for item in catalog.refusals]
    for block in found:
        return axes_of(block), block.refused
    return (), reasons


def past(name):
    return lambda net: net.input(name, "batch", HEADS, "others", HEAD)


def test_a_cache_is_refused():
    axes, reasons = refused("", past("past_key"), past("past_value"))
    assert axes == ()
    assert reasons[0].startswith("keys or values are kept in a cache")
    axes, reasons = refused(outputs=3, shown=(1, 2))
    assert axes == ()
    assert reasons[0].startswith("keys or values are kept in a cache")


def test_a_soft_cap_refuses_query_and_key_only():
    axes, reasons = refused(softcap=3.0)
    assert axes == ("vo",)
    assert reasons["qk"] == "its logits are capped (softcap)"


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_logits_that_are_shown_refuse_query_and_key_only(mode):
    axes, reasons = refused(outputs=4, shown=(3,), qk_matmul_output_mode=mode)
    assert axes == ("vo",)
    assert reasons["qk"] == "its logits are an output, read by somebody else"
