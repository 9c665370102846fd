"""Networks of timm whose width changes from stage to stage."""

from __future__ import annotations

import timm
from timm.models.gcvit import GlobalContextVit
from torch import nn

from tools.zoo.sample import CLASSES, IMAGE, Sample, image, unfused

LARGE_IMAGE = 2 * IMAGE
WIDTHS = (16, 24, 32, 48)
ONE_EACH = (1, 1, 1, 1)


def timm_swin() -> Sample:
    """Windows, shifted in every second block, and a relative position bias."""
    return _swin("swin_tiny_patch4_window7_224", (2, 1))


def timm_swinv2() -> Sample:
    """Logits are cosines; norms behind the branches."""
    module, inputs = _swin("swinv2_tiny_window8_256", (2,))
    for part in module.modules():
        if hasattr(part, "cpb_mlp"):  # 512 channels wide, which exporters fold into large constants
            heads = part.num_heads
            part.cpb_mlp = nn.Sequential(
                nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, heads, bias=False)
            )
    return module, inputs


def timm_maxvit() -> Sample:
    """Blocks of an inverted bottleneck, attention in windows, attention on a grid."""
    return _maxxvit("maxvit_rmlp_pico_rw_256", (16,), ("M",), transformer_window_size=(4, 4))


def timm_maxvit_eager() -> Sample:
    """The same with attention as Python code."""
    return unfused(timm_maxvit())


def timm_coatnet() -> Sample:
    """Attention whose projections are convolutions."""
    return _maxxvit("coatnet_rmlp_nano_rw_224", (16, 32), ("C", "T"))


def timm_pvt_v2() -> Sample:
    """Keys and values of a smaller image; a depthwise convolution inside every MLP."""
    return timm.create_model(
        "pvt_v2_b0",
        depths=ONE_EACH,
        embed_dims=WIDTHS,
        num_heads=(1, 2, 4, 4),
        num_classes=CLASSES,
    ), image(LARGE_IMAGE)


def timm_convnext() -> Sample:
    """MLPs of linear layers, channels last."""
    return _convnext("convnext_atto", conv_mlp=False)


def timm_convnext_conv() -> Sample:
    """MLPs of 1 x 1 convolutions."""
    return _convnext("convnext_atto", conv_mlp=True)


def timm_convnextv2() -> Sample:
    """Hidden channels are compared to each other inside every MLP."""
    return _convnext("convnextv2_atto", conv_mlp=False)


def timm_levit() -> Sample:
    """Batch norms behind linear layers; an activation before every output projection."""
    return timm.create_model(
        "levit_128s",
        img_size=LARGE_IMAGE,
        embed_dim=(32, 48, 64),
        key_dim=8,
        depth=(1, 1, 1),
        num_heads=(2, 3, 4),
        num_classes=CLASSES,
    ), image(LARGE_IMAGE)


def timm_gcvit() -> Sample:
    """Every second block takes its queries from the whole image."""
    return GlobalContextVit(
        img_size=LARGE_IMAGE,
        depths=(2,),
        num_heads=(2,),
        embed_dim=16,
        window_ratio=(16,),
        num_classes=CLASSES,
    ), image(LARGE_IMAGE)


def timm_efficientformer() -> Sample:
    """Values wider than queries; MLPs of convolutions, at the end of linear layers."""
    return timm.create_model(
        "efficientformer_l1",
        depths=(1, 1, 1, 2),
        embed_dims=(8, 16, 24, 32),
        num_vit=1,
        num_classes=CLASSES,
    ), image(224)


def timm_hiera() -> Sample:
    """Queries are pooled where a stage begins."""
    return timm.create_model(
        "hiera_tiny_224",
        img_size=(LARGE_IMAGE, LARGE_IMAGE),
        embed_dim=16,
        num_heads=1,
        stages=(1, 1, 1),
        q_pool=2,
        mask_unit_size=(4, 4),
        mask_unit_attn=(True, True, False),
        num_classes=CLASSES,
    ), image(LARGE_IMAGE)


def timm_hiera_eager() -> Sample:
    """The same with attention as Python code."""
    return unfused(timm_hiera())


def _swin(name: str, depths: tuple[int, ...]) -> Sample:
    return timm.create_model(
        name,
        img_size=IMAGE,
        embed_dim=16,
        depths=depths,
        num_heads=(2, 4)[: len(depths)],
        window_size=4,
        num_classes=CLASSES,
    ), image()


def _maxxvit(
    name: str, widths: tuple[int, ...], kinds: tuple[str, ...], **options: object
) -> Sample:
    return timm.create_model(
        name,
        img_size=LARGE_IMAGE,
        embed_dim=widths,
        depths=(1,) * len(widths),
        block_type=kinds,
        stem_width=8,
        transformer_dim_head=8,
        transformer_rel_pos_dim=16,
        head_hidden_size=None,
        num_classes=CLASSES,
        **options,
    ), image(LARGE_IMAGE)


def _convnext(name: str, *, conv_mlp: bool) -> Sample:
    return timm.create_model(
        name, depths=ONE_EACH, dims=WIDTHS, conv_mlp=conv_mlp, num_classes=CLASSES
    ), image(LARGE_IMAGE)
