"""Shares become widths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corp_onnx.blocks import Catalog, Linear, Mlp, find_blocks
from corp_onnx.errors import NothingPrunable, PlanError
from corp_onnx.graph.model import from_proto
from corp_onnx.plan import DEFAULT_ALIGN, DEFAULT_SHARES, LEAST, Cut, uniform, warn_of_uncut
from tests.builders import HEAD, HIDDEN, WIDTH, Net, merge_heads, mix, separate


def catalog_of(*widths):
    """MLPs of these widths and nothing else."""
    blocks = tuple(
        Mlp(f"mlp.{index}", (), "", (), (), Linear("down", None, "", "", width, 1), width)
        for index, width in enumerate(widths)
    )
    return Catalog(blocks, (), {}, 0, 0, {})


def width(dense, share, align):
    (cut,) = uniform(catalog_of(dense), {"mlp": share}, align=align).cuts
    return cut.to


@pytest.mark.parametrize(
    ("dense", "share", "align", "expected"),
    [
        (3072, 0.5, 8, 1536),
        (384, 0.5, 8, 192),
        (100, 0.5, 8, 48),  # 50 lies nearer to 48 than to 56
        (100, 0.55, 8, 48),
        (100, 0.3, 8, 72),
        (64, 0.5, 1, 32),
        (14, 0.5, 1, 7),
        (14, 0.33, 1, 9),
        (64, 0.99, 8, 8),  # one multiple stays
        (64, 0.999, 1, 2),
        (6, 0.5, 8, 6),  # no multiple fits: nothing goes
        (100, 0.02, 8, 96),
        (100, 0.01, 8, 96),
        (3072, 0.0, 8, 3072),
        (100, 0.0, 8, 100),  # a share of 0 keeps what is no multiple
    ],
)
def test_the_width_is_the_nearest_multiple(dense, share, align, expected):
    assert width(dense, share, align) == expected


@given(
    dense=st.integers(1, 5000),
    share=st.floats(0, 1, exclude_max=True),
    align=st.sampled_from([1, 2, 8, 16, 32]),
)
def test_every_width_is_possible_and_as_asked(dense, share, align):
    to = width(dense, share, align)
    assert 1 <= to <= dense
    assert to % align == 0 or to == dense
    wanted = (1 - share) * dense
    assert abs(to - wanted) <= max(align / 2, max(align, LEAST) - wanted, dense % align) + 1e-9


@given(
    dense=st.integers(1, 500),
    shares=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted),
    align=st.sampled_from([1, 8]),
)
def test_a_larger_share_never_leaves_more(dense, shares, align):
    less, more = shares
    assert width(dense, more, align) <= width(dense, less, align)


def test_every_block_that_offers_the_axis_is_cut_in_the_order_of_the_graph(tiny):
    catalog = find_blocks(tiny("transformer"))
    plan = uniform(catalog, {"mlp": 0.5, "qk": 0.5, "vo": 0.5}, align=1)
    assert plan.cuts == (
        Cut("attention.0", "qk", HEAD, 3),
        Cut("attention.0", "vo", HEAD, 3),
        Cut("mlp.0", "mlp", HIDDEN, 7),
        Cut("attention.1", "qk", HEAD, 3),
        Cut("attention.1", "vo", HEAD, 3),
        Cut("mlp.1", "mlp", HIDDEN, 7),
    )


def test_an_axis_that_is_not_named_is_not_cut(tiny):
    plan = uniform(find_blocks(tiny("transformer")), {"qk": 0.5}, align=1)
    assert {cut.axis for cut in plan.cuts} == {"qk"}


def test_a_share_of_zero_is_a_cut_all_the_same(tiny):
    plan = uniform(find_blocks(tiny("transformer")), {"mlp": 0.0, "qk": 0.0})
    assert [(cut.width, cut.to) for cut in plan.cuts] == 2 * [(HEAD, HEAD), (HIDDEN, HIDDEN)]


def test_by_default_half_of_mlp_and_query_key_goes_in_multiples_of_eight():
    assert DEFAULT_SHARES == {"mlp": 0.5, "qk": 0.5}
    assert DEFAULT_ALIGN == 8


def test_an_axis_that_no_block_offers_is_warned_of(tiny, caplog):
    plan = uniform(find_blocks(tiny("mlp")), DEFAULT_SHARES, align=1)
    assert plan.cuts == (Cut("mlp.0", "mlp", HIDDEN, 7),)
    warn_of_uncut(plan, DEFAULT_SHARES, align=1)
    assert "no block offers the axis 'qk'" in caplog.text


# Requests that cannot be met


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, np.nan, np.inf])
@pytest.mark.parametrize("axis", ["mlp", "qk", "vo"])
def test_a_share_that_is_none_is_refused(tiny, axis, share):
    message = rf"--{axis} \S+ is not a share to remove: it must be at least 0 and below 1"
    with pytest.raises(PlanError, match=message):
        uniform(find_blocks(tiny("transformer")), {axis: share})


@pytest.mark.parametrize("align", [0, -8])
def test_an_alignment_that_is_none_is_refused(tiny, align):
    with pytest.raises(PlanError, match=f"--align {align} is not a multiple to round to"):
        uniform(find_blocks(tiny("mlp")), {"mlp": 0.5}, align=align)


def refused(model, shares):
    with pytest.raises(NothingPrunable) as caught:
        uniform(find_blocks(model), shares)
    return str(caught.value)


def test_a_model_without_anything_says_what_was_looked_for():
    net = Net(0)
    model = from_proto(net.build(net("Conv", net.x("batch", 3, 8, 8), net.random(4, 3, 3, 3))))
    assert refused(model, DEFAULT_SHARES) == (
        "nothing prunable was found for mlp or qk: no two linear layers with a function between "
        "them and no attention"
    )
    assert refused(model, {"qk": 0.5}) == "nothing prunable was found for qk: no attention"


def test_a_block_that_refuses_says_why():
    net = Net(0)
    mixed = mix(net, *separate(net), lambda net, y: net("Tanh", y))
    model = from_proto(net.build(merge_heads(net, mixed)))
    message = refused(model, {"qk": 0.5})
    assert message.startswith("nothing prunable was found for qk: attention.0 qk: ")
    assert "Tanh" in message


def test_refusals_are_named_with_operator_and_node():
    net = Net(0)
    model = from_proto(net.build(net("Softmax", net.linear(net.x(), WIDTH, 3), axis=-1)))
    message = refused(model, {"mlp": 0.5})
    assert "Softmax 'Softmax_2': no product of its probabilities with values" in message


def test_many_reasons_are_cut_short_and_counted():
    net = Net(0)
    y = net.x()
    outputs = [net("Softmax", net("Mul", y, float(index)), axis=-1) for index in range(8)]
    message = refused(from_proto(net.build(*outputs)), {"mlp": 0.5})
    assert message.count("Softmax 'Softmax_") == 5
    assert message.endswith("(and 3 more; see `corp-onnx inspect`)")
