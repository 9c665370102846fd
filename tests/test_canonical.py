"""What fused operators are rewritten to computes the same; what cannot be is left alone."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from corp_onnx.blocks import Mlp, axes_of, find_blocks
from corp_onnx.graph.model import QuantisedModel, from_proto, load, save
from corp_onnx.graph.operators import MICROSOFT
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from tests.builders import HEAD, HEADS, HIDDEN, WIDTH, Net, feeds, relu
from tests.full_width import run
from tests.tolerances import distance, rounding

INNER = HEADS * HEAD
SIZES = ((1, 3), (2, 5), (3, 8))
BOUND = rounding(width=64, dtype=np.float32)
"""Sums here have at most 64 terms, and are followed by a Softmax at most."""


def ops(model):
    return {node.op for node in model.graph.nodes}


def farthest(model, proto):
    """The largest relative distance of two models' outputs, over several sizes."""
    found = []
    for seed, (batch, tokens) in enumerate(SIZES):
        given = feeds(proto, batch, tokens, seed)
        (before,), (after,) = run(proto, given), run(model, given)
        assert before.keys() == after.keys()
        found += [distance(after[name], before[name]) for name in before]
    return max(found)


def check(build, *, gone, **options):
    """Rewritten, it computes the same, and not what the same graph with one mistake computes."""
    proto, wrong = build(**options), build(**options, wrong=True)
    model = from_proto(proto)
    assert not ops(model) & {gone}
    assert farthest(model, proto) < BOUND
    assert farthest(model, wrong) > 100 * BOUND
    return model


def check_left(proto, op):
    """The operator is still there, and so is all else."""
    model = from_proto(proto)
    kept = [node.op for node in model.graph.nodes]
    assert op in kept
    assert sorted(kept) == sorted(node.op_type for node in proto.graph.node)


def widths_of(model):
    """Every block with its widths and the axes that can be cut."""
    return [
        ("mlp", block.width, axes_of(block))
        if isinstance(block, Mlp)
        else ("attention", block.head_width, axes_of(block))
        for block in find_blocks(model).blocks
    ]


# Weights that are computed


def parametrised(kind, *, wrong=False):
    """An MLP whose first weight is made of constants in one way."""
    net = Net(0)
    weight, whole = net.weight(WIDTH, HIDDEN), np.int8(net.random(WIDTH, HIDDEN, gain=9.0))
    gain = net.const(net.random(HIDDEN) * (1.1 if wrong else 1.0))
    made = {
        "norm": lambda: net("Mul", net("Div", weight, net("ReduceL2", weight, [0])), gain),
        "mask": lambda: net("Where", net("Greater", weight, gain), weight, np.float32(0.0)),
        "low rank": lambda: net(
            "Add",
            weight,
            net("MatMul", net.weight(WIDTH, 2), net("Mul", net.weight(2, HIDDEN), gain)),
        ),
        "over a stored one": lambda: net(
            "Add", net("DequantizeLinear", whole, np.float32(0.1)), net("Mul", weight, gain)
        ),
        "part": lambda: net(
            "Mul",
            net(
                "Split",
                net("Concat", net.weight(WIDTH, HIDDEN), weight, axis=0),
                axis=0,
                num_outputs=2,
                outputs=2,
            )[1],
            gain,
        ),
        "turned": lambda: net(
            "Transpose", net("Mul", net("Transpose", weight), net("Unsqueeze", gain, [1]))
        ),
    }
    y = relu(net, net("MatMul", net.x(), made[kind]()))
    return net.build(net("MatMul", y, net.weight(HIDDEN, WIDTH)))


@pytest.mark.parametrize(
    "kind", ["norm", "mask", "low rank", "over a stored one", "part", "turned"]
)
def test_a_weight_that_is_computed_of_constants_becomes_one(kind):
    model = check(partial(parametrised, kind), gone="Mul" if kind != "mask" else "Where")
    assert ops(model) == {"MatMul", "Relu"}
    assert widths_of(model) == [("mlp", HIDDEN, ("mlp",))]


def stored(op):
    """An MLP whose weights are stored otherwise, and read through one operator."""
    net = Net(0)
    half = net.random(WIDTH, HIDDEN).astype(np.float16)
    net.tensors.append(numpy_helper.from_array(half, "half"))
    net.tensors.append(numpy_helper.from_array(half.astype(np.int8), "whole"))
    weight = {
        "Cast": lambda: net("Cast", "half", to=TensorProto.FLOAT),
        "DequantizeLinear": lambda: net("DequantizeLinear", "whole", np.float32(0.1)),
        "Transpose": lambda: net("Transpose", net.weight(HIDDEN, WIDTH)),
        "RandomNormalLike": lambda: net(
            "Mul", net("RandomNormalLike", net.weight(WIDTH, HIDDEN)), net.random(HIDDEN)
        ),
    }[op]()
    y = relu(net, net("MatMul", net.x(), weight))
    return net.build(net("MatMul", y, net.weight(HIDDEN, WIDTH)))


@pytest.mark.parametrize("op", ["Cast", "DequantizeLinear", "Transpose", "RandomNormalLike"])
def test_a_weight_that_is_only_stored_otherwise_stays_so(op):
    check_left(stored(op), op)


# Attention of ONNX Runtime


def packed(*, mask=None, value=INNER, wrong=False, bias=True, opset=18, **attrs):
    """``Attention`` with its projections inside, a mask of some form, and an output layer."""
    net = Net(0, opset=opset)
    net.x()
    weight, vector = net.weight(WIDTH, 2 * INNER + value), net.random(2 * INNER + value)
    if value != INNER:
        attrs["qkv_hidden_sizes"] = [INNER, INNER, value]
    attrs["num_heads"] = HEADS
    inputs = ["x", weight, vector if bias else "", masks(net, mask), "", added(net, mask)]
    if wrong:
        attrs["scale"] = 0.9 * attrs.get("scale", 1 / np.sqrt(HEAD))
    while not isinstance(inputs[-1], np.ndarray) and inputs[-1] == "":
        inputs.pop()
    mixed = net("Attention", *inputs, domain=MICROSOFT, **attrs)
    return net.build(net.linear(mixed, value, WIDTH))


def masks(net, kind):
    if kind not in {"rows", "lengths", "pairs", "ends"}:
        return ""
    seen = net.input("seen", "batch", "tokens", dtype=np.int32)
    if kind == "rows":
        return seen
    if kind == "pairs":
        rows = net("Unsqueeze", seen, [1])
        return net("Mul", rows, net("Unsqueeze", seen, [2]))
    lengths = net("ReduceSum", seen, [1], keepdims=0)
    if kind == "lengths":
        return lengths
    return net("Concat", lengths, net("Sub", lengths, lengths), axis=0)


def added(net, kind):
    if kind != "added":
        return ""
    tokens = net("Shape", "x", start=1, end=2)
    target = net("Concat", [1, HEADS], tokens, tokens, axis=0)
    return net("Mul", net("Expand", 1.0, target), net("ReduceSum", "x", [0, 1, 2], keepdims=1))


@pytest.mark.parametrize("mask", [None, "rows", "lengths", "pairs"])
@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"value": 8},
        {"scale": 0.3},
        {"unidirectional": 1},
        {"mask_filter_value": float(np.finfo(np.float32).min)},
        {"bias": False},
    ],
    ids=str,
)
def test_attention_with_its_projections_inside(mask, attrs):
    model = check(packed, gone="Attention", mask=mask, **attrs)
    assert ops(model) >= {"MatMul", "Split", "MultiHeadAttention"}


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_attention_of_any_opset(opset):
    check(packed, gone="Attention", opset=opset)


def test_the_scale_of_an_attention_is_written_down():
    model = from_proto(packed())
    (node,) = (node for node in model.graph.nodes if node.op == "MultiHeadAttention")
    assert node.attrs["scale"] == pytest.approx(1 / np.sqrt(HEAD))


def test_lengths_become_rows_once_for_all_layers():
    """An encoder counts its tokens once, and masks them in every layer."""
    net = Net(0)
    y, lengths = net.x(), masks(net, "lengths")
    for _ in range(2):
        inside = [net.weight(WIDTH, 3 * INNER), net.random(3 * INNER), lengths]
        mixed = net("Attention", y, *inside, domain=MICROSOFT, num_heads=HEADS)
        y = net("Add", y, net.linear(mixed, INNER, WIDTH))
    proto = net.build(y)
    model = from_proto(proto)
    found = [node for node in model.graph.nodes if node.op == "MultiHeadAttention"]
    assert found[0].inputs[4] is found[1].inputs[4]
    assert [node.op for node in model.graph.nodes].count("Range") == 1
    assert farthest(model, proto) < BOUND


def test_a_mask_of_starts_and_ends_is_left_inside():
    check_left(packed(mask="ends"), "Attention")


def test_an_attention_that_keeps_its_keys_is_left_alone():
    net = Net(0)
    past = net.input("past", 2, "batch", HEADS, "others", HEAD)
    inputs = [net.x(), net.weight(WIDTH, 3 * INNER), net.random(3 * INNER), "", past]
    mixed, present = net(
        "Attention", *inputs, outputs=2, domain=MICROSOFT, num_heads=HEADS, unidirectional=1
    )
    check_left(net.build(mixed, present), "Attention")


def test_an_attention_with_a_computed_weight_is_left_alone():
    net = Net(0)
    weight = net("Neg", net.input("w", WIDTH, 3 * INNER))
    mixed = net(
        "Attention", net.x(), weight, net.random(3 * INNER), domain=MICROSOFT, num_heads=HEADS
    )
    check_left(net.build(mixed), "Attention")


def biased(*, value=INNER, wrong=False, parts=(1, 1, 1), mask=None):
    """``MultiHeadAttention`` with the bias of its projections inside."""
    net = Net(0)
    net.x()
    made = [net("MatMul", "x", net.weight(WIDTH, size)) for size in (INNER, INNER, value)]
    vectors = [
        part * net.random(size) for part, size in zip(parts, (INNER, INNER, value), strict=True)
    ]
    bias = np.concatenate(vectors[::-1] if wrong else vectors)
    mask = [masks(net, mask)] if mask else []
    mixed = net("MultiHeadAttention", *made, bias, *mask, domain=MICROSOFT, num_heads=HEADS)
    return net.build(net.linear(mixed, value, WIDTH))


@pytest.mark.parametrize("value", [INNER, 8])
@pytest.mark.parametrize("mask", [None, "rows", "lengths", "pairs"])
def test_a_bias_inside_an_attention_is_brought_before_it(value, mask):
    model = check(biased, gone="none", value=value, mask=mask)
    (node,) = (node for node in model.graph.nodes if node.op == "MultiHeadAttention")
    assert [tensor.inputs[0].op for tensor in node.inputs[:3]] == ["Add"] * 3
    assert len(node.inputs) < 4 or not node.inputs[3].name
    assert widths_of(model) == [("attention", HEAD, ("qk", "vo"))]


def test_a_bias_of_zeros_is_not_added():
    model = from_proto(biased(parts=(1, 0, 1)))
    assert [node.op for node in model.graph.nodes].count("Add") == 3
    assert farthest(model, biased(parts=(1, 0, 1))) < BOUND


def test_a_bias_of_packed_operands_is_left_inside():
    net = Net(0)
    rows = net("MatMul", net.x(), net.weight(WIDTH, 3 * INNER))
    packed_rows = net("Reshape", rows, [0, 0, HEADS, 3, HEAD])
    bias = net.random(3 * INNER)
    mixed = net("MultiHeadAttention", packed_rows, "", "", bias, domain=MICROSOFT, num_heads=HEADS)
    check_left(net.build(mixed), "MultiHeadAttention")


@pytest.mark.parametrize("mask", [None, "rows", "lengths"])
def test_keys_and_values_with_heads_before_tokens(mask):
    """As a decoder hands its operator what it keeps of an encoder."""
    net = Net(0)
    query = net("MatMul", net.x(), net.weight(WIDTH, INNER))
    key, value = (
        net(
            "Transpose",
            net("Reshape", net("MatMul", "x", net.weight(WIDTH, INNER)), [0, 0, HEADS, HEAD]),
            perm=[0, 2, 1, 3],
        )
        for _ in range(2)
    )
    more = ["", masks(net, mask)] if mask else []
    mixed = net("MultiHeadAttention", query, key, value, *more, domain=MICROSOFT, num_heads=HEADS)
    proto = net.build(net.linear(mixed, INNER, WIDTH))
    assert farthest(from_proto(proto), proto) < BOUND


# Products with something inside


def scaled_layer(*, wrong=False, transposed=False, alpha=0.5):
    net = Net(0)
    shape = (HIDDEN, WIDTH) if transposed else (WIDTH, HIDDEN)
    attrs = {"alpha": alpha * (1.1 if wrong else 1), "transB": int(transposed)}
    y = net("FusedMatMul", net.x(), net.weight(*shape), domain=MICROSOFT, **attrs)
    return net.build(net.linear(relu(net, y), HIDDEN, WIDTH))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 0.5, -3.0])
def test_a_product_with_a_weight_and_a_scale_is_a_linear_layer(transposed, alpha):
    model = check(scaled_layer, gone="FusedMatMul", transposed=transposed, alpha=alpha)
    assert ops(model) == {"MatMul", "Relu", "Add"}
    assert widths_of(model) == [("mlp", HIDDEN, ("mlp",))]


def scaled_logits(*, wrong=False, turned="B", between="FusedMatMul"):
    """Attention whose logits are one operator, scale and transposition included."""
    net = Net(0)
    net.x()
    perm = {"A": ([0, 2, 3, 1], [0, 2, 3, 1]), "B": ([0, 2, 1, 3], [0, 2, 1, 3])}[turned]
    made = [
        net("Transpose", net("Reshape", net.linear("x", WIDTH, INNER), [0, 0, HEADS, HEAD]), perm=p)
        for p in (*perm, [0, 2, 1, 3])
    ]
    attrs = {"alpha": 0.3 if wrong else 1 / np.sqrt(HEAD), f"trans{turned}": 1}
    logits = net(between, *made[:2], domain=MICROSOFT, **attrs)
    mixed = net("MatMul", net("Softmax", logits, axis=-1), made[2])
    rows = net("Reshape", net("Transpose", mixed, perm=[0, 2, 1, 3]), [0, 0, INNER])
    return net.build(net.linear(rows, INNER, WIDTH))


@pytest.mark.parametrize("turned", ["A", "B"])
def test_a_product_of_activations_with_scale_and_transposition(turned):
    model = check(scaled_logits, gone="FusedMatMul", turned=turned)
    assert widths_of(model) == [("attention", HEAD, ("qk", "vo"))]


def turned_batches(*, wrong=False):
    """Attention whose products read ``[t, b·h, e]``, as ONNX Runtime writes it."""
    net = Net(0)
    net.x("batch", "tokens", WIDTH)
    first = net("Transpose", "x", perm=[1, 0, 2])
    length = net("Slice", net("Shape", "x"), [1], [2])
    made = [
        net(
            "Reshape",
            net.linear(first, WIDTH, INNER),
            net("Concat", length, [-1, HEAD], axis=0),
        )
        for _ in range(3)
    ]
    attrs = {"alpha": 0.3 if wrong else 1 / np.sqrt(HEAD), "transB": 1}
    logits = net("FusedMatMul", *made[:2], domain=MICROSOFT, transBatchA=1, transBatchB=1, **attrs)
    mixed = net("FusedMatMul", net("Softmax", logits, axis=-1), made[2], domain=MICROSOFT,
                transBatchB=1)  # fmt: skip
    rows = net("Transpose", mixed, perm=[1, 0, 2])
    rows = net("Reshape", rows, net("Concat", length, [-1, INNER], axis=0))
    return net.build(net.linear(rows, INNER, WIDTH))


def test_products_with_turned_batches():
    model = check(turned_batches, gone="FusedMatMul")
    assert widths_of(model) == [("attention", HEAD, ("qk", "vo"))]


def fused_gemm(*, wrong=False, activation="Relu", **attrs):
    net = Net(0)
    given = {f"activation_{name}": value for name, value in attrs.items()}
    weight = net.weight(HIDDEN, WIDTH)
    y = net(
        "FusedGemm",
        net.x("batch", WIDTH),
        weight,
        net.random(HIDDEN),
        domain=MICROSOFT,
        transB=1,
        alpha=0.7 if wrong else 0.5,
        activation=activation,
        **given,
    )
    return net.build(net("Gemm", y, net.weight(HIDDEN, WIDTH)))


@pytest.mark.parametrize(
    ("activation", "attrs"),
    [
        ("Relu", {}),
        ("Tanh", {}),
        ("LeakyRelu", {"alpha": 0.3}),
        ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
    ],
)
def test_a_gemm_with_its_activation(activation, attrs):
    model = check(fused_gemm, gone="FusedGemm", activation=activation, **attrs)
    assert ops(model) == {"Gemm", activation}
    assert widths_of(model) == [("mlp", HIDDEN, ("mlp",))]


def test_a_gemm_with_an_unknown_activation_is_left_alone():
    check_left(fused_gemm(activation="Softsign"), "FusedGemm")


def fused_conv(*, wrong=False, residual=False):
    net = Net(0)
    inputs = [net.x("batch", 3, 8, 8), net.random(4, 3, 3, 3), net.random(4)]
    if residual:
        inputs.append(net("Conv", "x", net.random(4, 3, 1, 1)))
    return net.build(
        net(
            "FusedConv",
            *inputs,
            domain=MICROSOFT,
            pads=[1, 1, 1, 1],
            activation="LeakyRelu",
            activation_params=[0.2 if wrong else 0.1],
        )
    )


def test_a_convolution_with_its_activation():
    assert ops(check(fused_conv, gone="FusedConv")) == {"Conv", "LeakyRelu"}


def test_a_convolution_that_adds_a_tensor_is_left_alone():
    check_left(fused_conv(residual=True), "FusedConv")


# Einsum

LAYERS = {
    "bsd,df->bsf": (("batch", "tokens", 10), (10, 14)),
    "bsd,df": (("batch", "tokens", 10), (10, 14)),
    "bsd,fd->bsf": (("batch", "tokens", 10), (14, 10)),
    "df,bsd->bsf": (("batch", "tokens", 10), (10, 14)),
    "bsd,dhe->bshe": (("batch", "tokens", 10), (10, 2, 6)),
    "bsd,hde->bhse": (("batch", "tokens", 10), (2, 10, 6)),
    "bshe,hed->bsd": (("batch", "tokens", 2, 6), (2, 6, 10)),
    "bhse,hed->bsd": (("batch", 2, "tokens", 6), (2, 6, 10)),
    "bhse,dhe->sbd": (("batch", 2, "tokens", 6), (10, 2, 6)),
    "bsd,d->bs": (("batch", "tokens", 10), (10,)),
}
"""Sums over a constant weight: the shape of the activation, and that of the weight."""


def layer(equation, *, wrong=False):
    net = Net(0)
    given, shape = LAYERS[equation]
    net.x(*given)
    weight = net.const(net.random(*shape) * (1.1 if wrong else 1))
    first = equation.index(",") < 3 and equation[:2] == "df"
    pair = (weight, "x") if first else ("x", weight)
    return net.build(net("Einsum", *pair, equation=equation))


@pytest.mark.parametrize("equation", LAYERS)
def test_a_sum_over_a_weight_is_a_linear_layer(equation):
    model = check(layer, gone="Einsum", equation=equation)
    assert ops(model) <= {"MatMul", "Reshape", "Transpose"}
    (node,) = (node for node in model.graph.nodes if node.op == "MatMul")
    assert len(node.inputs[1].shape) == 2


PRODUCTS = {
    "bhid,bhjd->bhij": ("bhse", "bhoe"),
    "bihd,bjhd->bhij": ("bshe", "bohe"),
    "bihd,bjhd->bhji": ("bshe", "bohe"),
    "bhij,bjhd->bihd": ("bhso", "bohe"),
    "bhij,bhjd->bihd": ("bhso", "bhoe"),
    "id,jd->ij": ("se", "oe"),
}
AXES = {"b": "batch", "s": "tokens", "o": "others", "h": HEADS, "e": HEAD}


def product(equation, *, wrong=False):
    net = Net(0)
    left, right = ([AXES[axis] for axis in axes] for axes in PRODUCTS[equation])
    net.x(*left)
    net.input("y", *right)
    made = net("Einsum", "x", "y", equation=equation)
    return net.build(net("Mul", made, 1.1 if wrong else 1.0))


@pytest.mark.parametrize("equation", PRODUCTS)
def test_a_sum_over_two_activations_is_a_product(equation):
    model = check(product, gone="Einsum", equation=equation)
    assert ops(model) <= {"MatMul", "Transpose", "Mul"}


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("...d,df->...f", [("batch", "tokens", 10), (10, 14)]),
        ("bsd->bds", [("batch", "tokens", 10)]),
        ("bsd,bsd->bs", [("batch", "tokens", 10), ("batch", "tokens", 10)]),
        ("bsd,btf->bstdf", [("batch", "tokens", 10), ("batch", "others", 3)]),
        ("bse,bte,e->bst", [("batch", "tokens", 6), ("batch", "others", 6), ("six",)]),
        ("bdd,bd->bd", [("batch", 4, 4), ("batch", 4)]),
        ("bihd,bjkhd->bhijk", [("batch", "tokens", 2, 6), ("batch", "others", 3, 2, 6)]),
        ("bsd,btd->bst", [("batch", "tokens", 6), ("batch", "others", 1)]),
    ],
)
def test_other_sums_are_left_alone(equation, shapes):
    net = Net(0)
    names = [net.input(f"x{index}", *shape) for index, shape in enumerate(shapes)]
    check_left(net.build(net("Einsum", *names, equation=equation)), "Einsum")


def einsum_attention(*, wrong=False):
    """Attention of which every product is an Einsum, as Flax and big_vision write it."""
    net = Net(0)
    net.x()
    query, key, value = (
        net("Add", net("Einsum", "x", net.random(WIDTH, HEADS, HEAD), equation="bsd,dhe->bshe"),
            net.random(HEADS, HEAD))
        for _ in range(3)
    )  # fmt: skip
    logits = net(
        "Mul", net("Einsum", query, key, equation="bqhd,bkhd->bhqk"), 0.5 if wrong else 0.4
    )
    mixed = net("Einsum", net("Softmax", logits, axis=-1), value, equation="bhqk,bkhd->bqhd")
    y = net("Einsum", mixed, net.random(HEADS, HEAD, WIDTH), equation="bshe,hed->bsd")
    return net.build(net("Add", y, net.random(WIDTH)))


def long_sums(order, *, wrong=False):
    """The same with values and output projection in one sum, whose operands come in any order."""
    net = Net(0)
    net.x()
    query, key, value = (
        net("Einsum", "x", net.random(WIDTH, HEADS, HEAD), equation="bsd,dhe->bhse")
        for _ in range(3)
    )
    logits = net("Mul", net("Einsum", query, key, equation="bhqd,bhkd->bhqk"), 0.4)
    operands = {
        "mixed": (net("Softmax", logits, axis=-1), "bhij"),
        "value": (value, "bhje"),
        "weight": (net.const(net.random(HEADS, HEAD, WIDTH) * (1.1 if wrong else 1)), "hed"),
    }
    names, terms = zip(*(operands[role] for role in order), strict=True)
    return net.build(net("Einsum", *names, equation=f"{','.join(terms)} -> bid"))


def low_rank(*, wrong=False):
    """A layer as two narrow ones, in one sum."""
    net = Net(0)
    net.x("batch", "tokens", 10)
    factors = [net.const(net.random(10, 3) * (1.1 if wrong else 1)), net.const(net.random(3, 14))]
    return net.build(net("Einsum", "x", *factors, equation="bsd,dr,rf->bsf"))


def test_an_attention_written_in_sums_is_found():
    model = check(einsum_attention, gone="Einsum")
    assert widths_of(model) == [("attention", HEAD, ("qk", "vo"))]


@pytest.mark.parametrize("order", [*permutations(["mixed", "value", "weight"])])
def test_a_sum_of_three_is_two_sums_of_two(order):
    """Probabilities meet values first: a weight before them would make the product larger."""
    model = check(long_sums, gone="Einsum", order=order)
    assert widths_of(model) == [("attention", HEAD, ("qk", "vo"))]


def test_a_sum_over_two_weights_is_two_layers():
    model = check(low_rank, gone="Einsum")
    assert [node.op for node in model.graph.nodes] == ["MatMul", "MatMul"]


# Normalisation of batches


def batch_norm(net, y, width, **attrs):
    spread = net.rng.uniform(0.5, 2, width)
    return net("BatchNormalization", y, net.random(width), net.random(width), net.random(width),
               spread, **attrs)  # fmt: skip


def normed(kind, *, wrong=False, epsilon=1e-3):
    """A hidden layer and BatchNormalization behind it, in one of the forms that exporters write."""
    net = Net(0)
    attrs = {"epsilon": 0.3 if wrong else epsilon}
    if kind.startswith("conv"):
        groups = 2 if kind == "conv_grouped" else 1
        kernel = net.random(HIDDEN, 4 // groups, 3, 3)
        bias = () if kind == "conv_no_bias" else (net.random(HIDDEN),)
        y = net("Conv", net.x("batch", 4, 8, 8), kernel, *bias, group=groups)
        return net.build(relu(net, batch_norm(net, y, HIDDEN, **attrs)))
    if kind == "gemm":
        up = net.weight(HIDDEN, WIDTH)
        y = net(
            "Gemm", net.x("batch", WIDTH), up, net.random(HIDDEN), alpha=0.5, beta=2.0, transB=1
        )
        return net.build(
            net("Gemm", relu(net, batch_norm(net, y, HIDDEN, **attrs)), net.weight(HIDDEN, WIDTH))
        )
    y = net.linear(net.x(), WIDTH, HIDDEN, bias="bias" in kind)
    rows = net("Reshape", y, [-1, HIDDEN]) if "rows" in kind else net("Flatten", y, axis=2)
    made = net("Reshape", batch_norm(net, rows, HIDDEN, **attrs), net("Shape", y))
    return net.build(net.linear(relu(net, made), HIDDEN, WIDTH))


KINDS = ["conv", "conv_grouped", "conv_no_bias", "gemm", "rows", "rows_bias", "flat", "flat_bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_behind_a_layer_becomes_part_of_it(kind):
    model = check(normed, gone="BatchNormalization", kind=kind)
    if not kind.startswith("conv"):
        assert widths_of(model) == [("mlp", HIDDEN, ("mlp",))]


def test_a_norm_behind_a_layer_that_others_read_is_left_alone():
    net = Net(0)
    y = net("Conv", net.x("batch", 4, 8, 8), net.random(HIDDEN, 4, 1, 1))
    check_left(net.build(net("Add", batch_norm(net, y, HIDDEN), y)), "BatchNormalization")
    net = Net(0)
    y = net("Conv", net.x("batch", 4, 8, 8), net.random(HIDDEN, 4, 1, 1))
    check_left(net.build(batch_norm(net, y, HIDDEN), y), "BatchNormalization")


def test_a_norm_over_another_axis_than_the_layer_s_channels_is_left_alone():
    """Tokens are as many as channels here, so that sizes alone do not tell."""
    net = Net(0)
    y = net.linear(net.x("batch", HIDDEN, WIDTH), WIDTH, HIDDEN)
    check_left(net.build(batch_norm(net, y, HIDDEN)), "BatchNormalization")


def test_a_norm_in_front_of_a_layer_is_left_alone():
    net = Net(0)
    y = batch_norm(net, net.x("batch", WIDTH), WIDTH)
    check_left(net.build(net.linear(y, WIDTH, HIDDEN)), "BatchNormalization")


def test_a_shared_weight_is_scaled_for_one_reader_only():
    net = Net(0)
    weight = net.const(net.random(HIDDEN, 4, 1, 1))
    y = batch_norm(net, net("Conv", net.x("batch", 4, 8, 8), weight), HIDDEN)
    proto = net.build(y, net("Conv", "x", weight))
    model = from_proto(proto)
    assert ops(model) == {"Conv"}
    assert farthest(model, proto) < BOUND


def skip_norm(outputs=1, *, biased=True, wrong=False, opset=18):
    """The norm of a sum; statistics, and the sum itself, if they are asked for."""
    net = Net(0, opset=opset)
    y = net("MatMul", net.x(), net.weight(WIDTH, WIDTH))
    vectors = [net.random(WIDTH) for _ in range(3 if biased else 2)]
    made = net("SkipLayerNormalization", y, "x", *vectors, outputs=outputs, domain=MICROSOFT,
               epsilon=0.1 if wrong else 0.01)  # fmt: skip
    return net.build(*([made] if outputs == 1 else [made[0], made[-1]]))


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_the_sum_that_a_norm_is_taken_of_is_a_tensor(biased):
    model = check(skip_norm, gone="SkipLayerNormalization", biased=biased)
    assert ops(model) == {"MatMul", "Add", "LayerNormalization"}


@pytest.mark.parametrize("form", [{"opset": 16}, {"outputs": 2}, {"outputs": 4}])
def test_a_norm_of_a_sum_stays_where_it_must_or_had_better(form):
    check_left(skip_norm(**form), "SkipLayerNormalization")


# Surroundings


def test_what_stays_fused_stays_and_is_found():
    """Per-channel operators and norms hinder nothing."""
    net = Net(0)
    hidden = net("MatMul", net.x(), net.weight(WIDTH, HIDDEN))
    hidden = net("BiasGelu", hidden, net.random(HIDDEN), domain=MICROSOFT)
    y = net("MatMul", hidden, net.weight(HIDDEN, WIDTH))
    vectors = [net.random(WIDTH) for _ in range(3)]
    y, *_, stream = net("SkipLayerNormalization", y, "x", *vectors, outputs=4, domain=MICROSOFT)
    y = net("FastGelu", net("MatMul", y, net.weight(WIDTH, HIDDEN)), net.random(HIDDEN),
            domain=MICROSOFT)  # fmt: skip
    model = from_proto(net.build(net("MatMul", y, net.weight(HIDDEN, WIDTH)), stream))
    assert ops(model) == {"MatMul", "BiasGelu", "SkipLayerNormalization", "FastGelu"}
    assert widths_of(model) == [("mlp", HIDDEN, ("mlp",))] * 2


def test_an_output_of_the_model_keeps_its_name():
    net = Net(0)
    y = net("FusedMatMul", net.x(), net.weight(WIDTH, HIDDEN), domain=MICROSOFT, alpha=2.0)
    proto = net.build(y)
    model = from_proto(proto)
    assert [value.name for value in model.proto().graph.output] == [y]
    assert farthest(model, proto) < BOUND


def test_a_domain_is_imported_if_it_is_used():
    made = from_proto(packed()).proto()
    assert {entry.domain for entry in made.opset_import} == {"", MICROSOFT}
    plain = from_proto(layer("bsd,df->bsf"))
    assert {entry.domain for entry in plain.proto().opset_import} == {""}


def test_the_given_model_is_not_changed():
    proto = packed(mask="rows")
    before = proto.SerializeToString(deterministic=True)
    from_proto(proto).proto()
    assert proto.SerializeToString(deterministic=True) == before


# Weights that are stored quantised


def rounded(dtype, *, axis=None, block=0, wrong=False, transposed=False, others=False):
    """An MLP whose up projection is dequantised from a constant."""
    net = Net(0, opset=21)
    shape = (32, WIDTH) if transposed else (WIDTH, 32)
    low, high = (0, 15) if "uint" in dtype else (-8, 7)
    values = net.rng.integers(low, high, shape, endpoint=True)
    scales = {"axis": 1} if axis is None else {"axis": axis}
    size = () if axis is None else (shape[axis],)
    if block:
        scales["block_size"] = block
        size = tuple(n // block if i == axis else n for i, n in enumerate(shape))
    kind = onnx.helper.tensor_dtype_to_np_dtype(getattr(TensorProto, dtype.upper()))
    stored = numpy_helper.from_array(values.astype(kind), "stored")
    net.tensors.append(stored)
    scale = net.const(net.rng.uniform(0.05, 0.2, size) * (1.1 if wrong else 1))
    weight = net("DequantizeLinear", "stored", scale, **scales)
    if transposed:
        weight = net("Transpose", weight, perm=[1, 0])
    y = relu(net, net("MatMul", net.x(), weight))
    y = net.linear(y, 32, WIDTH)
    if others:
        stored = net("DequantizeLinear", np.ones((WIDTH, 3), np.int8), 0.5)
        return net.build(y, net("MatMul", "x", stored))
    return net.build(y)


ROUNDED = [
    ("int8", {}),
    ("int8", {"axis": 1}),
    ("uint8", {"axis": 0, "transposed": True}),
    ("int4", {"axis": 1, "block": 16}),
    ("uint4", {"axis": 0, "block": 2}),
    ("float8e4m3fn", {}),
]


@pytest.mark.parametrize(("dtype", "options"), ROUNDED, ids=str)
def test_weights_that_are_stored_quantised_are_read(dtype, options, tmp_path):
    proto = rounded(dtype, **options)
    onnx.save(proto, tmp_path / "model.onnx")
    model = load(tmp_path / "model.onnx")
    assert f"weights are stored as {dtype}" in model.notes[0].replace("8_e4", "8e4")
    assert widths_of(model) == [("mlp", 32, ("mlp",))]
    save(model, tmp_path / "again.onnx")
    again = onnx.load(tmp_path / "again.onnx")
    assert "DequantizeLinear" in {node.op_type for node in again.graph.node}
    assert farthest(again, proto) == 0
    assert farthest(again, rounded(dtype, **options, wrong=True)) > 100 * BOUND


@pytest.mark.parametrize(("dtype", "options"), ROUNDED, ids=str)
def test_layers_that_are_cut_become_plain_and_others_stay(dtype, options):
    proto = rounded(dtype, **options, others=True)
    model = from_proto(proto)
    catalog = find_blocks(model)
    made = operate(model, catalog, turned(model, catalog)).model
    kinds = [node.op for node in made.graph.nodes]
    assert kinds.count("DequantizeLinear") == 1
    assert made.notes == model.notes
    assert farthest(made, proto) < BOUND


def test_activations_that_are_quantised_are_refused_still(tmp_path):
    net = Net(0)
    x = net("QuantizeLinear", net.x(), np.float32(0.1), np.uint8(3))
    x = net("DequantizeLinear", x, np.float32(0.1), np.uint8(3))
    onnx.save(net.build(net.linear(x, WIDTH, HIDDEN)), tmp_path / "model.onnx")
    with pytest.raises(QuantisedModel, match="DequantizeLinear, QuantizeLinear"):
        load(tmp_path / "model.onnx")


def test_an_untouched_model_has_no_notes():
    assert from_proto(layer("bsd,df->bsf")).notes == ()


# Weights that are taken apart at run time


def sliced(axis, *, wrong=False):
    """An MLP whose weight is a part of a packed one, as wide as an axis of the input."""
    net = Net(0)
    net.x()
    packed = net.const(net.random(3 * WIDTH, HIDDEN))
    size = net("Gather", net("Shape", "x"), [axis])
    start, end = (net("Mul", size, [times]) for times in ((2, 3) if wrong else (1, 2)))
    weight = net("Transpose", net("Slice", packed, start, end, [0]), perm=[1, 0])
    product = net("MatMul", net("Relu", net.linear("x", WIDTH, HIDDEN)), weight)
    return net.build(product)


def test_a_weight_that_is_cut_by_a_fixed_width_is_a_weight():
    model = check(lambda wrong=False: sliced(2, wrong=wrong), gone="Slice")
    assert widths_of(model) == [("mlp", HIDDEN, ("mlp",))]


def test_a_weight_that_is_cut_by_the_number_of_tokens_is_left():
    check_left(sliced(1), "Slice")


def test_what_is_another_name_of_a_constant_is_that_constant():
    """Exporters store equal vectors once, and name the others by Identity."""
    net = Net(0)
    y = net("Gemm", net.x("batch", WIDTH), net.weight(WIDTH, HIDDEN), net.random(HIDDEN))
    ones = net.const(np.ones(HIDDEN))
    gamma, variance = net("Identity", ones), net("Identity", net("Identity", ones))
    y = net("BatchNormalization", y, gamma, net.random(HIDDEN), net.random(HIDDEN), variance)
    proto = net.build(net.linear(relu(net, y), HIDDEN, WIDTH))
    model = from_proto(proto)
    assert ops(model) == {"Gemm", "Relu", "MatMul", "Add"}
    assert widths_of(model) == [("mlp", HIDDEN, ("mlp",))]
    assert farthest(model, proto) < BOUND


def test_a_constant_that_the_caller_sees_keeps_its_name():
    net = Net(0)
    shown = net("Identity", net.const(np.ones(WIDTH)))
    proto = net.build(net("Add", net.x(), shown), shown)
    model = from_proto(proto)
    assert [tensor.name for tensor in model.graph.outputs][1] == shown
    assert farthest(model, proto) < BOUND
