"""Vision transformers of timm with one width throughout."""

from __future__ import annotations

import timm
from timm.models.mlp_mixer import MlpMixer

from tools.zoo.sample import (
    CLASSES,
    DEPTH,
    HIDDEN,
    IMAGE,
    PATCH,
    TIMM_HEADS,
    WIDTH,
    Sample,
    image,
    unfused,
)

NARROW, NARROW_HEADS = 48, 3


def timm_deit() -> Sample:
    """Packed query, key and value; scale from timm's fused attention."""
    return _classic("deit_tiny_patch16_224")


def timm_deit_eager() -> Sample:
    """The same with attention as Python code."""
    return unfused(timm_deit())


def timm_vit_layerscale() -> Sample:
    """The same with a LayerScale behind every branch."""
    return _classic("vit_tiny_patch16_224", init_values=0.5)


def timm_deit3() -> Sample:
    """LayerScale, and a class token without a position."""
    return _vit("deit3_small_patch16_224")


def timm_vit_qk_norm() -> Sample:
    """Queries and keys are normalised over a head's channels."""
    return _vit("vit_tiny_patch16_224", qk_norm=True)


def timm_parallel() -> Sample:
    """Attention and MLP side by side, with one layer for all projections and hidden channels."""
    return _vit("vit_pwee_patch16_reg1_gap_256")


def timm_parallel_normed() -> Sample:
    """The same with norms of queries and keys."""
    return _vit("vit_base_patch16_xp_224")


def timm_dinov2_registers() -> Sample:
    """Registers among the tokens."""
    return _vit("vit_small_patch14_reg4_dinov2")


def timm_dinov2_swiglu() -> Sample:
    """A gated MLP with both halves in one layer."""
    return _vit("vit_giant_patch14_reg4_dinov2")


def timm_dinov3() -> Sample:
    """Queries and keys of image tokens are rotated; keys have no bias."""
    return _vit("vit_small_patch16_dinov3")


def timm_dinov3_eager() -> Sample:
    """The same with attention as Python code."""
    return unfused(timm_dinov3())


def timm_dinov3_plus() -> Sample:
    """The same with a gated MLP of two layers."""
    return _vit("vit_small_plus_patch16_dinov3")


def timm_beit() -> Sample:
    """A relative position bias; keys have no bias."""
    return _vit("beit_base_patch16_224")


def timm_beit_eager() -> Sample:
    """The same with attention as Python code."""
    return unfused(timm_beit())


def timm_eva02() -> Sample:
    """Rotated queries and keys, a packed gated MLP."""
    return _vit("eva02_tiny_patch14_224")


def timm_eva02_eager() -> Sample:
    """The same with attention as Python code."""
    return unfused(timm_eva02())


def timm_eva02_large() -> Sample:
    """Separate projections, two gates, and a norm over the hidden channels."""
    return _vit("eva02_large_patch14_224")


def timm_cait() -> Sample:
    """Logits and probabilities of heads are mixed; the class token attends apart."""
    return _vit("cait_xxs24_224", depth_token_only=1)


def timm_mixer() -> Sample:
    """MLPs over tokens, and MLPs over channels."""
    module = MlpMixer(
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=NARROW,
        num_blocks=DEPTH,
        num_classes=CLASSES,
    )
    return module, image()


def timm_xcit() -> Sample:
    """Channels attend to channels; at the end the class token attends to tokens."""
    return _vit("xcit_nano_12_p8_224", depth=1, cls_attn_layers=1)


def timm_samvit() -> Sample:
    """Windows, and a bias of the logits that the queries take part in."""
    module = timm.create_model(
        "samvit_base_patch16",
        img_size=2 * IMAGE,
        patch_size=PATCH,
        embed_dim=NARROW,
        depth=DEPTH,
        num_heads=NARROW_HEADS,
        neck_chans=16,
        window_size=4,
        global_attn_indexes=(1,),
        num_classes=CLASSES,
    )
    return module, image(2 * IMAGE)


def timm_samvit_eager() -> Sample:
    """The same with attention as Python code."""
    return unfused(timm_samvit())


def _classic(name: str, **options: float) -> Sample:
    module = timm.create_model(
        name,
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=TIMM_HEADS,
        mlp_ratio=HIDDEN / WIDTH,
        num_classes=CLASSES,
        **options,
    )
    return module, image()


def _vit(name: str, *, depth: int = DEPTH, **options: float) -> Sample:
    module = timm.create_model(
        name,
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=NARROW,
        depth=depth,
        num_heads=NARROW_HEADS,
        num_classes=CLASSES,
        **options,
    )
    return module, image()
