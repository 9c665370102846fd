"""Encoders of images and of sounds from transformers."""

from __future__ import annotations

import torch
import transformers

from tools.zoo.sample import BATCH, DEPTH, IMAGE, PATCH, Sample, pixels

WIDTH, HEADS, HIDDEN = 48, 3, 112
MELS, FRAMES, SOUND = 16, 24, 400


def hf_clip_vision() -> Sample:
    """A norm before the first block; the activation is x sigmoid(1.702 x)."""
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_sizes())), pixels()


def hf_siglip() -> Sample:
    """At the end a learned query attends to the image."""
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_sizes())), pixels()


def hf_vit_mae() -> Sample:
    """Which tokens are seen depends on an input."""
    config = transformers.ViTMAEConfig(
        **_sizes(),
        decoder_hidden_size=WIDTH,
        decoder_intermediate_size=HIDDEN,
        decoder_num_attention_heads=HEADS,
        decoder_num_hidden_layers=1,
        mask_ratio=0.5,
    )
    noise = torch.rand(BATCH, (IMAGE // PATCH) ** 2)
    return transformers.ViTMAEModel(config), {**pixels(), "noise": noise}


def hf_dinov2() -> Sample:
    """LayerScale, separate projections."""
    return transformers.Dinov2Model(transformers.Dinov2Config(**_sizes(), mlp_ratio=2)), pixels()


def hf_dinov3() -> Sample:
    """Registers, rotated queries and keys; whether positions are drawn anew is an If."""
    config = transformers.DINOv3ViTConfig(**_sizes(), num_register_tokens=2)
    return transformers.DINOv3ViTModel(config), pixels()


def hf_sam() -> Sample:
    """Decomposed relative positions, by Einsum of queries and a table; windows."""
    config = transformers.SamVisionConfig(
        **{key: value for key, value in _sizes().items() if key != "intermediate_size"},
        output_channels=16,
        window_size=2,
        global_attn_indexes=[1],
        mlp_dim=HIDDEN,
    )
    return transformers.SamVisionModel(config), pixels()


def hf_whisper_encoder() -> Sample:
    """Keys without a bias, two convolutions before."""
    config = transformers.WhisperConfig(
        d_model=WIDTH,
        encoder_layers=DEPTH,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        num_mel_bins=MELS,
        max_source_positions=FRAMES // 2,
    )
    module = transformers.models.whisper.modeling_whisper.WhisperEncoder(config)
    return module, {"input_features": torch.randn(BATCH, MELS, FRAMES)}


def hf_wav2vec2() -> Sample:
    """Convolutions for features and for positions."""
    config = transformers.Wav2Vec2Config(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        apply_spec_augment=False,
    )
    return transformers.Wav2Vec2Model(config), {"input_values": torch.randn(BATCH, SOUND)}


def _sizes() -> dict[str, int]:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": HIDDEN,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
