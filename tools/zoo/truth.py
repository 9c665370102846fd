"""What a torch module holds, told by its own attributes: every MLP and every attention that runs.

Nothing of corp_onnx is asked. What may be cut exactly follows from what a class is known to do:
whatever stands between a projection and its product refuses that axis, under a short key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

Entry = dict[str, object]
"""A block: its sizes, the axes that can be cut, the keys of what refuses the others.

``or`` lists axes that can be cut, where a refusal that says why not is right as well.
"""

REASONS: Mapping[str, str] = {
    "rotary": "queries and keys are rotated by their position",
    "norm": "a norm over a head's or the hidden channels",
    "cosine": "logits are cosines of queries and keys",
    "softcap": "logits pass through a tanh",
    "talking heads": "a linear layer mixes the logits of all heads",
    "disentangled": "queries and keys also meet the keys and queries of positions",
    "decomposed bias": "queries also meet a table of positions",
    "pooled": "queries are pooled over tokens",
    "global query": "queries come from convolutions, and are no linear layer's",
    "constant query": "queries are learned, and do not follow from the input",
    "channel attention": "the Softmax runs over channels",
    "activation": "a function stands between values and output projection",
    "tokens": "the MLP runs over tokens: its inputs are no channels, though its hidden axis is",
    "channels compared": "hidden channels are divided by their common mean",
    "shared": "several layers have the same weights, and would have to be cut together",
    "convolution": "the projections are convolutions",
}
"""Every key that the truth uses."""

QK, VO, MLP = "qk", "vo", "mlp"


def blocks_of(module: nn.Module, run: Callable[[], object]) -> list[Entry]:
    """An entry for every run of an MLP or an attention, in the order of running."""
    entries: list[Entry] = []
    runs: dict[str, list[Entry]] = {}

    def note(name: str, part: nn.Module) -> None:
        made = list(_entries(name, part))
        entries.extend(made)
        runs.setdefault(name, []).extend(made)

    hooks = [
        part.register_forward_hook(lambda part, *_, name=name: note(name, part))
        for name, part in module.named_modules()
        if _is_read(module, name, part)
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    for again in runs.values():
        for entry in again if len(again) > 1 + _holds_both(again) else ():
            entry["or"] = dict.fromkeys(entry["cut"], "shared")
    return entries


def mlp(width: int, **why: object) -> Entry:
    """An MLP of ``width`` hidden channels."""
    return {"mlp": width, **_axes((MLP,), **why)}


def attention(
    heads: int,
    head_width: int,
    *,
    kv_heads: int | None = None,
    value_width: int | None = None,
    **why: object,
) -> Entry:
    """An attention of that many heads, with as many heads of keys unless it is said otherwise."""
    sizes = {
        "attention": heads,
        "kv_heads": kv_heads or heads,
        "head_width": head_width,
        "value_width": value_width or head_width,
    }
    return {**sizes, **_axes((QK, VO), **why)}


def _axes(
    axes: tuple[str, ...],
    *,
    refused: Mapping[str, str | None] | None = None,
    optional: Mapping[str, str | None] | None = None,
) -> Entry:
    no = {axis: key for axis, key in (refused or {}).items() if key}
    maybe = {axis: key for axis, key in (optional or {}).items() if key and axis not in no}
    assert {*no.values(), *maybe.values()} <= REASONS.keys()
    entry: Entry = {"cut": [axis for axis in axes if axis not in no]}
    return entry | ({"refused": no} if no else {}) | ({"or": maybe} if maybe else {})


def _holds_both(entries: list[Entry]) -> bool:
    """Whether one class is read as an attention and as an MLP."""
    return len({"mlp" in entry for entry in entries}) > 1


def _entries(name: str, part: nn.Module) -> Iterator[Entry]:
    kind = _kind(part)
    if kind in ATTENTIONS:
        yield ATTENTIONS[kind](part)
    if kind in DOWN:
        down = part.get_submodule(DOWN[kind])
        yield mlp(_width_in(down), **_inside(name, part, down))


def _is_read(module: nn.Module, name: str, part: nn.Module) -> bool:
    """Whether a part is one that blocks are read from; tables of positions are no data."""
    if "rel_pos" in name:
        return False
    around = module.get_submodule(name.rpartition(".")[0])
    return _kind(part) in DOWN or (_kind(part) in ATTENTIONS and _kind(around) not in WHOLE)


def _kind(part: nn.Module) -> str:
    """The name of a module's class; where classes share one, with that of the file before it."""
    kind, place = type(part).__name__, type(part).__module__.rpartition(".")[2]
    return f"{place}.{kind}" if f"{place}.{kind}" in ATTENTIONS else kind


def _width_in(layer: nn.Module) -> int:
    """How many channels a linear layer, a convolution or GPT-2's Conv1D takes."""
    rows, columns = layer.weight.shape[:2]
    return int(rows if type(layer).__name__ == "Conv1D" else columns)


def _inside(name: str, part: nn.Module, down: nn.Module) -> dict[str, dict[str, str | None]]:
    """What stands in an MLP besides two layers and a function."""
    kind = type(part).__name__
    refused = None
    if kind == "GlobalResponseNormMlp":
        refused = "channels compared"
    elif isinstance(getattr(part, "norm", None), nn.LayerNorm):
        refused = "norm"
    optional = "tokens" if name.endswith("mlp_tokens") else None
    return {"refused": {MLP: refused}, "optional": {MLP: optional}}


def _own(part: nn.Module, *names: str) -> int:
    """The first of these attributes that a module or its configuration has."""
    owners = (part, getattr(part, "config", None))
    found = [getattr(owner, name) for owner in owners for name in names if hasattr(owner, name)]
    return int(found[0])


def _heads(part: nn.Module) -> int:
    return _own(part, "num_heads", "num_attention_heads", "n_heads")


def _head_width(part: nn.Module) -> int:
    names = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "key_dim")
    if any(hasattr(part, name) for name in names):
        return _own(part, *names)
    projection, roles = (part.qkv, 3) if hasattr(part, "qkv") else (part.q, 1)
    return int(projection.out_features) // roles // _heads(part)


def _plain(part: nn.Module, qk: str | None = None, vo: str | None = None) -> Entry:
    return attention(_heads(part), _head_width(part), refused={QK: qk, VO: vo})


def _refusing(qk: str | None = None, vo: str | None = None) -> Callable[[nn.Module], Entry]:
    return lambda part: _plain(part, qk, vo)


def _timm(part: nn.Module) -> Entry:
    """Timm's attention and the ones derived from it, by what they were told to do."""
    normalised = not isinstance(getattr(part, "q_norm", nn.Identity()), nn.Identity)
    scaled = isinstance(getattr(part, "norm", None), nn.LayerNorm)
    return _plain(part, "norm" if normalised else None, "norm" if scaled else None)


def _eva(part: nn.Module) -> Entry:
    scaled = isinstance(part.norm, nn.LayerNorm)
    return _plain(part, "rotary", "norm" if scaled else None)


def _convolved(part: nn.Module) -> Entry:
    optional = {QK: "convolution", VO: "convolution"}
    return attention(_heads(part), _head_width(part), optional=optional)


def _wide_values(part: nn.Module, vo: str | None = None) -> Entry:
    return attention(part.num_heads, part.key_dim, value_width=part.val_dim, refused={VO: vo})


def _local_or_global(part: nn.Module) -> Entry:
    return _plain(part, "global query" if part.use_global else None)


def _pooled(part: nn.Module) -> Entry:
    return attention(
        part.heads, part.head_dim, refused={QK: "pooled" if part.q_stride > 1 else None}
    )


def _torch(part: nn.Module) -> Entry:
    return attention(part.num_heads, part.head_dim)


def _learned_query(part: nn.Module) -> Entry:
    inner = part.attention
    return attention(inner.num_heads, inner.head_dim, optional={QK: "constant query"})


def _decoder(part: nn.Module, qk: str | None) -> Entry:
    config = part.config
    return attention(
        config.num_attention_heads,
        part.head_dim,
        kv_heads=config.num_key_value_heads,
        refused={QK: qk},
    )


def _rotated(part: nn.Module) -> Entry:
    return _decoder(part, "rotary" if getattr(part, "use_rope", True) else None)


def _multi_query(part: nn.Module) -> Entry:
    return attention(part.num_heads, part.head_dim, kv_heads=part.kv_heads)


ATTENTIONS: Mapping[str, Callable[[nn.Module], Entry]] = {
    "Attention": _timm,
    "Attention2d": _convolved,
    "AttentionCl": _plain,
    "pvt_v2.Attention": _plain,
    "AttentionDownsample": lambda part: _wide_values(part, "activation"),
    "ClassAttn": _plain,
    "EvaAttention": _eva,
    "levit.Attention": lambda part: _wide_values(part, "activation"),
    "efficientformer.Attention": _wide_values,
    "MaskUnitAttention": _pooled,
    "vision_transformer_sam.Attention": _refusing("decomposed bias"),
    "TalkingHeadAttn": _refusing("talking heads"),
    "WindowAttention": _plain,
    "swin_transformer_v2.WindowAttention": _refusing("cosine"),
    "WindowAttentionGlobal": _local_or_global,
    "XCA": _refusing("channel attention", "channel attention"),
    "MultiheadAttention": _torch,
    "ShiftedWindowAttention": _plain,
    "AlbertAttention": _plain,
    "BertSelfAttention": _plain,
    "CLIPAttention": _plain,
    "Dinov2Attention": _plain,
    "DisentangledSelfAttention": _refusing("disentangled"),
    "DistilBertSelfAttention": _plain,
    "GPT2Attention": _plain,
    "GPTBigCodeAttention": _multi_query,
    "Gemma2Attention": lambda part: _decoder(part, "softcap"),
    "LlamaAttention": _rotated,
    "MistralAttention": _rotated,
    "ModernBertAttention": _refusing("rotary"),
    "OPTAttention": _plain,
    "PhiAttention": _rotated,
    "Qwen3Attention": lambda part: _decoder(part, "norm"),
    "RobertaSelfAttention": _plain,
    "SiglipAttention": _plain,
    "SiglipMultiheadAttentionPoolingHead": _learned_query,
    "SmolLM3Attention": _rotated,
    "T5Attention": _plain,
    "ViTAttention": _plain,
    "ViTMAEAttention": _plain,
    "Wav2Vec2Attention": _plain,
    "WhisperAttention": _plain,
}
"""How to read every class of attention."""

WHOLE = frozenset({"SiglipMultiheadAttentionPoolingHead"})
"""Classes that say more of the attention inside them than it knows of itself."""

DOWN: Mapping[str, str] = {
    "ConvMlp": "fc2",
    "ConvMlpWithNorm": "fc2",
    "GlobalResponseNormMlp": "fc2",
    "GluMlp": "fc2",
    "LevitMlp": "ln2.linear",
    "Mlp": "fc2",
    "MlpWithDepthwiseConv": "fc2",
    "SEModule": "fc2",
    "SqueezeExcite": "fc2",
    "SwiGLU": "fc2",
    "MLP": "3",
    "MLPBlock": "3",
    "TransformerEncoderLayer": "linear2",
    "AlbertLayer": "ffn_output",
    "BertOutput": "dense",
    "CLIPMLP": "fc2",
    "DebertaV2Output": "dense",
    "Dinov2MLP": "fc2",
    "FFN": "lin2",
    "GPT2MLP": "c_proj",
    "GPTBigCodeMLP": "c_proj",
    "Gemma2MLP": "down_proj",
    "LlamaMLP": "down_proj",
    "MistralMLP": "down_proj",
    "ModernBertMLP": "Wo",
    "OPTDecoderLayer": "fc2",
    "PhiMLP": "fc2",
    "Qwen3MLP": "down_proj",
    "RobertaOutput": "dense",
    "SiglipMLP": "fc2",
    "SmolLM3MLP": "down_proj",
    "T5DenseActDense": "wo",
    "T5DenseGatedActDense": "wo",
    "ViTMAEMLP": "fc2",
    "ViTMLP": "fc2",
    "Wav2Vec2FeedForward": "output_dense",
    "WhisperDecoderLayer": "fc2",
    "WhisperEncoderLayer": "fc2",
}
"""The layer in which every class of MLP ends."""
