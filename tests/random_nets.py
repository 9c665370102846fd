"""Transformers drawn at random: every way of writing a part meets every way of writing the others.

A network is a record of choices, from which its graph is built, and the blocks that are in it. The
records of its parts are in `random_choices`, how they are written in `random_attention` and
`random_mlp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.random_attention import AttentionWriter
from tests.random_choices import ROLES, Attention, Mlp, Scale
from tests.random_mlp import ACTIVATIONS, VECTORS, MlpWriter
from tests.random_writing import (
    BIASES,
    KINDS,
    MIXED_NOISE,
    NOISE,
    PICKS,
    SPELLINGS,
    TARGETS,
    WEIGHTS,
    WHOLE_NOISE,
    Layer,
    Named,
    Writing,
)

Part = Attention | Mlp

PACKINGS = ("separate", "separate", "qkv", "qkv", "kv", "heads", "einsum")
OPSETS = (11, 13, 17, 18, 20, 23)
WIDTH = 10
FIXED: Mapping[str, Mapping[str, int]] = {
    "nothing": {},
    "batch": {"b": 24},
    "tokens": {"t": 7},
    "all tokens": {"t": 7, "u": 7},
}
"""Sizes by letter. A batch is as large as calibration needs."""


@dataclass(frozen=True, slots=True)
class Network:
    """All choices that make a network."""

    parts: tuple[Part, ...]
    seed: int = 0
    opset: int = 18
    norm: str = "written out"
    norm_first: bool = True
    parallel: bool = False
    """All parts read one tensor, and are added up."""
    tied: bool = False
    """All parts draw the same weights: two that are alike are one layer, used twice."""
    shapes: str = "vector"
    """How sizes are read off shapes."""
    fixed: str = "nothing"
    """Which axis of the input has a fixed size."""


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """A model, and the truth of it in the words of the zoo's."""

    proto: onnx.ModelProto
    truth: tuple[Mapping[str, object], ...]


def built(network: Network) -> Built:
    """The model of a network, and the blocks that are in it."""
    net = Writing(network.seed, opset=network.opset, width=WIDTH)
    net.tokens = {"b": ("x", 0), "t": ("x", 1)}
    net.spelled = network.shapes
    net.fixed = dict(FIXED[network.fixed])
    batch, tokens, others = net.dimensions(("b", "t", "u"))
    y = net.input("x", batch, tokens, WIDTH)
    if any(isinstance(part, Attention) and part.cross for part in network.parts):
        net.input("other", batch, others, WIDTH)
    shown: list[Named] = []
    branch = _norm(net, network, y) if network.norm_first else y
    for part in network.parts:
        if network.tied:
            net.rng = np.random.default_rng(network.seed)
        writer = AttentionWriter(net, part) if isinstance(part, Attention) else MlpWriter(net, part)
        y = net("Add", y, writer.write(branch))
        shown += [Named(one.tensor, net.dimensions(one.axes)) for one in writer.outputs]
        if not network.norm_first:
            y = _norm(net, network, y)
        if not network.parallel:
            branch = _norm(net, network, y) if network.norm_first else y
    outputs = {y: (batch, tokens, WIDTH)} | {one.tensor: one.axes for one in shown}
    proto = net.build(*outputs)
    for value, shape in zip(proto.graph.output, outputs.values(), strict=True):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    return Built(proto, tuple(part.truth for part in network.parts))


def _norm(net: Writing, network: Network, y: str) -> str:
    scale, shift = 1 + net.random(WIDTH, gain=0.2), net.random(WIDTH, gain=0.2)
    if network.norm == "none":
        return y
    if network.norm == "operator":
        return net("LayerNormalization", y, scale, shift, axis=-1, epsilon=1e-5)
    if network.norm == "root":
        square = net("ReduceMean", net("Pow", y, 2.0), [-1], keepdims=1)
        root = net("Reciprocal", net("Sqrt", net("Add", square, 1e-5)))
        return net("Mul", scale, net("Mul", y, root))
    centred = net("Sub", y, net("ReduceMean", y, [-1], keepdims=1))
    square = net("ReduceMean", net("Mul", centred, centred), [-1], keepdims=1)
    scaled = net("Div", centred, net("Sqrt", net("Add", square, 1e-5)))
    return net("Add", net("Mul", scaled, scale), shift)


# How networks are drawn


def networks() -> st.SearchStrategy[Network]:
    """Networks of one or two parts."""
    return st.composite(_network)()


def _network(draw):
    opset = draw(st.sampled_from((18, *OPSETS)))
    kinds = draw(st.sampled_from(("a", "m", "am", "aa", "mm", "ma")))
    parts = [draw(attentions(opset) if kind == "a" else mlps(opset)) for kind in kinds]
    tied = draw(st.booleans())
    if tied and kinds in {"aa", "mm"}:
        parts[1] = parts[0]
    norms = ["written out", "none", "root", *(["operator"] if opset >= 17 else [])]
    return Network(
        tuple(parts),
        seed=draw(st.integers(0, 3)),
        opset=opset,
        norm=draw(st.sampled_from(norms)),
        norm_first=draw(st.booleans()),
        parallel=draw(st.booleans()),
        tied=tied,
        shapes=draw(st.sampled_from(SPELLINGS)),
        fixed=draw(st.sampled_from(("nothing", "nothing", *FIXED))),
    )


def attentions(opset: int) -> st.SearchStrategy[Attention]:
    """Attentions that can be written in an opset."""
    return st.composite(_attention)(opset)


def mlps(opset: int) -> st.SearchStrategy[Mlp]:
    """MLPs that can be written in an opset."""
    return st.composite(_mlp)(opset)


def _layer(draw, opset):
    kinds = [kind for kind in KINDS if kind != "einsum" or opset >= 12]
    kind = draw(st.sampled_from(("matmul", *kinds)))
    bias = draw(st.sampled_from(("right", *BIASES)))
    return Layer(kind, bias, draw(st.sampled_from(WEIGHTS)))


def _noise(draw, places, kinds=tuple(NOISE)):
    """Movement that changes nothing, at some places."""
    kind = st.one_of(st.none(), st.none(), st.sampled_from(kinds))
    drawn = {place: draw(kind) for place in places}
    return tuple((place, how) for place, how in drawn.items() if how)


def _attention(draw, opset):
    groups = draw(st.integers(1, 3))
    part = Attention(
        groups=groups,
        shared=draw(st.sampled_from((1, 1, 2))),
        width=draw(st.sampled_from((6, 4))),
        value_width=draw(st.sampled_from((4, 6, 5))),
        layers=_layer(draw, opset),
        packing=draw(st.sampled_from(PACKINGS)),
        order=draw(st.sampled_from(("sections", "sge", "gse", "ges"))),
        pick=draw(st.sampled_from(PICKS)),
        picked_first=draw(st.booleans()),
        tokens_first=draw(st.sampled_from((False, False, True))),
        cross=draw(st.sampled_from((False, False, True))),
        unbiased=draw(st.frozensets(st.sampled_from(ROLES))),
        targets=draw(st.sampled_from(TARGETS)),
        form=draw(st.sampled_from(("bh", "hb", "flat", "five", "single"))),
        early=draw(st.booleans()),
        key_turned=draw(st.sampled_from(("before", "chain"))),
        keys_left=draw(st.sampled_from((False, False, True))),
        einsum=opset >= 12 and draw(st.sampled_from((False, False, True))),
        operator=draw(st.sampled_from(("none", "three", "four"))) if opset >= 23 else "none",
        repeat=draw(st.sampled_from(("expand", "by shape", "gather", "concat", "tile", "joined"))),
        repeat_early=draw(st.booleans()),
        scales=_scales(draw),
        shift=draw(st.sampled_from((False, False, True))),
        mask=draw(st.sampled_from(("none", "added", "keeps", "drops", "computed", "causal"))),
        bias=draw(st.sampled_from(("none", "none", "constant", "gathered"))),
        softmax=draw(st.sampled_from(("whole", "positive", "written out", "shifted"))),
        gate=draw(st.sampled_from(("none", "none", "none", "head", "constant"))),
        head_major=draw(st.booleans()),
        summed=opset >= 12 and draw(st.sampled_from((False, False, True))),
        output=_layer(draw, opset),
        layer_scale=draw(st.booleans()),
        noise=_attention_noise(draw),
    )
    return _possible(replace(part, **draw(st.sampled_from(TROUBLES))), opset)


def _attention_noise(draw):
    places = [f"{role} {place}" for role in ROLES for place in ("layer", "split", "operand")]
    return (
        *_noise(draw, ["entry", *places]),
        *_noise(draw, ["mixed", "merged"], [name for name in NOISE if name != "halves"]),
        *_noise(draw, ["logits", "probabilities"], MIXED_NOISE),
    )


TROUBLES = (
    *({},) * 8,
    {"queries": "rotated"},
    {"queries": "normed"},
    {"queries": "l2"},
    {"capped": True},
    {"seen": "query"},
    {"seen": "query layer"},
    {"seen": "cache"},
    {"gate": "channel"},
)
"""What an axis is refused for, one at a time."""


def _scales(draw):
    places = ("logits", "query", "key", "both", "value", "query layer")
    drawn = draw(st.lists(st.sampled_from(places), max_size=2, unique=True))
    return tuple(
        Scale(
            place,
            draw(st.sampled_from(("Mul", "Div"))),
            draw(st.sampled_from(("constant", "shape", "vector"))),
        )
        for place in drawn
    )


def _possible(part: Attention, opset: int) -> Attention:
    """The nearest attention that can be written: choices that contradict each other give way."""
    changes: dict[str, object] = {}
    packing = "kv" if part.packing == "qkv" and part.cross else part.packing
    packing = "separate" if packing == "einsum" and opset < 12 else packing
    if packing in {"qkv", "kv"} and part.order != "sections":
        changes["value_width"] = part.width
        changes["shared"] = 1 if packing == "qkv" else part.shared
    shared = changes.get("shared", part.shared)
    form = part.form if shared > 1 or part.form != "five" else "bh"
    form = "bh" if form == "single" and shared * part.groups > 1 else form
    if part.operator != "none":
        form = "bh"
        changes |= {"repeat": "expand", "keys_left": False, "einsum": False}
    if form == "five":
        changes |= {"repeat": "expand"}
    if part.keys_left and opset < 13 and part.softmax in {"whole", "positive"}:
        changes["softmax"] = "shifted"
    scales = tuple(
        replace(scale, source="constant")
        if scale.place in {"query layer"}
        or (scale.place in {"logits", "both"} and scale.source == "vector")
        else scale
        for scale in part.scales
    )
    return replace(part, packing=packing, form=form, scales=scales, **changes)


def _mlp(draw, opset):
    gate = draw(st.sampled_from(("none", "none", "two", "packed", "packed right")))
    names = [name for name, (since, _) in ACTIVATIONS.items() if opset >= since]
    pick = draw(st.sampled_from(PICKS))
    order = draw(st.sampled_from(("sections", "an", "na")))
    return Mlp(
        hidden=draw(st.sampled_from((14, 13, 8))),
        gate=gate,
        pick=pick,
        order=order,
        up=_layer(draw, opset),
        down=_layer(draw, opset),
        targets=draw(st.sampled_from(TARGETS)),
        activation=draw(st.sampled_from(names)),
        before=draw(st.sampled_from(("none", "none", *VECTORS))),
        behind=draw(st.sampled_from(("none", "none", *VECTORS))),
        seen=draw(st.sampled_from((*("nothing",) * 8, "hidden", "normed"))),
        layer_scale=draw(st.booleans()),
        noise=_noise(draw, ["entry", "gate", "up", "active", "hidden"], WHOLE_NOISE),
    )
