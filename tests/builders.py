"""Tiny models, each one way of writing an MLP or an attention, with seeded weights.

Sizes are all different, so that no axis can stand in for another: 10 channels, 14 hidden, 2 heads
of 6 (values of 4 where they differ). Batch and sequence are dynamic unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, HIDDEN, HEADS, HEAD, VALUE = 10, 14, 2, 6, 4
SHAPE = HIDDEN, WIDTH

Expected = tuple[str | int | tuple[str, ...], ...]
"""``("mlp", width)`` or ``("attention", heads, head width, value width, axes)``."""

MLP: Expected = ("mlp", HIDDEN)
ATTENTION: Expected = ("attention", HEADS, HEAD, HEAD, ("qk", "vo"))


@dataclass(frozen=True, slots=True, eq=False)
class Tiny:
    """A model and the blocks that are in it, in the order of the graph."""

    proto: onnx.ModelProto
    truth: tuple[Expected, ...]


Builder = Callable[[int], Tiny]


class Net:
    """A graph that grows node by node; weights come from one generator."""

    def __init__(self, seed: int, *, opset: int = 18, dtype: type = np.float32) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset, self.dtype = opset, np.dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def __call__(self, op, *inputs, outputs=1, domain="", **attrs):
        """Add a node; numbers, lists and arrays among its inputs become initializers."""
        names = [f"{op}_{len(self.nodes)}_{index}" for index in range(outputs)]
        sources = [value if isinstance(value, str) else self.const(value) for value in inputs]
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, sources, names, name, domain=domain, **attrs))
        return names[0] if outputs == 1 else names

    def input(self, name, *shape, dtype=None):
        code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype))
        self.inputs.append(helper.make_tensor_value_info(name, code, shape))
        return name

    def x(self, *shape):
        return self.input("x", *(shape or ("batch", "tokens", WIDTH)))

    def const(self, value):
        array = np.asarray(value)
        array = array.astype(self.dtype) if array.dtype.kind == "f" else array
        name = f"constant_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def random(self, *shape, gain=0.5):
        return self.rng.standard_normal(shape) * gain

    def weight(self, rows, columns, gain=1.5):
        return self.const(self.random(rows, columns, gain=gain / np.sqrt(rows)))

    def linear(self, x, rows, columns, *, bias=True):
        y = self("MatMul", x, self.weight(rows, columns))
        return self("Add", y, self.random(columns)) if bias else y

    def build(self, *outputs: str) -> onnx.ModelProto:
        """The model; types of outputs are inferred, and nothing is said of other tensors."""
        values = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, values, self.tensors)
        domains = {"": self.opset} | {node.domain: 1 for node in self.nodes if node.domain}
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(name, version) for name, version in domains.items()],
            producer_name="tiny",
            producer_version="1.0",
            ir_version=10,
        )
        helper.set_model_props(model, {"licence": "none"})
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        for value, known in zip(model.graph.output, inferred.graph.output, strict=True):
            value.CopyFrom(known)
        return model


def feeds(model: onnx.ModelProto, batch: int, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs by name; the last two tokens of the first sample are padding."""
    rng = np.random.default_rng(seed)
    made = {}
    sizes = {"batch": batch, "tokens": tokens, "others": tokens + 2}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in dims]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        made[value.name] = _feed(value.name, shape, rng).astype(dtype)
    return made


def _feed(name: str, shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    seen = np.ones(shape, dtype=bool)
    seen[0, ..., -2:] = False
    special = {
        "added": lambda: np.where(seen, 0.0, -1e4),
        "keeps": lambda: seen,
        "drops": lambda: ~seen,
        "seen": lambda: seen,
        "ids": lambda: rng.integers(0, 8, shape),
    }
    return special.get(name.partition("_of_")[0], lambda: rng.standard_normal(shape))()


# MLPs


def mlp(net: Net, x: str, activation: Callable[[Net, str], str], **options: bool) -> str:
    hidden = activation(net, net.linear(x, WIDTH, HIDDEN, **options))
    return net.linear(hidden, HIDDEN, WIDTH, **options)


def relu(net: Net, y: str) -> str:
    return net("Relu", y)


def erf_gelu(net: Net, y: str) -> str:
    inner = net("Add", net("Erf", net("Div", y, np.sqrt(2.0))), 1.0)
    return net("Mul", net("Mul", y, inner), 0.5)


def tanh_gelu(net: Net, y: str) -> str:
    cubic = net("Add", y, net("Mul", net("Pow", y, 3.0), 0.044715))
    inner = net("Add", net("Tanh", net("Mul", cubic, np.sqrt(2 / np.pi))), 1.0)
    return net("Mul", net("Mul", y, 0.5), inner)


def vectors(net: Net, y: str) -> str:
    scaled = net("Mul", net.random(1, HIDDEN), y)
    bent = net("PRelu", scaled, net.random(HIDDEN))
    return net("Add", bent, net.random(1, 1, HIDDEN))


def shared_sizes(net: Net, y: str) -> str:
    """The hidden tensor, times a hundredth of how many elements it has."""
    size = net("ReduceProd", net("Shape", y), keepdims=0)
    return net("Mul", net("Relu", y), net("Mul", net("Cast", size, to=TensorProto.FLOAT), 0.01))


def flattened(net: Net, y: str) -> str:
    rows = net("Reshape", net("Relu", y), [-1, HIDDEN])
    batch = net("Gather", net("Shape", "x"), [0])
    return net("Reshape", net("Neg", rows), net("Concat", batch, [-1, HIDDEN], axis=0))


def mlp_with(activation: Callable[[Net, str], str], opset: int = 18, **options: bool) -> Builder:
    def build(seed: int) -> Tiny:
        net = Net(seed, opset=opset)
        return Tiny(net.build(mlp(net, net.x(), activation, **options)), (MLP,))

    return build


def mlp_gemm(seed: int) -> Tiny:
    net = Net(seed)
    rows = net("Flatten", net.x(), axis=2)
    up = net.weight(HIDDEN, WIDTH)
    y = net("Gemm", rows, up, net.random(HIDDEN), alpha=0.5, beta=2.0, transB=1)
    y = net("Gemm", relu(net, y), net.weight(HIDDEN, WIDTH), net.random(1, WIDTH), beta=0.5)
    return Tiny(net.build(net("Reshape", y, net("Shape", "x"))), (MLP,))


def mlp_gemm_no_bias(seed: int) -> Tiny:
    net = Net(seed)
    y = net("Gemm", net.x("batch", WIDTH), net.weight(WIDTH, HIDDEN))
    return Tiny(net.build(net("Gemm", relu(net, y), net.weight(HIDDEN, WIDTH))), (MLP,))


def mlp_gated(seed: int) -> Tiny:
    net = Net(seed)
    net.x()
    gate, up = (net.linear("x", WIDTH, HIDDEN) for _ in range(2))
    hidden = net("Mul", net("Mul", gate, net("Sigmoid", gate)), up)
    return Tiny(net.build(net.linear(hidden, HIDDEN, WIDTH)), (MLP,))


def packed_gate(halve: Callable[[Net, str], Sequence[str]]) -> Builder:
    """One projection for gate and values, told apart behind it."""

    def build(seed: int) -> Tiny:
        net = Net(seed)
        gate, up = halve(net, net.linear(net.x(), WIDTH, 2 * HIDDEN))
        hidden = net("Mul", net("Sigmoid", gate), up)
        return Tiny(net.build(net.linear(hidden, HIDDEN, WIDTH)), (MLP,))

    return build


def gate_split(net: Net, y: str) -> Sequence[str]:
    return net("Split", y, [HIDDEN, HIDDEN], outputs=2, axis=-1)


def gate_sliced(net: Net, y: str) -> Sequence[str]:
    """The values come first."""
    ends = ([HIDDEN], [2 * HIDDEN]), ([0], [HIDDEN])
    return [net("Slice", y, start, end, [-1]) for start, end in ends]


def gate_interleaved(net: Net, y: str) -> Sequence[str]:
    return [net("Slice", y, [start], [2 * HIDDEN], [-1], [2]) for start in range(2)]


def gate_gathered(net: Net, y: str) -> Sequence[str]:
    pairs = net("Reshape", y, [0, 0, 2, HIDDEN])
    return [net("Gather", pairs, np.int64(half), axis=2) for half in range(2)]


def gate_shuffled(net: Net, y: str) -> Sequence[str]:
    """A constant permutation of channels before the halves part."""
    order = np.random.default_rng(5).permutation(2 * HIDDEN)
    return gate_split(net, net("Gather", y, order, axis=2))


def mlp_gate_on_rows(seed: int) -> Tiny:
    """A packed gate that a simplifier computes on rows, and takes apart on three axes again."""
    net = Net(seed)
    front = net("Slice", net("Shape", net.x()), [0], [2])
    rows = net("Reshape", "x", [-1, WIDTH])
    y = net("Gemm", rows, net.weight(WIDTH, 2 * HIDDEN), net.random(2 * HIDDEN))
    up, gate = gate_sliced(net, net("Reshape", y, net("Concat", front, [2 * HIDDEN], axis=0)))
    hidden = net("Mul", net("Sigmoid", gate), up)
    front = net("Slice", net("Shape", hidden), [0], [2])
    rows = net("Reshape", hidden, [-1, HIDDEN])
    y = net("Gemm", rows, net.weight(HIDDEN, WIDTH), net.random(WIDTH))
    return Tiny(net.build(net("Reshape", y, net("Concat", front, [WIDTH], axis=0))), (MLP,))


def mlp_gate_per_sample(seed: int) -> Tiny:
    """Squeeze and excite: a gate of every channel for all tokens of a sample."""
    net = Net(seed)
    up = relu(net, net.linear(net.x(), WIDTH, HIDDEN))
    gate = net("Sigmoid", net.linear(net("ReduceMean", "x", [1], keepdims=1), WIDTH, HIDDEN))
    return Tiny(net.build(net.linear(net("Mul", up, gate), HIDDEN, WIDTH)), (MLP,))


def mlp_per_token(seed: int) -> Tiny:
    """A constant that differs between tokens, and a factor that all channels share."""
    net = Net(seed)
    hidden = relu(net, net.linear(net.x("batch", 5, WIDTH), WIDTH, HIDDEN))
    shifted = net("Add", hidden, net.random(5, HIDDEN))
    factor = net("ReduceMax", "x", [-1], keepdims=1)
    return Tiny(net.build(net.linear(net("Mul", shifted, factor), HIDDEN, WIDTH)), (MLP,))


def conv(net: Net, x: str, rows: int, columns: int, *, bias: bool = True) -> str:
    """A convolution whose kernel is a single point."""
    kernel = net.random(columns, rows, 1, 1, gain=1.5 / np.sqrt(rows))
    return net("Conv", x, kernel, *([net.random(columns)] if bias else []), kernel_shape=[1, 1])


def depthwise(net: Net, x: str) -> str:
    kernel, bias = net.random(HIDDEN, 1, 3, 3), net.random(HIDDEN)
    return net("Conv", x, kernel, bias, group=HIDDEN, kernel_shape=[3, 3], pads=[1, 1, 1, 1])


def normalised(net: Net, x: str) -> str:
    scales = [1 + net.random(HIDDEN), net.random(HIDDEN), net.random(HIDDEN)]
    return net("BatchNormalization", x, *scales, np.exp(net.random(HIDDEN)))


def mlp_conv(seed: int) -> Tiny:
    """Channels on axis 1, with an inverted bottleneck's depthwise convolution inside."""
    net = Net(seed)
    x = net.x("batch", WIDTH, 4, "tokens")
    hidden = net("Relu", normalised(net, conv(net, x, WIDTH, HIDDEN, bias=False)))
    hidden = net("Clip", depthwise(net, hidden), 0.0, 6.0)
    return Tiny(net.build(conv(net, hidden, HIDDEN, WIDTH)), (MLP,))


def mlp_pooled(seed: int) -> Tiny:
    """Rows are averaged between the layers; their axis stays at first, then goes."""
    net = Net(seed)
    hidden = relu(net, net.linear(net.x("batch", 4, "tokens", WIDTH), WIDTH, HIDDEN))
    mean = net("ReduceSum", net("ReduceMean", hidden, [-3], keepdims=1), [1], keepdims=0)
    return Tiny(net.build(net.linear(mean, HIDDEN, WIDTH)), (MLP,))


def mlp_to_pixels_and_back(seed: int) -> Tiny:
    """Tokens become a picture for a depthwise convolution: linear layers around, as in PVT v2."""
    net = Net(seed)
    hidden = net.linear(net.x("batch", 12, WIDTH), WIDTH, HIDDEN)
    picture = net("Reshape", net("Transpose", hidden, perm=[0, 2, 1]), [0, HIDDEN, 3, 4])
    flat = net("Reshape", depthwise(net, picture), [0, HIDDEN, -1])
    back = net("Relu", net("Transpose", flat, perm=[0, 2, 1]))
    return Tiny(net.build(net.linear(back, HIDDEN, WIDTH)), (MLP,))


def mlp_joined(seed: int) -> Tiny:
    """Tokens of two layers side by side: both make all hidden channels."""
    net = Net(seed)
    x = net.x()
    first = net("Slice", x, [0], [1], [1])
    hidden = [net("Relu", net.linear(part, WIDTH, HIDDEN)) for part in (first, x)]
    down = net.linear(net("Concat", *hidden, axis=1), HIDDEN, WIDTH)
    return Tiny(net.build(down), (MLP,))


def mlp_layerscale(seed: int) -> Tiny:
    net = Net(seed)
    branch = net("Mul", mlp(net, net.x(), erf_gelu), net.random(WIDTH))
    return Tiny(net.build(net("Add", branch, "x")), (MLP,))


def mlp_chain(seed: int) -> Tiny:
    """The second layer ends one MLP and begins the next."""
    net = Net(seed)
    y = relu(net, net.linear(net.x(), WIDTH, HIDDEN))
    y = relu(net, net.linear(y, HIDDEN, HIDDEN + 1, bias=False))
    return Tiny(net.build(net.linear(y, HIDDEN + 1, WIDTH)), (MLP, ("mlp", HIDDEN + 1)))


def mlp_tied(seed: int) -> Tiny:
    """Two MLPs and an output of its own read the same weights."""
    net = Net(seed)
    up, down = net.weight(WIDTH, HIDDEN), net.weight(HIDDEN, WIDTH)
    bias = net.const(net.random(HIDDEN))
    y = net.x()
    for _ in range(2):
        hidden = relu(net, net("Add", net("MatMul", y, up), bias))
        y = net("Add", y, net("Add", net("MatMul", hidden, down), net.random(WIDTH)))
    other = net("Add", net("MatMul", "x", up), bias)
    return Tiny(net.build(y, other), (MLP, MLP))


def mlp_tied_transposed(seed: int) -> Tiny:
    """Two MLPs read the same weights, behind one Transpose each."""
    net = Net(seed)
    up, down = (net("Transpose", net.weight(*shape)) for shape in (SHAPE, SHAPE[::-1]))
    y = net.x()
    for _ in range(2):
        hidden = relu(net, net("Add", net("MatMul", y, up), net.random(HIDDEN)))
        y = net("Add", y, net("Add", net("MatMul", hidden, down), net.random(WIDTH)))
    return Tiny(net.build(y), (MLP, MLP))


def mlp_parametrised(seed: int) -> Tiny:
    """A weight of fixed norm with a low rank added, and a masked one."""
    net = Net(seed)
    direction = net.weight(WIDTH, HIDDEN)
    length = net("ReduceL2", direction, [0], keepdims=1)
    fixed = net("Mul", net("Div", direction, length), net.random(HIDDEN))
    up = net("Add", fixed, net("MatMul", net.weight(WIDTH, 2), net.weight(2, HIDDEN)))
    hidden = relu(net, net("Add", net("MatMul", net.x(), up), net.random(HIDDEN)))
    mask = net.const((net.random(HIDDEN, WIDTH) > -0.5).astype(np.float64))
    down = net("Mul", net.weight(HIDDEN, WIDTH), mask)
    return Tiny(net.build(net("Add", net("MatMul", hidden, down), net.random(WIDTH))), (MLP,))


def mlp_half(seed: int) -> Tiny:
    net = Net(seed, dtype=np.float16)
    return Tiny(net.build(mlp(net, net.x(), relu)), (MLP,))


def mlp_indirect_weights(seed: int) -> Tiny:
    """Weights stored transposed, and in half precision."""
    net = Net(seed)
    up = net("Transpose", net.weight(HIDDEN, WIDTH), perm=[1, 0])
    y = relu(net, net("Add", net("MatMul", net.x(), up), net("Identity", net.random(HIDDEN))))
    down = numpy_helper.from_array(net.random(HIDDEN, WIDTH).astype(np.float16), "half")
    net.tensors.append(down)
    y = net("MatMul", y, net("Cast", "half", to=TensorProto.FLOAT))
    return Tiny(net.build(net("Add", net.random(WIDTH), y)), (MLP,))


# Attention


def split_heads(net: Net, y: str, width: int = HEAD, perm: Sequence[int] = (0, 2, 1, 3)) -> str:
    return net("Transpose", net("Reshape", y, [0, 0, HEADS, width]), perm=perm)


def merge_heads(net: Net, mixed: str, width: int = HEAD) -> str:
    rows = net("Transpose", mixed, perm=[0, 2, 1, 3])
    return net.linear(net("Reshape", rows, [0, 0, HEADS * width]), HEADS * width, WIDTH)


def mix(
    net: Net, query: str, key: str, value: str, between: Callable[[Net, str], str] | None = None
) -> str:
    """``softmax(between(q kᵀ)) v``, with keys as they come from ``split_heads``."""
    swap = [0, 1, 3, 2]
    logits = net("MatMul", query, net("Transpose", key, perm=swap))
    return net("MatMul", softmax(net, (between or scaled)(net, logits)), value)


def softmax(net: Net, logits: str) -> str:
    return net("Softmax", logits, axis=-1)


def scaled(net: Net, logits: str) -> str:
    return net("Mul", logits, HEAD**-0.5)


def projections(net: Net, x: str = "x", width: int = HEAD, **options: bool) -> list[str]:
    if not net.inputs:
        net.x()
    widths = (HEAD, HEAD, width)
    return [net.linear(x, WIDTH, HEADS * size, **options) for size in widths]


def separate(net: Net, **options: bool) -> list[str]:
    return [split_heads(net, y) for y in projections(net, **options)]


def packed(net: Net) -> str:
    """``[3, batch, heads, tokens, head]``, as timm writes it."""
    y = net("Reshape", net.linear(net.x(), WIDTH, 3 * HEADS * HEAD), [0, 0, 3, HEADS, HEAD])
    return net("Transpose", y, perm=[2, 0, 3, 1, 4])


def attention(between: Callable[[Net, str], str]) -> Builder:
    """Separate projections and something of interest at the logits."""

    def build(seed: int) -> Tiny:
        net = Net(seed)
        return Tiny(net.build(merge_heads(net, mix(net, *separate(net), between))), (ATTENTION,))

    return build


def projected(make: Callable[[Net], list[str]]) -> Builder:
    """Something of interest between the projections and the products."""

    def build(seed: int) -> Tiny:
        net = Net(seed)
        return Tiny(net.build(merge_heads(net, mix(net, *make(net)))), (ATTENTION,))

    return build


def no_bias(net: Net) -> list[str]:
    return separate(net, bias=False)


def packed_split(net: Net) -> list[str]:
    parts = net("Split", packed(net), [1, 1, 1], outputs=3, axis=0)
    return [net("Squeeze", part, [0]) for part in parts]


def packed_gather(net: Net) -> list[str]:
    whole = packed(net)
    return [net("Gather", whole, np.int64(index), axis=0) for index in range(3)]


def packed_gather_nd(net: Net) -> list[str]:
    whole = packed(net)
    return [net("GatherND", whole, [index]) for index in range(3)]


def packed_slice(net: Net) -> list[str]:
    whole = net.linear(net.x(), WIDTH, 3 * HEADS * HEAD)
    size = HEADS * HEAD
    parts = [net("Slice", whole, [i * size], [i * size + size], [2]) for i in range(3)]
    return [split_heads(net, part) for part in parts]


def scale_on_query(net: Net) -> list[str]:
    query, key, value = separate(net)
    return [net("Mul", query, 0.3), key, value]


def scale_on_key(net: Net) -> list[str]:
    query, key, value = separate(net)
    return [query, net("Div", key, 2.5), value]


def scale_on_both(net: Net) -> list[str]:
    """Before the heads are split on one side, behind that on the other; values too."""
    query, key, value = projections(net)
    query, value = net("Mul", 0.7, query), net("Div", value, 0.5)
    return [
        split_heads(net, query),
        net("Mul", split_heads(net, key), 0.6),
        split_heads(net, value),
    ]


def scale_per_channel(net: Net) -> list[str]:
    """Every channel has a factor of its own, as a folded normalisation leaves it."""
    query, key, value = projections(net)
    query = net("Mul", query, net.random(HEADS * HEAD, gain=1.0))
    key = net("Mul", split_heads(net, key), net.random(HEADS, 1, HEAD, gain=1.0))
    return [split_heads(net, query), key, split_heads(net, value)]


def late_bias(net: Net) -> list[str]:
    """Biases are added to heads, not to projections."""
    made = [net("Reshape", y, [0, 0, HEADS, HEAD]) for y in projections(net, bias=False)]
    biased = [net("Add", y, net.random(HEADS, HEAD)) for y in made]
    return [net("Transpose", y, perm=[0, 2, 1, 3]) for y in biased]


def position_major(net: Net) -> list[str]:
    """Neighbouring channels belong to different heads."""
    made = [net("Reshape", y, [0, 0, HEAD, HEADS]) for y in projections(net)]
    return [net("Transpose", y, perm=[0, 3, 1, 2]) for y in made]


def sizes_of_query(net: Net) -> list[str]:
    """All projections are reshaped by sizes that are read off the query."""
    made = projections(net)
    sizes = net("Shape", made[0])
    parts = [net("Gather", sizes, [axis], axis=0) for axis in range(2)]
    target = net("Concat", *parts, [HEADS, HEAD], axis=0)
    return [net("Transpose", net("Reshape", y, target), perm=[0, 2, 1, 3]) for y in made]


def half_of_heads(net: Net) -> list[str]:
    """Heads are cut apart, brought into another order and joined again."""
    made = []
    for y in separate(net):
        first, second = net("Split", y, [1, 1], outputs=2, axis=1)
        made.append(net("Concat", second, first, axis=1))
    return made


def scale_divided(net: Net, logits: str) -> str:
    return net("Div", logits, np.sqrt(HEAD))


def scale_at_run_time(net: Net, logits: str) -> str:
    """``1 / sqrt(head width)``, from the shape of the query."""
    query, _ = net.nodes[-1].input
    width = net("Slice", net("Shape", query), [-1], [np.iinfo(np.int64).max])
    root = net("Sqrt", net("Cast", width, to=TensorProto.FLOAT))
    return net("Mul", logits, net("Div", [1.0], root))


def mask_added(net: Net, logits: str) -> str:
    return net("Add", scaled(net, logits), net.input("added", "batch", 1, 1, "tokens"))


def mask_of_others(net: Net, logits: str) -> str:
    mask = net.input("added_of_others", "batch", 1, 1, "others")
    return net("Add", scaled(net, logits), mask)


def mask_keeps(net: Net, logits: str) -> str:
    keeps = net.input("keeps", "batch", 1, 1, "tokens", dtype=np.bool_)
    return net("Where", keeps, scaled(net, logits), -1e4)


def mask_drops(net: Net, logits: str) -> str:
    drops = net.input("drops", "batch", 1, 1, "tokens", dtype=np.bool_)
    return net("Where", drops, -1e4, scaled(net, logits))


def softmax_written_out(seed: int) -> Tiny:
    net = Net(seed)
    query, key, value = separate(net)
    logits = scaled(net, net("MatMul", query, net("Transpose", key, perm=[0, 1, 3, 2])))
    peak = net("ReduceMax", logits, [-1], keepdims=1)
    powers = net("Exp", net("Sub", logits, peak))
    mixed = net("MatMul", net("Div", powers, net("ReduceSum", powers, [-1], keepdims=1)), value)
    return Tiny(net.build(merge_heads(net, mixed)), (ATTENTION,))


def attention_gemm(seed: int) -> Tiny:
    """Tokens of all samples in one axis; sizes are read off the input, the scale off the query."""
    net = Net(seed)
    rows = net("Reshape", net.x(), [-1, WIDTH])
    tokens = net("Slice", net("Shape", "x"), [0], [2])
    made = []
    for _ in range(3):
        weight = net.weight(HEADS * HEAD, WIDTH)
        y = net("Gemm", rows, weight, net.random(HEADS * HEAD), transB=1, alpha=0.8)
        heads = net("Reshape", y, net("Concat", tokens, [HEADS, HEAD], axis=0))
        made.append(net("Transpose", heads, perm=[0, 2, 1, 3]))
    mixed = net("Transpose", mix(net, *made, scale_at_run_time), perm=[0, 2, 1, 3])
    flat = net("Reshape", mixed, [-1, HEADS * HEAD])
    y = net("Gemm", flat, net.weight(HEADS * HEAD, WIDTH), net.random(WIDTH))
    return Tiny(net.build(net("Reshape", y, net("Shape", "x"))), (ATTENTION,))


def batch_heads(seed: int) -> Tiny:
    """``[batch · heads, tokens, head]``, as torch's MultiheadAttention has it."""
    net = Net(seed)
    net.x()
    sizes = [net("Gather", net("Shape", "x"), [axis], axis=0) for axis in range(2)]
    rows = net("Mul", sizes[0], [HEADS])
    folded = net("Concat", rows, sizes[1], [HEAD], axis=0)
    query, key, value = (net("Reshape", y, folded) for y in separate(net))
    logits = net("MatMul", query, net("Transpose", key, perm=[0, 2, 1]))
    mixed = net("MatMul", softmax(net, scaled(net, logits)), value)
    split = net("Concat", sizes[0], [HEADS], sizes[1], [HEAD], axis=0)
    return Tiny(net.build(merge_heads(net, net("Reshape", mixed, split))), (ATTENTION,))


def tokens_first(seed: int) -> Tiny:
    """``[tokens, batch, channels]`` throughout, and heads merged with the batch."""
    net = Net(seed)
    net.x("tokens", "batch", WIDTH)
    sizes = [net("Gather", net("Shape", "x"), [axis], axis=0) for axis in range(2)]
    rows = net("Concat", sizes[0], net("Mul", sizes[1], [HEADS]), [HEAD], axis=0)
    made = [net("Transpose", net("Reshape", y, rows), perm=[1, 0, 2]) for y in projections(net)]
    logits = net("MatMul", made[0], net("Transpose", made[1], perm=[0, 2, 1]))
    mixed = net("MatMul", softmax(net, scaled(net, logits)), made[2])
    back = net("Concat", *sizes, [HEADS * HEAD], axis=0)
    flat = net("Reshape", net("Transpose", mixed, perm=[1, 0, 2]), back)
    return Tiny(net.build(net.linear(flat, HEADS * HEAD, WIDTH)), (ATTENTION,))


def tokens_first_flat(seed: int) -> Tiny:
    """The same with layers on rows, of which one Reshape makes tokens, and heads with the batch."""
    net = Net(seed)
    net.x("tokens", "batch", WIDTH)
    sizes = [net("Gather", net("Shape", "x"), [axis], axis=0) for axis in range(2)]
    rows = net("Concat", sizes[0], net("Mul", sizes[1], [HEADS]), [HEAD], axis=0)
    flat = projections(net, net("Reshape", "x", [-1, WIDTH]))
    made = [net("Transpose", net("Reshape", y, rows), perm=[1, 0, 2]) for y in flat]
    logits = net("MatMul", made[0], net("Transpose", made[1], perm=[0, 2, 1]))
    mixed = net("MatMul", softmax(net, scaled(net, logits)), made[2])
    back = net("Reshape", net("Transpose", mixed, perm=[1, 0, 2]), [-1, HEADS * HEAD])
    whole = net("Concat", *sizes, [WIDTH], axis=0)
    y = net("Reshape", net.linear(back, HEADS * HEAD, WIDTH), whole)
    return Tiny(net.build(y), (ATTENTION,))


def transposed_keys(seed: int) -> Tiny:
    net = Net(seed)
    query, key, value = projections(net)
    key = split_heads(net, key, perm=[0, 2, 3, 1])
    logits = scaled(net, net("MatMul", split_heads(net, query), key))
    mixed = net("MatMul", softmax(net, logits), split_heads(net, value))
    return Tiny(net.build(merge_heads(net, mixed)), (ATTENTION,))


def narrow_values(seed: int) -> Tiny:
    net = Net(seed)
    query, key, value = projections(net, width=VALUE)
    value = split_heads(net, value, VALUE)
    mixed = mix(net, split_heads(net, query), split_heads(net, key), value)
    expected = ("attention", HEADS, HEAD, VALUE, ("qk", "vo"))
    return Tiny(net.build(merge_heads(net, mixed, VALUE)), (expected,))


def cross_attention(*, masked: bool) -> Builder:
    """Keys and values come from another sequence of another length, of which a mask hides some."""

    def build(seed: int) -> Tiny:
        net = Net(seed)
        query = net.linear(net.x(), WIDTH, HEADS * HEAD)
        context = net.input("context", "batch", "others", WIDTH - 1)
        key, value = (net.linear(context, WIDTH - 1, HEADS * HEAD) for _ in range(2))
        mixed = mix(
            net,
            *(split_heads(net, y) for y in (query, key, value)),
            mask_of_others if masked else scaled,
        )
        return Tiny(net.build(merge_heads(net, mixed)), (ATTENTION,))

    return build


def single_head(seed: int) -> Tiny:
    """One head needs no reshape at all."""
    net = Net(seed)
    net.x()
    query, key, value = (net.linear("x", WIDTH, HEAD) for _ in range(3))
    logits = scaled(net, net("MatMul", query, net("Transpose", key, perm=[0, 2, 1])))
    mixed = net("MatMul", softmax(net, logits), value)
    expected = ("attention", 1, HEAD, HEAD, ("qk", "vo"))
    return Tiny(net.build(net.linear(mixed, HEAD, WIDTH)), (expected,))


def one_sample(batch: int | str, tokens: int) -> Builder:
    """Targets that say that there is one sample, whatever the input may declare."""

    def build(seed: int) -> Tiny:
        net = Net(seed)
        net.x(batch, 5, WIDTH)
        made = [net("Reshape", y, [1, tokens, HEADS, HEAD]) for y in projections(net)]
        mixed = mix(net, *(net("Transpose", y, perm=[0, 2, 1, 3]) for y in made))
        rows = net("Transpose", mixed, perm=[0, 2, 1, 3])
        flat = net("Reshape", rows, [1, tokens, HEADS * HEAD])
        return Tiny(net.build(net.linear(flat, HEADS * HEAD, WIDTH)), (ATTENTION,))

    return build


def without_output(seed: int) -> Tiny:
    """No output projection: values cannot be cut."""
    net = Net(seed)
    mixed = net("Transpose", mix(net, *separate(net)), perm=[0, 2, 1, 3])
    expected = ("attention", HEADS, HEAD, HEAD, ("qk",))
    return Tiny(net.build(net("Reshape", mixed, [0, 0, HEADS * HEAD])), (expected,))


def shared_head(*roles: str) -> Builder:
    """One key or value head for all query heads."""

    def build(seed: int) -> Tiny:
        net = Net(seed)
        made = dict(zip(("query", "key", "value"), separate(net), strict=True))
        for role in roles:
            rows = net("Reshape", net.linear("x", WIDTH, HEAD), [0, 0, 1, HEAD])
            made[role] = net("Transpose", rows, perm=[0, 2, 1, 3])
        return Tiny(net.build(merge_heads(net, mix(net, *made.values()))), (ATTENTION,))

    return build


def seen_by_caller(role: str) -> Builder:
    """One operand is an output of the model: its axis cannot be cut, the other can."""

    def build(seed: int) -> Tiny:
        net = Net(seed)
        made = dict(zip(("query", "key", "value"), separate(net), strict=True))
        axes = ("qk",) if role == "value" else ("vo",)
        y = merge_heads(net, mix(net, *made.values()))
        return Tiny(net.build(y, made[role]), (("attention", HEADS, HEAD, HEAD, axes),))

    return build


def sizes_read(seed: int) -> Tiny:
    """The sizes of a query, a key and a value are outputs of the model."""
    net = Net(seed)
    query, key, value = projections(net)
    operands = [split_heads(net, y) for y in (query, key, value)]
    y = merge_heads(net, mix(net, *operands))
    sizes = [net("Shape", tensor) for tensor in (query, operands[1], value)]
    return Tiny(net.build(y, *sizes), (ATTENTION,))


def mixed_sizes_read(seed: int) -> Tiny:
    """The sizes of mixed values are outputs of the model, and scale the result."""
    net = Net(seed)
    mixed = mix(net, *separate(net))
    rows = net("Transpose", mixed, perm=[0, 2, 1, 3])
    sizes = [net("Shape", mixed), net("Shape", rows, start=2)]
    flat = net("Reshape", rows, [0, 0, HEADS * HEAD])
    elements = net("Cast", net("ReduceProd", sizes[1], keepdims=0), to=TensorProto.FLOAT)
    y = net("Div", net.linear(flat, HEADS * HEAD, WIDTH), elements)
    return Tiny(net.build(y, *sizes), (ATTENTION,))


def operator(**attrs: float) -> Builder:
    """The Attention operator of opset 23; without a scale it uses its default."""

    def build(seed: int) -> Tiny:
        net = Net(seed, opset=23)
        return Tiny(
            net.build(merge_heads(net, net("Attention", *separate(net), **attrs))), (ATTENTION,)
        )

    return build


def operator_mask(seed: int) -> Tiny:
    net = Net(seed, opset=23)
    made = separate(net)
    keeps = net.input("keeps", "batch", 1, 1, "tokens", dtype=np.bool_)
    batch, tokens = net("Shape", "x", end=1), net("Shape", "x", start=1, end=2)
    mask = net("Expand", keeps, net("Concat", batch, [1], tokens, tokens, axis=0))
    return Tiny(net.build(merge_heads(net, net("Attention", *made, mask))), (ATTENTION,))


def attention_half(seed: int) -> Tiny:
    """Half precision, and a scale computed in it."""
    net = Net(seed, dtype=np.float16)

    def scale(net: Net, logits: str) -> str:
        width = net("Gather", net("Shape", query), np.int64(3), axis=0)
        root = net("Sqrt", net("Cast", width, to=TensorProto.FLOAT16))
        return net("Div", logits, root)

    query, key, value = separate(net)
    return Tiny(net.build(merge_heads(net, mix(net, query, key, value, scale))), (ATTENTION,))


def attention_half_upcast(seed: int) -> Tiny:
    """Half precision, but the products are computed in single."""
    net = Net(seed, dtype=np.float16)
    made = [net("Cast", y, to=TensorProto.FLOAT) for y in separate(net)]
    scale = np.float32(HEAD**-0.5)
    net.tensors.append(numpy_helper.from_array(np.asarray(scale), "scale"))
    mixed = mix(net, *made, lambda net, logits: net("Mul", logits, "scale"))
    return Tiny(
        net.build(merge_heads(net, net("Cast", mixed, to=TensorProto.FLOAT16))), (ATTENTION,)
    )


# Whole blocks


def layer_norm(net: Net, x: str) -> str:
    """LayerNorm as exporters before opset 17 write it."""
    centred = net("Sub", x, net("ReduceMean", x, [-1], keepdims=1))
    variance = net("ReduceMean", net("Pow", centred, 2.0), [-1], keepdims=1)
    normal = net("Div", centred, net("Sqrt", net("Add", variance, 1e-5)))
    return net("Add", net("Mul", normal, net.random(WIDTH, gain=1.0)), net.random(WIDTH))


def residual_block(net: Net, x: str) -> str:
    operands = [split_heads(net, y) for y in projections(net, layer_norm(net, x))]
    x = net("Add", x, merge_heads(net, mix(net, *operands)))
    return net("Add", x, mlp(net, layer_norm(net, x), erf_gelu))


def transformer(seed: int) -> Tiny:
    """Two residual blocks with norms in front, and a classifier of the first token."""
    net = Net(seed)
    y = residual_block(net, residual_block(net, net.x()))
    first = net("Gather", net("LayerNormalization", y, net.random(WIDTH)), np.int64(0), axis=1)
    classes = net("Softmax", net.linear(first, WIDTH, 3), axis=-1)
    return Tiny(net.build(classes), (ATTENTION, MLP, ATTENTION, MLP))


def tied_attention(seed: int) -> Tiny:
    """Two attentions share every weight, and an output of the model has the query's."""
    net = Net(seed)
    weights = [net.weight(WIDTH, HEADS * HEAD) for _ in range(3)]
    out = net.weight(HEADS * HEAD, WIDTH)
    y = net.x()
    for _ in range(2):
        made = [net("Add", net("MatMul", y, w), net.random(HEADS * HEAD)) for w in weights]
        mixed = net("Transpose", mix(net, *(split_heads(net, m) for m in made)), perm=[0, 2, 1, 3])
        y = net("MatMul", net("Reshape", mixed, [0, 0, HEADS * HEAD]), out)
    return Tiny(net.build(y, net("MatMul", "x", weights[0])), (ATTENTION, ATTENTION))


def text_encoder(seed: int) -> Tiny:
    """Token and position tables (of 16), an additive mask from a mask of tokens, one block."""
    net = Net(seed)
    ids = net.input("ids", "batch", "tokens", dtype=np.int64)
    seen = net.input("seen", "batch", "tokens")
    length = net("Gather", net("Shape", ids), np.int64(1), axis=0)
    places = net("Range", np.int64(0), length, np.int64(1))
    table = net("Gather", net.random(16, WIDTH, gain=1.0), places, axis=0)
    x = net("Add", net("Gather", net.random(8, WIDTH, gain=1.0), ids, axis=0), table)
    mask = net("Mul", net("Sub", 1.0, net("Unsqueeze", seen, [1, 2])), -1e4)

    def masked(net: Net, logits: str) -> str:
        return net("Add", scaled(net, logits), mask)

    operands = [split_heads(net, y) for y in projections(net, x)]
    x = layer_norm(net, net("Add", x, merge_heads(net, mix(net, *operands, masked))))
    y = layer_norm(net, net("Add", x, mlp(net, x, tanh_gelu)))
    return Tiny(net.build(y), (ATTENTION, MLP))


TINY: Mapping[str, Builder] = {
    "mlp": mlp_with(relu),
    "mlp_no_bias": mlp_with(relu, bias=False),
    "mlp_erf_gelu": mlp_with(erf_gelu),
    "mlp_tanh_gelu": mlp_with(tanh_gelu),
    "mlp_gelu": mlp_with(lambda net, y: net("Gelu", y, approximate="tanh"), opset=20),
    "mlp_vectors": mlp_with(vectors),
    "mlp_sizes_read": mlp_with(shared_sizes),
    "mlp_flattened": mlp_with(flattened),
    "mlp_gemm": mlp_gemm,
    "mlp_gemm_no_bias": mlp_gemm_no_bias,
    "mlp_gated": mlp_gated,
    "mlp_gate_split": packed_gate(gate_split),
    "mlp_gate_sliced": packed_gate(gate_sliced),
    "mlp_gate_on_rows": mlp_gate_on_rows,
    "mlp_gate_interleaved": packed_gate(gate_interleaved),
    "mlp_gate_gathered": packed_gate(gate_gathered),
    "mlp_gate_shuffled": packed_gate(gate_shuffled),
    "mlp_gate_per_sample": mlp_gate_per_sample,
    "mlp_per_token": mlp_per_token,
    "mlp_conv": mlp_conv,
    "mlp_pooled": mlp_pooled,
    "mlp_to_pixels_and_back": mlp_to_pixels_and_back,
    "mlp_joined": mlp_joined,
    "mlp_layerscale": mlp_layerscale,
    "mlp_chain": mlp_chain,
    "mlp_tied": mlp_tied,
    "mlp_tied_transposed": mlp_tied_transposed,
    "mlp_parametrised": mlp_parametrised,
    "mlp_half": mlp_half,
    "mlp_indirect_weights": mlp_indirect_weights,
    "separate": projected(separate),
    "no_bias": projected(no_bias),
    "packed_split": projected(packed_split),
    "packed_gather": projected(packed_gather),
    "packed_gather_nd": projected(packed_gather_nd),
    "packed_slice": projected(packed_slice),
    "scale_on_query": projected(scale_on_query),
    "scale_on_key": projected(scale_on_key),
    "scale_on_both": projected(scale_on_both),
    "scale_per_channel": projected(scale_per_channel),
    "late_bias": projected(late_bias),
    "position_major": projected(position_major),
    "sizes_of_query": projected(sizes_of_query),
    "half_of_heads": projected(half_of_heads),
    "scale_divided": attention(scale_divided),
    "scale_at_run_time": attention(scale_at_run_time),
    "mask_added": attention(mask_added),
    "mask_keeps": attention(mask_keeps),
    "mask_drops": attention(mask_drops),
    "softmax_written_out": softmax_written_out,
    "attention_gemm": attention_gemm,
    "batch_heads": batch_heads,
    "tokens_first": tokens_first,
    "tokens_first_flat": tokens_first_flat,
    "transposed_keys": transposed_keys,
    "narrow_values": narrow_values,
    "cross_attention": cross_attention(masked=False),
    "cross_attention_masked": cross_attention(masked=True),
    "single_head": single_head,
    "static_sizes": one_sample(1, 5),
    "baked_batch": one_sample("batch", 5),
    "joined_batch": one_sample("batch", -1),
    "without_output": without_output,
    "shared_key_head": shared_head("key"),
    "shared_value_head": shared_head("value"),
    "query_seen": seen_by_caller("query"),
    "value_seen": seen_by_caller("value"),
    "sizes_read": sizes_read,
    "mixed_sizes_read": mixed_sizes_read,
    "operator": operator(),
    "operator_scale": operator(scale=0.3, is_causal=1),
    "operator_mask": operator_mask,
    "attention_half": attention_half,
    "attention_half_upcast": attention_half_upcast,
    "transformer": transformer,
    "tied_attention": tied_attention,
    "text_encoder": text_encoder,
}
"""Every tiny model by name, made from a seed."""


def sizes_of(name: str) -> tuple[tuple[int, int], ...]:
    """Pairs of (batch, tokens) that a tiny model can run at."""
    if name in {"static_sizes", "baked_batch"}:
        return ((1, 5),)
    return ((1, 5), (3, 5)) if name == "joined_batch" else ((1, 5), (3, 7))
