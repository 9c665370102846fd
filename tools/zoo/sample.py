"""Sizes that all modules share, and their example inputs."""

from __future__ import annotations

import torch

from tests.zoo_models import TOKENS, VOCABULARY

Examples = tuple[torch.Tensor, ...] | dict[str, torch.Tensor]
"""Inputs by place or by name."""

Sample = tuple[torch.nn.Module, Examples]
"""A module and its example inputs."""

DEPTH, WIDTH, HIDDEN = 2, 64, 160
"""Of the ViTs and BERTs that are written in every form."""

TIMM_HEADS, TRANSFORMERS_HEADS = 2, 4
BATCH, IMAGE, PATCH, CHANNELS, CLASSES = 2, 32, 8, 3, 10


def image(size: int = IMAGE) -> tuple[torch.Tensor]:
    """A batch of images, by place."""
    return (torch.randn(BATCH, CHANNELS, size, size),)


def pixels(size: int = IMAGE) -> dict[str, torch.Tensor]:
    """A batch of images, by the name that transformers has for it."""
    return {"pixel_values": image(size)[0]}


def text() -> dict[str, torch.Tensor]:
    """Two texts; the second one is two tokens shorter."""
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    mask[1, -2:] = 0
    return {"input_ids": words(), "attention_mask": mask}


def words() -> torch.Tensor:
    """Two texts of one length."""
    return torch.randint(0, VOCABULARY, (BATCH, TOKENS))


def unfused(given: Sample) -> Sample:
    """A timm model with attention as products and a Softmax."""
    for part in given[0].modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return given
