"""Attention operators of ONNX Runtime: un-fused where they can be, refused with a reason else.

Four query heads share two key heads of 32 channels: the kernel of grouped attention takes heads
of eights only, and rotates sixteens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from corp_onnx.blocks import Attention, Mlp, axes_of, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.graph.macs import count
from corp_onnx.graph.model import from_proto
from corp_onnx.graph.operators import MICROSOFT
from corp_onnx.graph.shapes import evaluate
from corp_onnx.plan import uniform
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from tests.builders import HIDDEN, WIDTH, Net, feeds, mlp, relu
from tests.full_width import narrowed, padded, run, squared_error, unchanged
from tests.tolerances import distance, rounding

HEADS, KV_HEADS, HEAD = 4, 2, 32
WIDE, NARROW = HEADS * HEAD, KV_HEADS * HEAD
SIZES = ((1, 3), (2, 5), (3, 8))
BOUND = rounding(width=256, dtype=np.float32)
"""Sums here have at most 128 terms, and pass through a rotation and a Softmax."""

SQUARED = 1e-10
"""As in ``test_surgery``: rounding in float32 of a few hundred terms, squared."""


def lengths(net):
    """The last token that counts of every sample, and how many there are at most."""
    seen = net.input("seen", "batch", "tokens", dtype=np.int32)
    ends = net("Sub", net("ReduceSum", seen, [1], keepdims=0), np.int32(1))
    most = net("Cast", net("Gather", net("Shape", "x"), np.int64(1)), to=TensorProto.INT32)
    return ends, most


def tables(net, half=HEAD // 2):
    angles = net.rng.uniform(0, 3, (32, half))
    return net.const(np.cos(angles)), net.const(np.sin(angles))


def grouped(*, packed=False, heads=(HEADS, KV_HEADS), rotary=0, places=False, added=False,
            empty=False, wrong=False, bias=True, **attrs):  # fmt: skip
    """An attention of grouped heads with its projections outside, and an output layer."""
    net = Net(0)
    net.x()
    outer, inner = heads
    sizes = [outer * HEAD, inner * HEAD, inner * HEAD]
    if packed:
        operands = [net.linear("x", WIDTH, sum(sizes), bias=bias), "", ""]
    else:
        operands = [net.linear("x", WIDTH, size, bias=bias) for size in sizes]
    cache = [np.zeros((2, inner, 0, HEAD))] * 2 if empty else ["", ""]
    inputs = [*operands, *cache, *lengths(net)]
    if rotary or places or added:
        inputs += tables(net, rotary) if rotary else ("", "")
    if places or added:
        inputs.append(net.input("ids", "batch", "tokens", dtype=np.int64) if places else "")
    if added:
        tokens = net("Shape", "x", start=1, end=2)
        target = net("Concat", [1, outer], tokens, tokens, axis=0)
        inputs.append(net("Mul", net("Expand", 1.0, target), net("ReduceSum", "x", keepdims=0)))
    if wrong:
        attrs["scale"] = 0.9 * attrs.get("scale", 1 / np.sqrt(HEAD))
    if rotary:
        attrs["do_rotary"] = 1
    mixed = net("GroupQueryAttention", *inputs, domain=MICROSOFT, num_heads=outer,
                kv_num_heads=inner, **attrs)  # fmt: skip
    return net.build(typed(net, net.linear(mixed, outer * HEAD, WIDTH)))


def typed(net, y):
    """A tensor whose type and shape are known, whatever made it."""
    return net("Add", y, net("Mul", "x", 0.0))


FORMS = [
    {},
    {"packed": True},
    {"packed": True, "bias": False},
    {"heads": (HEADS, HEADS)},
    {"heads": (HEADS, 1)},
    {"scale": 0.3},
    {"causal": 0},
    {"added": True},
    {"rotary": HEAD // 2},
    {"rotary": HEAD // 2, "packed": True, "rotary_interleaved": 1},
    {"rotary": HEAD // 4},
    {"rotary": HEAD // 2, "places": True},
    {"local_window_size": -1, "softcap": 0.0},
]


def farthest(model, proto):
    found = []
    for seed, size in enumerate(SIZES):
        given = feeds(proto, *size, seed)
        (before,), (after,) = run(proto, given), run(model, given)
        found += [distance(after[name], before[name]) for name in before]
    return max(found)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_grouped_attention_without_a_cache_is_written_out(form):
    """Padded keys are hidden from all, and padded queries see what they saw."""
    proto = grouped(**form)
    model = from_proto(proto)
    ops = {node.op for node in model.graph.nodes}
    assert "GroupQueryAttention" not in ops
    assert "MultiHeadAttention" in ops
    assert ("RotaryEmbedding" in ops) == ("rotary" in form)
    assert farthest(model, proto) < BOUND
    assert farthest(model, grouped(**form, wrong=True)) > 100 * BOUND


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_grouped_attention_without_a_cache_is_cut(form):
    proto = grouped(**form)
    model = from_proto(proto)
    (block,) = find_blocks(model).blocks
    outer, inner = form.get("heads", (HEADS, KV_HEADS))
    assert (block.heads, block.kv_heads, block.value_width) == (outer, inner, HEAD)
    assert axes_of(block) == (("vo",) if "rotary" in form else ("qk", "vo"))
    if "rotary" in form:
        assert "is rotated by its position (rotary embedding)" in block.refused["qk"]
    exact(model, proto)


def exact(model, proto):
    """Full width gives back what was, and half of it what zeros would."""
    catalog = find_blocks(model)
    given = [feeds(proto, *size) for size in SIZES]
    before = run(model, *given)
    full = turned(model, catalog)
    for solution in (unchanged(model, catalog), full):
        for pair in zip(run(operate(model, catalog, solution).model, *given), before, strict=True):
            assert squared_error(*pair) < SQUARED
    small = operate(model, catalog, narrowed(full, 0.5)).model
    large = operate(model, catalog, padded(full, 0.5)).model
    results = run(small, *given)
    for pair in zip(results, run(large, *given), strict=True):
        assert squared_error(*pair) < SQUARED
    for pair in zip(results, before, strict=True):
        assert squared_error(*pair) > 1e-6


def test_a_cache_of_no_tokens_is_none():
    proto = grouped(empty=True)
    model = from_proto(proto)
    assert "GroupQueryAttention" not in {node.op for node in model.graph.nodes}
    given = feeds(proto, 2, 5)
    (before,), (after,) = run(proto, given), run(model, given)
    (name,) = before
    assert distance(after[name], before[name]) < BOUND


def shared(counted):
    """Two layers of one model."""
    net = Net(0)
    y = net.x()
    given = lengths(net)
    for _ in range(counted):
        parts = [net.linear(y, WIDTH, size) for size in (WIDE, NARROW, NARROW)]
        mixed = net("GroupQueryAttention", *parts, "", "", *given, domain=MICROSOFT,
                    num_heads=HEADS, kv_num_heads=KV_HEADS)  # fmt: skip
        y = net("Add", y, net.linear(mixed, WIDE, WIDTH))
    return net.build(typed(net, y))


def test_lengths_become_rows_once_for_all_layers():
    proto = shared(2)
    model = from_proto(proto)
    assert [node.op for node in model.graph.nodes].count("Range") == 1
    assert farthest(model, proto) < BOUND


# Refused as they are


def reasons_of(net, *outputs):
    """Reasons by node of a fused operator, in a model that also holds an MLP beside it."""
    y = mlp(net, "x", relu)
    proto = net.build(typed(net, y))
    for name in outputs:
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    catalog = find_blocks(from_proto(proto))
    assert [type(block) for block in catalog.blocks] == [Mlp]
    return {item.op: item.reason for item in catalog.refusals}


@pytest.mark.parametrize(
    ("attrs", "reason"),
    [
        ({"softcap": 3.0}, "its logits are capped (softcap)"),
        ({"local_window_size": 4}, "it looks at a window of tokens"),
        ({"smooth_softmax": 1}, "its Softmax has one more entry"),
    ],
)
def test_grouped_attention_that_does_more_is_refused(attrs, reason):
    net = Net(0)
    net.x()
    parts = [net.linear("x", WIDTH, size) for size in (WIDE, NARROW, NARROW)]
    mixed = net("GroupQueryAttention", *parts, "", "", *lengths(net), domain=MICROSOFT,
                num_heads=HEADS, kv_num_heads=KV_HEADS, **attrs)  # fmt: skip
    said = reasons_of(net, mixed)["GroupQueryAttention"]
    assert reason in said
    assert said.endswith("prune the model before attention is fused")


def test_grouped_attention_with_norms_inside_is_refused():
    net = Net(0)
    net.x()
    parts = [net.linear("x", WIDTH, size) for size in (WIDE, NARROW, NARROW)]
    norms = [""] * 7 + [net.random(HEAD), net.random(HEAD)]
    mixed = net("GroupQueryAttention", *parts, "", "", *lengths(net), *norms, domain=MICROSOFT,
                num_heads=HEADS, kv_num_heads=KV_HEADS)  # fmt: skip
    assert "not read in this form" in reasons_of(net, mixed)["GroupQueryAttention"]


@pytest.mark.parametrize("side", ["past", "present"])
def test_grouped_attention_with_a_cache_is_refused(side):
    net = Net(0)
    net.x()
    parts = [net.linear("x", WIDTH, size) for size in (WIDE, NARROW, NARROW)]
    cache = ["", ""]
    if side == "past":
        cache = [net.input(n, "batch", KV_HEADS, "others", HEAD) for n in ("past_k", "past_v")]
    made = net("GroupQueryAttention", *parts, *cache, *lengths(net), outputs=3,
               domain=MICROSOFT, num_heads=HEADS, kv_num_heads=KV_HEADS)  # fmt: skip
    said = reasons_of(net, *(made if side == "present" else made[:1]))["GroupQueryAttention"]
    assert said.startswith("keys or values are kept in a cache (graph input or output)")


def packed_tokens(net):
    rows = net("Reshape", net.linear("x", WIDTH, 3 * WIDE), [-1, 3 * WIDE])
    parts = net("Split", rows, [WIDE] * 3, outputs=3, axis=1)
    offsets = net.input("offsets", "batch", "tokens", dtype=np.int32)
    return net("PackedMultiHeadAttention", *parts, "", offsets, "seen", domain=MICROSOFT,
               num_heads=HEADS)  # fmt: skip


def packed_projections(net):
    rows = net("Reshape", "x", [-1, WIDTH])
    offsets = net.input("offsets", "batch", "tokens", dtype=np.int32)
    return net("PackedAttention", rows, net.weight(WIDTH, 3 * WIDE), net.random(3 * WIDE), offsets,
               "seen", domain=MICROSOFT, num_heads=HEADS)  # fmt: skip


def one_step(net):
    parts = [net.linear("x", WIDTH, WIDE) for _ in range(3)]
    return net("DecoderMaskedMultiHeadAttention", *parts, domain=MICROSOFT, num_heads=HEADS)


def long_windows(net):
    layers = [net.weight(WIDTH, 3 * WIDTH), net.random(3 * WIDTH)]
    masks = [net("Cast", "seen", to=TensorProto.FLOAT)], ["seen"]
    return net("LongformerAttention", "x", *layers, *masks[0], *layers, *masks[1],
               domain=MICROSOFT, num_heads=2, window=4)  # fmt: skip


def with_rotation_inside(net):
    return net("Attention", "x", net.weight(WIDTH, 3 * WIDE), net.random(3 * WIDE),
               domain=MICROSOFT, num_heads=HEADS, do_rotary=1)  # fmt: skip


def past_inside(net):
    past = net.input("past", 2, "batch", HEADS, "others", HEAD)
    return net("Attention", "x", net.weight(WIDTH, 3 * WIDE), net.random(3 * WIDE), "", past,
               domain=MICROSOFT, num_heads=HEADS, unidirectional=1)  # fmt: skip


def past_outside(net):
    parts = [net.linear("x", WIDTH, WIDE) for _ in range(3)]
    past = [net.input(n, "batch", HEADS, "others", HEAD) for n in ("past_k", "past_v")]
    return net("MultiHeadAttention", *parts, "", "", "", *past, outputs=3, domain=MICROSOFT,
               num_heads=HEADS)[0]  # fmt: skip


def unknown(net):
    return net("NovelAttention", "x", net.weight(WIDTH, WIDE), domain=MICROSOFT)


REFUSED: dict[Callable[[Net], str], tuple[str, str]] = {
    packed_tokens: ("PackedMultiHeadAttention", "tokens packed without their padding"),
    packed_projections: ("PackedAttention", "tokens packed without their padding"),
    one_step: ("DecoderMaskedMultiHeadAttention", "are kept in a cache"),
    long_windows: ("LongformerAttention", "a fused operator that is not read in this form"),
    with_rotation_inside: ("Attention", "it rotates queries and keys by their position"),
    past_inside: ("Attention", "are kept in a cache"),
    past_outside: ("MultiHeadAttention", "are kept in a cache"),
    unknown: ("NovelAttention", "a fused operator that is not read in this form"),
}


@pytest.mark.parametrize("make", REFUSED)
def test_other_fused_attention_is_refused_and_harms_nobody_else(make):
    op, reason = REFUSED[make]
    net = Net(0)
    net.x()
    net.input("seen", "batch", "tokens", dtype=np.int32)
    y = make(net)
    assert reason in reasons_of(net, y)[op]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (packed_tokens, (10, WIDE)),
        (packed_projections, (10, WIDE)),
        (one_step, (2, 5, WIDE)),
        (long_windows, (2, 5, WIDTH)),
        (past_outside, (2, 5, WIDE)),
    ],
)
def test_shapes_behind_it_are_known(make, shape):
    net = Net(0)
    net.x()
    net.input("seen", "batch", "tokens", dtype=np.int32)
    y = make(net)
    proto = net.build(typed(net, mlp(net, "x", relu)))
    sizes = {name: value.shape for name, value in feeds(proto, 2, 5).items()}
    assert evaluate(gs.import_onnx(proto), sizes).shapes[y] == shape


@pytest.mark.parametrize(
    ("op", "shapes", "attrs"),
    [
        ("MoE", [(4, WIDTH), (4, WIDTH, HIDDEN)], {}),
        ("MatMulBnb4", [(WIDTH, HIDDEN)], {"N": WIDTH, "K": WIDTH}),
    ],
)
def test_weights_inside_an_operator_are_mentioned(op, shapes, attrs):
    net = Net(0)
    net.x()
    y = net(op, "x", *(net.random(*shape) for shape in shapes), domain=MICROSOFT, **attrs)
    assert reasons_of(net, y)[op].startswith("it holds weights inside and is not read")


def test_tables_inside_an_operator_are_not():
    net = Net(0)
    ids = net.input("ids", "batch", "tokens", dtype=np.int64)
    x = net.input("x", "batch", "tokens", WIDTH)
    stored = net.const(net.rng.integers(0, 256, (8, WIDTH // 2)).astype(np.uint8))
    looked = net("GatherBlockQuantized", stored, ids, net.random(8, 1), domain=MICROSOFT,
                 block_size=16)  # fmt: skip
    y = mlp(net, net("Add", looked, x), relu)
    catalog = find_blocks(from_proto(net.build(typed(net, y))))
    assert [type(block) for block in catalog.blocks] == [Mlp]
    assert catalog.refusals == ()


# Convolutions in the layout of one kind of processor


def in_blocks(kernel):
    """Patches by a convolution of blocked layout, then an MLP; the weight has two channels more."""
    net = Net(0)
    pixels = net.x("batch", 3, 4 * kernel, 4 * kernel)
    attrs = {"domain": f"{MICROSOFT}.nchwc", "kernel_shape": [kernel] * 2, "strides": [kernel] * 2}
    if kernel == 1:
        pixels = net("ReorderInput", pixels, domain=attrs["domain"])
    weight, bias = net.random(WIDTH + 2, 3, kernel, kernel), net.random(WIDTH + 2)
    y = net("Conv", pixels, weight, bias, activation="Relu", **attrs)
    y = net("MaxPool", y, domain=attrs["domain"], kernel_shape=[1, 1])
    y = net("ReorderOutput", y, domain=attrs["domain"], channels=WIDTH)
    tokens = net("Transpose", net("Reshape", y, [0, 0, -1]), perm=[0, 2, 1])
    proto = net.build(mlp(net, tokens, relu))
    shape = ["batch", 16, WIDTH]
    (shown,) = proto.graph.output
    shown.CopyFrom(helper.make_tensor_value_info(shown.name, TensorProto.FLOAT, shape))
    return proto, y


@pytest.mark.parametrize("kernel", [1, 4])
def test_blocks_behind_a_convolution_of_blocked_layout_are_found(kernel):
    proto, y = in_blocks(kernel)
    model = from_proto(proto)
    facts = evaluate(model.graph, {"x": (2, 3, 4 * kernel, 4 * kernel)})
    assert facts.shapes[y] == (2, WIDTH, 4, 4)
    catalog = find_blocks(model)
    assert [block.width for block in catalog.blocks] == [HIDDEN]
    said = [item.reason for item in catalog.refusals if item.op == "Conv"]
    assert len(said) == (kernel == 1)
    assert all("laid out in blocks for one kind of processor (nchwc)" in text for text in said)


def test_a_layer_of_blocked_layout_is_no_linear_layer():
    """Its weight is not what its shape says; two of them are no MLP."""
    net = Net(0)
    y = net.x("batch", 16, 4, 4)
    for _ in range(2):
        y = net("Conv", y, net.random(16, 16, 1, 1), domain=f"{MICROSOFT}.nchwc")
    plain = net("Conv", "x", net.random(16, 16, 1, 1))
    proto = net.build(net("Conv", net("Add", plain, y), net.random(16, 16, 1, 1)))
    assert not find_blocks(from_proto(proto)).blocks


# Operands packed in one tensor of five axes


def five_axes(kind, *, by_hand=False, mask=False):
    """``MultiHeadAttention`` on ``[b, t, h, 3, e]`` or ``[b, t, h, 2, e]``, or on its parts."""
    net = Net(0)
    net.x()
    heads, size, count = 2, 6, {"qkv": 3, "kv": 2}[kind]
    whole = net("Reshape", net.linear("x", WIDTH, count * 12), [0, 0, heads, count, size])
    before = [net.linear("x", WIDTH, 12)] if kind == "kv" else []
    operands = [*before, whole, *[""] * (2 - len(before))]
    if by_hand:
        parts = [net("Gather", whole, np.int64(place), axis=3) for place in range(count)]
        operands = [*before, *(net("Reshape", part, [0, 0, 12]) for part in parts)]
    if mask:
        seen = net.input("seen", "batch", "tokens", dtype=np.int32)
        operands += ["", net("ReduceSum", seen, [1], keepdims=0)]
    mixed = net("MultiHeadAttention", *operands, domain=MICROSOFT, num_heads=heads)
    return net.build(typed(net, net.linear(mixed, 12, WIDTH)))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", ["qkv", "kv"])
def test_operands_of_five_axes_are_taken_apart(kind, mask):
    """No kernel on a CPU computes them, so they are held against the same by hand."""
    proto, plain = (five_axes(kind, by_hand=hand, mask=mask) for hand in (False, True))
    model = from_proto(proto)
    (block,) = find_blocks(model).blocks
    assert isinstance(block, Attention)
    assert (axes_of(block), block.heads, block.head_width) == (("qk", "vo"), 2, 6)
    given = feeds(plain, 3, 5)
    (before,), (after,) = run(plain, given), run(model, given)
    pairs = list(zip(before.values(), after.values(), strict=True))
    assert max(distance(one, other) for one, other in pairs) < BOUND
    exact(model, plain)


# Products with an activation inside


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_with_fast_gelu(bias):
    """No kernel on a CPU computes it; FastGelu, which it becomes, is one of them."""
    net = Net(0)
    inputs = [net.x(), net.weight(WIDTH, HIDDEN), *([net.random(HIDDEN)] if bias else [])]
    y = net("GemmFastGelu", *inputs, domain=MICROSOFT)
    model = from_proto(net.build(typed(net, net.linear(y, HIDDEN, WIDTH))))
    (block,) = find_blocks(model).blocks
    assert block.width == HIDDEN
    weight, vector = (numpy_helper.to_array(net.tensors[place]) for place in (0, 1))
    x = feeds(model.proto(), 2, 3)["x"]
    z = x @ weight + (vector if bias else 0)
    expected = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    shown = from_proto(model.proto())
    shown.graph.outputs = [shown.graph.tensors()[y]]
    ((found,),) = (result.values() for result in run(shown, {"x": x}))
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "Softsign"])
def test_a_product_with_an_activation(activation):
    net = Net(0)
    attrs = {"activation_alpha": 0.3} if activation == "LeakyRelu" else {}
    y = net("FusedMatMulActivation", net.x(), net.weight(HIDDEN, WIDTH), domain=MICROSOFT,
            transB=1, alpha=0.5, activation=activation, **attrs)  # fmt: skip
    model = from_proto(net.build(typed(net, net.linear(y, HIDDEN, WIDTH))))
    found = find_blocks(model)
    if activation == "Softsign":
        assert {item.op for item in found.refusals} >= {"FusedMatMulActivation"}
        return
    assert [block.width for block in found.blocks] == [HIDDEN]
    weight = numpy_helper.to_array(net.tensors[0])
    x = feeds(model.proto(), 2, 3)["x"]
    z = 0.5 * x @ weight.T
    expected = np.maximum(z, 0) if activation == "Relu" else np.where(z < 0, 0.3 * z, z)
    model.graph.outputs = [model.graph.tensors()[y]]
    ((made,),) = (result.values() for result in run(model, {"x": x}))
    assert distance(made, expected) < BOUND


# A decoder as it is written for generating text


def decoder(*, packed=True, layers=2):
    """Rotations and caches inside grouped attention, norms of ONNX Runtime, gated MLPs."""
    net = Net(0)
    ids = net.input("ids", "batch", "tokens", dtype=np.int64)
    mask = net.input("mask", "batch", "all", dtype=np.int64)
    x = net("Gather", net.random(8, WIDTH, gain=1), ids)
    total = net("Cast", net("ReduceSum", mask, [1], keepdims=0), to=TensorProto.INT32)
    ends = net("Sub", total, np.int32(1))
    most = net("Cast", net("Gather", net("Shape", mask), np.int64(1)), to=TensorProto.INT32)
    angles, shown = tables(net), []
    y = net("SimplifiedLayerNormalization", x, net.random(WIDTH) + 1, axis=-1)
    for layer in range(layers):
        past = [
            net.input(f"past.{layer}.{role}", "batch", KV_HEADS, "before", HEAD)
            for role in ("key", "value")
        ]
        operands = [net.linear(y, WIDTH, WIDE + 2 * NARROW, bias=False), "", ""]
        if not packed:
            operands = [net.linear(y, WIDTH, size, bias=False) for size in (WIDE, NARROW, NARROW)]
        mixed, *present = net("GroupQueryAttention", *operands, *past, ends, most, *angles,
                              outputs=3, domain=MICROSOFT, num_heads=HEADS,
                              kv_num_heads=KV_HEADS, do_rotary=1)  # fmt: skip
        shown += present
        y, _, _, x = net("SkipSimplifiedLayerNormalization", x, net.linear(mixed, WIDE, WIDTH),
                         net.random(WIDTH) + 1, outputs=4, domain=MICROSOFT)  # fmt: skip
        net.nodes[-1].output[1:3] = ["", ""]
        gate, up = (net.linear(y, WIDTH, HIDDEN, bias=False) for _ in range(2))
        hidden = net("Mul", net("Mul", gate, net("Sigmoid", gate)), up)
        down = net.linear(hidden, HIDDEN, WIDTH, bias=False)
        y, _, _, x = net("SkipSimplifiedLayerNormalization", x, down, net.random(WIDTH) + 1,
                         outputs=4, domain=MICROSOFT)  # fmt: skip
        net.nodes[-1].output[1:3] = ["", ""]
    proto = net.build(net.linear(y, WIDTH, 8, bias=False), *shown)
    for value in proto.graph.output:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
        shape = ["batch", KV_HEADS, "all", HEAD] if value.name in shown else ["batch", "tokens", 8]
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    return proto


def step(proto, batch, before, tokens, seed=0):
    """One call of a decoder."""
    rng = np.random.default_rng(seed)
    made = {
        "ids": rng.integers(0, 8, (batch, tokens)),
        "mask": np.ones((batch, before + tokens), np.int64),
    }
    shape = (batch, KV_HEADS, before, HEAD)
    names = [value.name for value in proto.graph.input if value.name.startswith("past")]
    return made | {name: rng.standard_normal(shape).astype(np.float32) for name in names}


@pytest.mark.parametrize("packed", [True, False])
def test_mlps_of_a_decoder_with_a_cache_are_cut(packed):
    proto = decoder(packed=packed)
    model = from_proto(proto)
    catalog = find_blocks(model)
    assert [(type(b), b.width, axes_of(b)) for b in catalog.blocks] == [(Mlp, HIDDEN, ("mlp",))] * 2
    said = [item.reason for item in catalog.refusals if item.op == "GroupQueryAttention"]
    assert len(said) == 2
    assert all(reason.startswith("keys or values are kept in a cache") for reason in said)
    given = [step(proto, 1, 0, 5), step(proto, 2, 0, 7), step(proto, 2, 6, 1)]
    made = operate(model, catalog, turned(model, catalog)).model
    for pair in zip(run(made, *given), run(proto, *given), strict=True):
        assert squared_error(*pair) < SQUARED
    wrong = operate(model, catalog, narrowed(turned(model, catalog), 0.5)).model
    assert squared_error(run(wrong, given[0])[0], run(proto, given[0])[0]) > 1e-6


def test_mlps_of_a_decoder_whose_weights_have_four_bits_are_cut():
    """As such decoders are mostly shipped: a cache, rotations inside, MatMulNBits throughout."""
    quantiser = MatMulNBitsQuantizer(decoder(), block_size=16, is_symmetric=True)
    quantiser.process()
    proto = quantiser.model.model
    model = from_proto(proto)
    catalog = find_blocks(model)
    assert [(type(b), b.width) for b in catalog.blocks] == [(Mlp, HIDDEN)] * 2
    given = [step(proto, 1, 0, 5), step(proto, 2, 6, 1)]
    made = operate(model, catalog, turned(model, catalog)).model
    for pair in zip(run(made, *given), run(proto, *given), strict=True):
        assert squared_error(*pair) < SQUARED
    ops = [node.op for node in made.graph.nodes]
    assert (ops.count("MatMulNBits"), ops.count("MatMul")) == (5, 6)


def test_a_decoder_with_a_cache_is_solved_and_counted():
    proto = decoder()
    model = from_proto(proto)
    catalog = find_blocks(model)
    statistics = gather(model, catalog, [step(proto, 4, 0, 9, seed) for seed in range(4)])
    plan = uniform(catalog, {"mlp": 0.5}, align=1)
    small = operate(model, catalog, solve(model, catalog, plan, statistics, Recipe("corp"))).model
    assert [block.width for block in find_blocks(small).blocks] == [HIDDEN // 2] * 2
    sizes = {name: value.shape for name, value in step(proto, 1, 3, 5).items()}
    counts = count(model.graph, evaluate(model.graph, sizes))
    assert counts.uncounted == ()
    attention = 5 * 8 * 2 * WIDE
    layers = 5 * WIDTH * (2 * WIDE + 2 * NARROW + 3 * HIDDEN)
    assert counts.total == 2 * (attention + layers) + 5 * WIDTH * 8
