"""What is said of shapes and products of fused operators is what is seen when they run."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper

from corp_onnx.blocks import find_blocks
from corp_onnx.graph.fused import BLOCKED_LAYOUT
from corp_onnx.graph.macs import count
from corp_onnx.graph.model import from_proto
from corp_onnx.graph.operators import MICROSOFT
from corp_onnx.graph.shapes import declared_only, evaluate
from corp_onnx.surgery.operate import operate
from tests.builders import HEAD, HEADS, HIDDEN, WIDTH, Net, feeds, relu
from tests.full_width import narrowed, run, unchanged

INNER = HEADS * HEAD
BATCH, TOKENS = 3, 5

PLAIN = {
    "BiasGelu": [(WIDTH,)],
    "FastGelu": [(WIDTH,)],
    "QuickGelu": [],
    "Gelu": [],
    "SkipLayerNormalization": [(BATCH, TOKENS, WIDTH), (WIDTH,), (WIDTH,), (WIDTH,)],
    "SkipSimplifiedLayerNormalization": [(BATCH, TOKENS, WIDTH), (WIDTH,), (WIDTH,)],
    "FusedMatMul": [(WIDTH, HIDDEN)],
}
"""Operators on ``[batch, tokens, width]``, and the shapes of their other operands."""


def compared(net, *outputs):
    """Facts about every tensor of a graph as it is in the file, held against a run."""
    proto = net.build(*outputs)
    given = feeds(proto, BATCH, TOKENS)
    made = gs.import_onnx(proto)
    facts = evaluate(made, {name: value.shape for name, value in given.items()})
    (seen,) = run(proto, given)
    for name, value in seen.items():
        assert facts.shapes[name] == value.shape, name
        kind = facts.types[name].tensor_type.elem_type
        assert helper.tensor_dtype_to_np_dtype(kind) == value.dtype, name
    return made, facts


@pytest.mark.parametrize("op", PLAIN)
def test_operators_on_every_token(op):
    net = Net(0)
    y = net(op, net.x(), *(net.random(*shape) for shape in PLAIN[op]), domain=MICROSOFT)
    compared(net, y, net("Relu", y))


@pytest.mark.parametrize(
    ("op", "opset", "shapes", "attrs"),
    [
        ("GroupNormalization", 21, [(TOKENS,), (TOKENS,)], {"num_groups": 1}),
        ("MeanVarianceNormalization", 18, [], {"axes": [1]}),
        ("GreaterOrEqual", 12, [(1, 1, WIDTH)], {}),
        ("LessOrEqual", 12, [(WIDTH,)], {}),
    ],
)
def test_standard_operators_for_which_onnx_has_no_shape_inference(op, opset, shapes, attrs):
    net = Net(0, opset=opset)
    y = net(op, net.x(), *(net.random(*shape) for shape in shapes), **attrs)
    z = net("Cast", y, to=onnx.TensorProto.FLOAT)
    compared(net, y, net("Relu", z))


def test_the_sum_beside_a_norm():
    net = Net(0)
    y = relu(net, net.x())
    vectors = [net.random(WIDTH) for _ in range(2)]
    made = net("SkipLayerNormalization", "x", y, *vectors, outputs=4, domain=MICROSOFT)
    for node in net.nodes:
        node.output[:] = ["" if name in made[1:3] else name for name in node.output]
    compared(net, made[0], net("Relu", made[3]))


@pytest.mark.parametrize("op", ["LayerNormalization", "SimplifiedLayerNormalization"])
def test_norms_that_the_opset_does_not_have_yet(op):
    net = Net(0, opset=12)
    extra = [net.random(WIDTH)] if op == "LayerNormalization" else []
    y = net(op, net.x(), net.random(WIDTH), *extra, axis=-1)
    compared(net, y, net("Relu", y))


@pytest.mark.parametrize(
    ("left", "right", "attrs"),
    [
        ((BATCH, TOKENS, WIDTH), (BATCH, HIDDEN, WIDTH), {"transB": 1}),
        ((BATCH, WIDTH, TOKENS), (BATCH, WIDTH, HIDDEN), {"transA": 1}),
        ((TOKENS, BATCH, WIDTH), (BATCH, WIDTH, HIDDEN), {"transBatchA": 1}),
        ((BATCH, TOKENS, WIDTH), (WIDTH, BATCH, HIDDEN), {"transBatchB": 1}),
    ],
)
def test_products_that_turn_their_operands(left, right, attrs):
    net = Net(0)
    y = net("FusedMatMul", net.x(*left), net.random(*right), domain=MICROSOFT, alpha=0.5, **attrs)
    made, facts = compared(net, y)
    assert count(made, facts).total == BATCH * TOKENS * WIDTH * HIDDEN


def test_products_with_an_activation():
    net = Net(0)
    y = net("FusedConv", net.x("batch", 4, 8, 8), net.random(6, 4, 3, 3), domain=MICROSOFT,
            activation="Relu", strides=[2, 2])  # fmt: skip
    made, facts = compared(net, y)
    assert count(made, facts).total == BATCH * 6 * 3 * 3 * 4 * 9
    net = Net(0)
    y = net("FusedGemm", net.x("batch", WIDTH), net.weight(WIDTH, HIDDEN), net.random(HIDDEN),
            domain=MICROSOFT, activation="Relu")  # fmt: skip
    made, facts = compared(net, y)
    assert count(made, facts).total == BATCH * WIDTH * HIDDEN


def blocked(net, kernel, *, stay=False):
    """A convolution of 16 channels in blocks, in and out of them."""
    x = net("ReorderInput", net.x("batch", 16, 4, 4), domain=BLOCKED_LAYOUT)
    y = net("Conv", x, net.random(32, 16, kernel, kernel), domain=BLOCKED_LAYOUT,
            kernel_shape=[kernel, kernel])  # fmt: skip
    return net("ReorderOutput", y, domain=BLOCKED_LAYOUT, channels=32, channels_last=int(stay))


@pytest.mark.parametrize("last", [False, True])
def test_convolutions_in_blocks_of_channels(last):
    net = Net(0)
    y = blocked(net, 3, stay=last)
    compared(net, y, net("Relu", y))


@pytest.mark.parametrize("value", [INNER, 8])
def test_attention_with_its_projections_inside(value):
    net = Net(0)
    widths = [INNER, INNER, value]
    y = net("Attention", net.x(), net.weight(WIDTH, sum(widths)), net.random(sum(widths)),
            domain=MICROSOFT, num_heads=HEADS, qkv_hidden_sizes=widths)  # fmt: skip
    made, facts = compared(net, y, net("Relu", y))
    projections = BATCH * TOKENS * WIDTH * sum(widths)
    products = BATCH * TOKENS**2 * (INNER + value)
    assert count(made, facts).total == projections + products


@pytest.mark.parametrize(("form", "width"), [("rows", 8), ("heads", INNER), ("present", 8)])
def test_attention_with_its_projections_outside(form, width):
    net = Net(0)
    net.x()
    query, key, value = (net.linear("x", WIDTH, size) for size in (INNER, INNER, width))
    if form == "heads":
        key, value = (
            net("Transpose", net("Reshape", tensor, [0, 0, HEADS, HEAD]), perm=[0, 2, 1, 3])
            for tensor in (key, value)
        )
    made = net("MultiHeadAttention", query, key, value, outputs=3 if form == "present" else 1,
               domain=MICROSOFT, num_heads=HEADS)  # fmt: skip
    imported, facts = compared(net, *([made] if form != "present" else made))
    (anchor,) = (node for node in imported.nodes if node.op == "MultiHeadAttention")
    assert count(imported, facts).by_node[anchor.name] == BATCH * TOKENS**2 * (INNER + width)


def test_attention_with_packed_operands_is_not_counted():
    """No kernel on a CPU computes it; its shape is known all the same."""
    net = Net(0)
    rows = net("Reshape", net.linear(net.x(), WIDTH, 3 * INNER), [0, 0, HEADS, 3, HEAD])
    y = net("MultiHeadAttention", rows, domain=MICROSOFT, num_heads=HEADS)
    made = gs.import_onnx(net.build(y))
    facts = evaluate(made, {"x": (BATCH, TOKENS, WIDTH)})
    assert facts.shapes[y] == (BATCH, TOKENS, INNER)
    assert count(made, facts).uncounted == ("MultiHeadAttention_3",)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_with_shared_keys(packed):
    net = Net(0)
    net.x()
    width = 8
    query, key, value = (net.linear("x", WIDTH, heads * width) for heads in (4, 2, 2))
    operands = [net.linear("x", WIDTH, 8 * width), "", ""] if packed else [query, key, value]
    cache = [net.random(BATCH, 2, 0, width)] * 2
    lengths = np.full(BATCH, TOKENS - 1, np.int32)
    mixed = net(
        "GroupQueryAttention",
        *operands,
        *cache,
        lengths,
        np.int32(TOKENS),
        outputs=3,
        domain=MICROSOFT,
        num_heads=4,
        kv_num_heads=2,
    )
    compared(net, mixed[0], net("Relu", mixed[0]))


def test_embeddings():
    net = Net(0)
    ids = net.input("ids", "batch", "tokens", dtype=np.int32)
    mask = net.input("seen", "batch", "tokens", dtype=np.int32)
    tables = [net.random(8, WIDTH), net.random(16, WIDTH)]
    y, lengths = net("EmbedLayerNormalization", ids, "", *tables, "", net.random(WIDTH),
                     net.random(WIDTH), mask, outputs=2, domain=MICROSOFT)  # fmt: skip
    compared(net, y, lengths, net("Relu", y))


def test_rotations():
    net = Net(0)
    positions = net.input("ids", "batch", "tokens", dtype=np.int64)
    angles = [net.random(16, HEAD // 2) for _ in range(2)]
    x = net.x("batch", "tokens", INNER)
    y = net("RotaryEmbedding", x, positions, *angles, domain=MICROSOFT, num_heads=HEADS,
            rotary_embedding_dim=HEAD)  # fmt: skip
    compared(net, y)


# Operators that nobody knows


def foreign(shape, *, x=("batch", "tokens", WIDTH)):
    """An operator of somebody's own, whose result the file declares."""
    net = Net(0)
    y = net("Mystery", net.x(*x), domain="somebody")
    proto = net.build(net("Relu", y))
    if shape is not None:
        declared = helper.make_tensor_value_info(y, onnx.TensorProto.FLOAT, shape)
        proto.graph.value_info.append(declared)
    made = from_proto(proto).graph
    size = tuple(2 if name == "batch" else 7 if name == "tokens" else name for name in x)
    return evaluate(made, {"x": size}).shapes


def test_a_declared_shape_is_taken_after_an_unknown_operator():
    shapes = foreign(["batch", 3, "tokens"])
    assert shapes["Mystery_0_0"] == shapes["Relu_1_0"] == (2, 3, 7)
    assert foreign([4, 3, 1], x=(4, 5, WIDTH))["Relu_1_0"] == (4, 3, 1)


@pytest.mark.parametrize("shape", [None, ["other", 3], [None, 3], [1, 3], [0, "batch"]])
def test_a_declared_shape_that_may_be_of_other_sizes_is_not(shape):
    assert "Mystery_0_0" not in foreign(shape)


def test_only_unknown_operators_rely_on_what_is_declared():
    net = Net(0)
    y = net("Mystery", relu(net, net.x()), domain="somebody")
    y = net("QuickGelu", y, domain=MICROSOFT)
    assert declared_only(from_proto(net.build(y)).graph) == {"Mystery_1_0"}


def test_blocks_behind_an_unknown_operator_are_found_again_in_the_cut_model():
    net = Net(0)
    mystery = net("Mystery", net.x(), domain="somebody")
    hidden = relu(net, net.linear(mystery, WIDTH, HIDDEN))
    proto = net.build(net.linear(hidden, HIDDEN, WIDTH))
    shape = ["batch", "tokens", WIDTH]
    declared = helper.make_tensor_value_info(mystery, onnx.TensorProto.FLOAT, shape)
    proto.graph.value_info.append(declared)
    model = from_proto(proto)
    catalog = find_blocks(model)
    (block,) = catalog.blocks
    small = operate(model, catalog, narrowed(unchanged(model, catalog), 0.5)).model
    (again,) = find_blocks(from_proto(small.proto())).blocks
    assert again.width == block.width // 2


# Counting


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bsd->bds", [(2, 3, 4)], 0),
        ("bsd,bsd->bs", [(2, 3, 4)] * 2, 24),
        ("bsd,btf->bstdf", [(2, 3, 4), (2, 5, 6)], 2 * 3 * 4 * 5 * 6),
        ("a,b,c->abc", [(2,), (3,), (4,)], 48),
    ],
)
def test_sums_that_stay_are_counted(equation, shapes, macs):
    net = Net(0)
    names = [net.input(f"x{index}", *shape) for index, shape in enumerate(shapes)]
    made = from_proto(net.build(net("Einsum", *names, equation=equation))).graph
    counts = count(made, evaluate(made, {f"x{i}": shape for i, shape in enumerate(shapes)}))
    assert counts.total == macs


def test_weights_that_are_stored_quantised_are_parameters():
    net = Net(0)
    weight = net("DequantizeLinear", np.ones((WIDTH, HIDDEN), np.int8), net.random(HIDDEN), axis=1)
    made = from_proto(net.build(net("MatMul", net.x(), weight))).graph
    counts = count(made, evaluate(made, {"x": (1, 2, WIDTH)}))
    assert counts.params == WIDTH * HIDDEN
    assert counts.total == 2 * WIDTH * HIDDEN


def test_a_comparison_that_the_opset_does_not_have_yet_of_sizes_that_do_not_fit():
    """At sizes that are only tried: nothing is said of what follows."""
    net = Net(0, opset=11)
    y = net("GreaterOrEqual", net.x(), net.input("other", "batch", "others", WIDTH))
    model = from_proto(net.build(y))
    sizes = {"x": (2, 5, WIDTH), "other": (2, 7, WIDTH)}
    facts = evaluate(model.graph, sizes)
    assert facts.shape(model.graph.outputs[0]) is None
    same = evaluate(model.graph, sizes | {"other": (2, 1, WIDTH)})
    assert same.shape(model.graph.outputs[0]) == (2, 5, WIDTH)
