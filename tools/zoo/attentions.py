"""How many heads an attention has, and what of it can be cut, by its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from tools.zoo.entries import QK, VO, Entry, attention


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
    "Attention2d": _plain,
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
    "ParallelScalingBlock": _timm,
    "ShiftedWindowAttention": _plain,
    "AlbertAttention": _plain,
    "BertSelfAttention": _plain,
    "CLIPAttention": _plain,
    "Dinov2Attention": _plain,
    "DINOv3ViTAttention": _refusing("rotary"),
    "DisentangledSelfAttention": _refusing("disentangled"),
    "DistilBertSelfAttention": _plain,
    "GPT2Attention": _plain,
    "GPTBigCodeAttention": _multi_query,
    "GemmaAttention": _rotated,
    "Gemma2Attention": lambda part: _decoder(part, "softcap"),
    "LlamaAttention": _rotated,
    "MistralAttention": _rotated,
    "ModernBertAttention": _refusing("rotary"),
    "OPTAttention": _plain,
    "PhiAttention": _rotated,
    "Qwen3Attention": lambda part: _decoder(part, "norm"),
    "RobertaSelfAttention": _plain,
    "SamVisionAttention": _refusing("decomposed bias"),
    "SamVisionSdpaAttention": _refusing("decomposed bias"),
    "SiglipAttention": _plain,
    "SmolLM3Attention": _rotated,
    "T5Attention": _plain,
    "ViTAttention": _plain,
    "ViTMAEAttention": _plain,
    "Wav2Vec2Attention": _plain,
    "WhisperAttention": _plain,
}
"""How to read every class of attention."""
