"""Encoders of text from transformers, and ViTs that are written in every form like them."""

from __future__ import annotations

import torch
import transformers

from tests.zoo_models import TOKENS, VOCABULARY
from tools.zoo.sample import (
    BATCH,
    DEPTH,
    HIDDEN,
    IMAGE,
    PATCH,
    TRANSFORMERS_HEADS,
    WIDTH,
    Sample,
    pixels,
    text,
)

NARROW, NARROW_HEADS, NARROW_HIDDEN = 48, 3, 112
POSITIONS = 4 * TOKENS


def hf_vit_eager() -> Sample:
    """Separate projections; MatMul, scale, Softmax as Python code."""
    return _vit("eager")


def hf_vit_sdpa() -> Sample:
    """Separate projections; torch's scaled_dot_product_attention."""
    return _vit("sdpa")


def hf_bert_eager() -> Sample:
    """An additive mask; norms after the residuals; a dynamic sequence."""
    return _bert("eager")


def hf_bert_sdpa() -> Sample:
    """The same with a boolean mask into scaled_dot_product_attention."""
    return _bert("sdpa")


def hf_roberta() -> Sample:
    """Positions are counted from the words."""
    return transformers.RobertaModel(
        transformers.RobertaConfig(**_sizes(), pad_token_id=1), add_pooling_layer=False
    ), text()


def hf_distilbert() -> Sample:
    """Names of its own, and a mask of minus infinities."""
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        dim=NARROW,
        hidden_dim=NARROW_HIDDEN,
        n_layers=DEPTH,
        n_heads=NARROW_HEADS,
    )
    return transformers.DistilBertModel(config), text()


def hf_albert() -> Sample:
    """Every layer has the same weights."""
    config = transformers.AlbertConfig(**_sizes(), embedding_size=24)
    return transformers.AlbertModel(config, add_pooling_layer=False), text()


def hf_deberta() -> Sample:
    """Logits have terms of content and position."""
    config = transformers.DebertaV2Config(
        **_sizes(1),
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        type_vocab_size=0,
    )
    return transformers.DebertaV2Model(config), text()


def hf_t5() -> Sample:
    """No scale, no biases, a relative position bias, norms without a mean."""
    return _t5("relu")


def hf_t5_eager() -> Sample:
    """The same with attention as Python code."""
    return _t5("relu", attn_implementation="eager")


def hf_t5_gated() -> Sample:
    """The same with a gated MLP."""
    return _t5("gated-gelu")


def hf_t5_gated_eager() -> Sample:
    """The same with attention as Python code."""
    return _t5("gated-gelu", attn_implementation="eager")


def hf_modernbert() -> Sample:
    """Rotated queries and keys, a packed gated MLP, windows over the sequence."""
    config = transformers.ModernBertConfig(
        **_sizes(),
        local_attention=8,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return transformers.ModernBertModel(config), text()


def hf_clip_text() -> Sample:
    """A causal mask, and a sentence read off at its end."""
    config = transformers.CLIPTextConfig(
        **_sizes(), projection_dim=NARROW, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return transformers.CLIPTextModel(config), text()


def hf_whisper_decoder() -> Sample:
    """Attention to words, and attention to what an encoder made of sounds."""
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=NARROW,
        decoder_layers=DEPTH,
        decoder_attention_heads=NARROW_HEADS,
        decoder_ffn_dim=NARROW_HIDDEN,
        max_target_positions=POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
    )
    module = transformers.models.whisper.modeling_whisper.WhisperDecoder(config)
    return module, {
        **text(),
        "encoder_hidden_states": torch.randn(BATCH, 10, NARROW),
    }


def _t5(activation: str, **options: str) -> Sample:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=NARROW,
        d_kv=12,
        d_ff=NARROW_HIDDEN,
        num_layers=DEPTH,
        num_heads=NARROW_HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj=activation,
        use_cache=False,
        **options,
    )
    return transformers.T5EncoderModel(config), text()


def _sizes(depth: int = DEPTH) -> dict[str, int]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": NARROW,
        "num_hidden_layers": depth,
        "num_attention_heads": NARROW_HEADS,
        "intermediate_size": NARROW_HIDDEN,
        "max_position_embeddings": POSITIONS,
    }


def _vit(attention: str) -> Sample:
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=TRANSFORMERS_HEADS,
        intermediate_size=HIDDEN,
        image_size=IMAGE,
        patch_size=PATCH,
        attn_implementation=attention,
    )
    return transformers.ViTModel(config, add_pooling_layer=False), pixels()


def _bert(attention: str) -> Sample:
    config = transformers.BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=TRANSFORMERS_HEADS,
        intermediate_size=HIDDEN,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * TOKENS,
        attn_implementation=attention,
    )
    return transformers.BertModel(config, add_pooling_layer=False), text()
