"""Weights of MatMulNBits are what ONNX Runtime multiplies with, and become plain where cut."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    QuantFormat,
)

from corp_onnx.blocks import Mlp, axes_of, find_blocks
from corp_onnx.blocks.catalog import view_of
from corp_onnx.blocks.linear import bias_of
from corp_onnx.graph import nbits
from corp_onnx.graph.macs import count
from corp_onnx.graph.model import from_proto, load
from corp_onnx.graph.operators import MICROSOFT
from corp_onnx.graph.shapes import evaluate
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from corp_onnx.verify.confirm import confirmed
from tests.builders import WIDTH, Net, feeds, merge_heads, mix, relu, residual_block, separate
from tests.full_width import narrowed, padded, run, squared_error, unchanged
from tests.tolerances import distance, rounding

ROWS, COLUMNS = 40, 24
BOUND = 1e-10
"""As in ``test_surgery``: rounding in float32 of a few hundred terms."""


def packed_layer(net, x, rows, columns, *, bits=4, block=16, zeros=None, order=False, bias=False):
    """A product with a random weight of a few bits; ``zeros`` is None, "packed" or "plain"."""
    blocks = -(-rows // block)
    stored = net.rng.integers(0, 256, (columns, blocks, block * bits // 8)).astype(np.uint8)
    scales = net.rng.uniform(0.5, 1, (columns, blocks)) / (2**bits * np.sqrt(rows) / 4)
    points = {
        None: "",
        "packed": net.rng.integers(0, 256, (columns, -(-blocks * bits // 8))).astype(np.uint8),
        "plain": net.rng.uniform(0, 2**bits, (columns, blocks)),
    }[zeros]
    groups = net.rng.permutation(np.arange(blocks * block) // block).astype(np.int32)
    inputs = [x, stored, scales, points, groups if order else "", net.random(columns)]
    if not bias:
        inputs = inputs[: 5 if order else 4 if zeros else 3]
    return net("MatMulNBits", *inputs, domain=MICROSOFT, K=rows, N=columns, bits=bits,
               block_size=block)  # fmt: skip


FORMS = [
    {},
    {"bits": 8},
    {"bits": 2},
    {"block": 32, "zeros": "packed"},
    {"bits": 8, "zeros": "packed"},
    {"bits": 2, "zeros": "packed", "block": 32},
    {"zeros": "plain"},
    {"bits": 2, "zeros": "plain"},
    {"bias": True},
    {"zeros": "packed", "bias": True},
    {"order": True},
    {"order": True, "zeros": "plain", "bias": True},
]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_weight_is_the_one_that_is_multiplied(form, dtype):
    """What ONNX Runtime makes of an identity matrix."""
    net = Net(0, dtype=dtype)
    y = packed_layer(net, net.x("batch", ROWS), ROWS, COLUMNS, **form)
    proto = net.build(y)
    model = from_proto(proto)
    (node,) = model.graph.nodes
    ((made,),) = (result.values() for result in run(proto, {"x": np.eye(ROWS, dtype=dtype)}))
    bias = bias_of({node.name: node}, view_of(model)[0].linears[y], 18)
    expected = nbits.weight_of(node) + bias
    bound = rounding(width=8, dtype=dtype)  # few roundings: the product has one term, and a bias
    assert distance(made.astype(np.float64), expected) < bound
    node.inputs[2].values = np.roll(node.inputs[2].values, 1, axis=0)
    assert distance(made.astype(np.float64), nbits.weight_of(node) + bias) > 4 * bound


def small_mlp(*, third=True, **form):
    """An MLP of packed layers, and another that is left as it is."""
    net = Net(0)
    x = net.x("batch", "tokens", ROWS)
    hidden = packed_layer(net, x, ROWS, 64, **form)
    if not form.get("bias"):
        hidden = net("Add", hidden, net.random(64))
    y = packed_layer(net, relu(net, hidden), 64, ROWS, **form)
    if third:
        y = net("Add", net("Softplus", y), packed_layer(net, x, ROWS, ROWS, **form))
    return net.build(y)


def plainly(model, *given):
    """Outputs without optimisations: these round activations too, behind DequantizeLinear."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = model if isinstance(model, onnx.ModelProto) else model.proto()
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    return [dict(zip(names, session.run(names, one), strict=True)) for one in given]


def check(model, proto, computed=run):
    catalog = find_blocks(model)
    given = [feeds(proto, *size) for size in ((1, 5), (3, 7))]
    assert [b.refused for b in confirmed(model, catalog, given).blocks] == [
        b.refused for b in catalog.blocks
    ]
    before = computed(proto, *given)
    full = turned(model, catalog)
    for solution in (unchanged(model, catalog), full):
        made = operate(model, catalog, solution).model
        for pair in zip(computed(made, *given), before, strict=True):
            assert squared_error(*pair) < BOUND
    small = operate(model, catalog, narrowed(full, 0.5)).model
    large = operate(model, catalog, padded(full, 0.5)).model
    for pair in zip(computed(small, *given), computed(large, *given), strict=True):
        assert squared_error(*pair) < BOUND
    for pair in zip(computed(small, *given), before, strict=True):
        assert squared_error(*pair) > 1e-6
    return small


@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_that_may_round_what_it_reads_is_confirmed(bits):
    """Of accuracy level 4, with activations in int8: what is written instead does not round."""
    proto = small_mlp(bits=bits, block=32)
    for node in proto.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))
    model = from_proto(proto)
    catalog = find_blocks(model)
    (block,) = confirmed(model, catalog, [feeds(proto, 3, 7)]).blocks
    assert axes_of(block) == ("mlp",)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_layers_that_are_cut_become_plain_and_others_stay(form):
    proto = small_mlp(**form)
    model = from_proto(proto)
    (block,) = find_blocks(model).blocks
    assert isinstance(block, Mlp)
    assert block.width == 64
    small = check(model, proto)
    ops = [node.op for node in small.graph.nodes]
    assert (ops.count("MatMulNBits"), ops.count("MatMul")) == (1, 2)
    assert {n.domain for n in small.graph.nodes if n.op == "MatMul"} == {None}


def test_the_answer_says_how_weights_are_stored():
    model = from_proto(small_mlp(bits=8))
    assert model.notes[0].startswith("weights are stored as int8 (MatMulNBits); those of layers")


def test_parameters_and_products_are_counted():
    made = from_proto(small_mlp(third=False)).graph
    counts = count(made, evaluate(made, {"x": (1, 5, ROWS)}))
    assert counts.total == 2 * 5 * ROWS * 64
    assert counts.params == 2 * ROWS * 64 + 64


@pytest.mark.parametrize(
    ("form", "bits", "symmetric"),
    [
        ("QOperator", 4, True),
        ("QOperator", 4, False),
        ("QOperator", 8, True),
        ("QDQ", 4, True),
        ("QDQ", 4, False),
    ],
)
def test_what_the_quantiser_writes(form, bits, symmetric, tmp_path):
    """A transformer after ONNX Runtime's own quantiser, as operators and as DequantizeLinear."""
    net = Net(0, opset=21)
    config = DefaultWeightOnlyQuantConfig(
        block_size=16, is_symmetric=symmetric, bits=bits, quant_format=QuantFormat[form]
    )
    proto = net.build(residual_block(net, net.x()))
    quantiser = MatMulNBitsQuantizer(proto, algo_config=config)
    quantiser.process()
    onnx.save(quantiser.model.model, tmp_path / "small.onnx")
    model = load(tmp_path / "small.onnx")
    ops = {node.op for node in model.graph.nodes}
    assert ("MatMulNBits" if form == "QOperator" else "DequantizeLinear") in ops
    found = [axes_of(block) for block in find_blocks(model).blocks]
    assert sorted(found) == [("mlp",), ("qk", "vo")]
    check(model, onnx.load(tmp_path / "small.onnx"), computed=plainly)


def test_packed_projections_of_an_attention():
    net = Net(0)
    net.x("batch", "tokens", ROWS)
    whole = packed_layer(net, "x", ROWS, 36, bias=True, zeros="packed")
    made = [net("Transpose", net("Reshape", part, [0, 0, 2, 6]), perm=[0, 2, 1, 3])
            for part in net("Split", whole, [12] * 3, outputs=3, axis=2)]  # fmt: skip
    rows = net("Reshape", net("Transpose", mix(net, *made), perm=[0, 2, 1, 3]), [0, 0, 12])
    proto = net.build(packed_layer(net, rows, 12, ROWS))
    model = from_proto(proto)
    (block,) = find_blocks(model).blocks
    assert axes_of(block) == ("qk", "vo")
    check(model, proto)


# Refusals


def test_a_packed_layer_outside_of_blocks_is_mentioned_once():
    net = Net(0)
    y = packed_layer(net, net.x("batch", "tokens", ROWS), ROWS, 64)
    z = packed_layer(net, relu(net, net("Add", y, net.random(64))), 64, ROWS)
    catalog = find_blocks(from_proto(net.build(z, y)))
    said = {item.node: item.reason for item in catalog.refusals}
    assert len(said) == len(catalog.refusals) == 2
    assert all("weights inside" not in reason for reason in said.values())


def reasons(net, y):
    catalog = find_blocks(from_proto(net.build(y)))
    return catalog, [item.reason for item in catalog.refusals if item.op == "MatMulNBits"]


def around(change, **form):
    """A plain attention, and a packed layer that a change makes unreadable."""
    net = Net(0)
    y = merge_heads(net, mix(net, *separate(net)))
    packed = packed_layer(net, "x", WIDTH, WIDTH, **form)
    change(net, net.nodes[-1])
    catalog, said = reasons(net, net("Add", y, packed))
    assert [axes_of(block) for block in catalog.blocks] == [("qk", "vo")]
    (reason,) = said
    return reason


def test_a_weight_that_is_computed_is_refused():
    def change(net, node):
        node.input[2] = net("Abs", node.input[2])
        net.nodes[-2:] = net.nodes[:-3:-1]

    assert around(change) == "its weight is computed at run time"


def test_a_weight_for_one_device_is_refused():
    def change(_, node):
        node.attribute.append(onnx.helper.make_attribute("weight_prepacked", 1))

    assert "packed for one kind of device" in around(change)


@pytest.mark.parametrize("form", [{"bits": 2}, {"zeros": "packed"}])
def test_blocks_out_of_order_that_are_not_read_are_refused(form):
    assert "(g_idx)" in around(lambda net, node: None, order=True, **form)


def test_a_bias_that_is_computed_is_refused():
    def change(net, node):
        node.input[5] = net("Abs", node.input[5])
        net.nodes[-2:] = net.nodes[:-3:-1]

    assert "which is no constant vector" in around(change, bias=True)


# Operators that ONNX Runtime has for types that came late


def dequantised(dtype, opset, *, wrong=False):
    net = Net(0, opset=opset)
    kind = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, dtype.upper()))
    values = net.rng.integers(0, 7, (WIDTH, 32)).astype(kind)
    net.tensors.append(numpy_helper.from_array(values, "stored"))
    scale = net.const(net.rng.uniform(0.05, 0.2, 32) * (1.1 if wrong else 1))
    weight = net("DequantizeLinear", "stored", scale, domain=MICROSOFT, axis=1)
    return net.build(net.linear(relu(net, net("MatMul", net.x(), weight)), 32, WIDTH))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int4"])
def test_a_weight_behind_the_other_dequantisation_is_read(dtype, tmp_path):
    proto = dequantised(dtype, 18)
    onnx.save(proto, tmp_path / "model.onnx")
    model = load(tmp_path / "model.onnx")
    assert f"weights are stored as {dtype}" in model.notes[0]
    (block,) = find_blocks(model).blocks
    assert block.width == 32
    check(model, proto)
    given = feeds(proto, 2, 5)
    (one,), (other,) = run(proto, given), run(dequantised(dtype, 18, wrong=True), given)
    assert squared_error(one, other) > 1e-6


def test_weights_that_are_rounded_in_the_graph_are_constants(tmp_path):
    """Fake quantisation of weights alone: both operators follow from constants."""
    net = Net(0)
    scale, zero = net.const(np.float32(0.05)), net.const(np.int8(3))
    rounded = net("QuantizeLinear", net.weight(WIDTH, 32), scale, zero)
    weight = net("DequantizeLinear", rounded, scale, zero)
    proto = net.build(net.linear(relu(net, net("MatMul", net.x(), weight)), 32, WIDTH))
    onnx.save(proto, tmp_path / "model.onnx")
    model = load(tmp_path / "model.onnx")
    (block,) = find_blocks(model).blocks
    assert block.width == 32
    check(model, proto)
