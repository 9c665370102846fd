"""The attention and the encoder layers of torch itself, and the models of torchvision."""

from __future__ import annotations

from functools import partial

import torch
import torchvision
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

from tests.zoo_models import TOKENS, VOCABULARY
from tools.zoo.sample import BATCH, CLASSES, DEPTH, IMAGE, PATCH, Sample, image, words

WIDTH, HEADS, HIDDEN, VECTOR = 48, 3, 112, 8


class Reader(nn.Module):
    """Words into a layer, and every token into scores."""

    def __init__(self, layer: nn.Module, *, tokens_first: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = layer
        self.tokens_first = tokens_first
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Scores of every token."""
        x = self.embedding(input_ids)
        x = self.layer(x.transpose(0, 1)).transpose(0, 1) if self.tokens_first else self.layer(x)
        return self.head(x)


class VectorReader(nn.Module):
    """Vectors into a layer; TorchScript makes their number a constant."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(VECTOR, WIDTH)
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Every vector, changed."""
        return self.layer(self.stem(x))


class SelfAttention(nn.Module):
    """Attention of tokens to each other, with a residual around it."""

    def __init__(self, *, batch_first: bool, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.weights = weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One attention."""
        return x + self.attention(x, x, x, need_weights=self.weights)[0]


def torch_attention() -> Sample:
    """``nn.MultiheadAttention`` on scaled_dot_product_attention."""
    return _reader(SelfAttention(batch_first=True, weights=False))


def torch_attention_weights() -> Sample:
    """The same as products and a Softmax, four axes in three."""
    return _reader(SelfAttention(batch_first=True, weights=True))


def torch_attention_tokens_first() -> Sample:
    """The same with the batch as second axis, as it was in the beginning."""
    return _reader(SelfAttention(batch_first=False, weights=False), tokens_first=True)


def torch_encoder() -> Sample:
    """``nn.TransformerEncoder`` with norms behind the branches and ReLU."""
    return _encoder(batch_first=True, norm_first=False, activation="relu")


def torch_encoder_norm_first() -> Sample:
    """The same with norms before the branches and GELU."""
    return _encoder(batch_first=True, norm_first=True, activation="gelu")


def torch_encoder_tokens_first() -> Sample:
    """Tokens as first axis."""
    return _encoder(batch_first=False, norm_first=False, activation="relu")


def torch_attention_of_vectors() -> Sample:
    """``nn.MultiheadAttention`` on a fixed number of vectors."""
    module = VectorReader(SelfAttention(batch_first=True, weights=True))
    return module, (torch.randn(BATCH, TOKENS, VECTOR),)


def torch_encoder_of_vectors() -> Sample:
    """``nn.TransformerEncoder`` on a fixed number of vectors."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
    module = VectorReader(nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False))
    return module, (torch.randn(BATCH, TOKENS, VECTOR),)


def torchvision_vit() -> Sample:
    """``nn.MultiheadAttention`` in a ViT."""
    return torchvision.models.VisionTransformer(
        image_size=IMAGE,
        patch_size=PATCH,
        num_layers=DEPTH,
        num_heads=HEADS,
        hidden_dim=WIDTH,
        mlp_dim=HIDDEN,
        num_classes=CLASSES,
    ), image()


def torchvision_swin() -> Sample:
    """Windows and shifts as one function; sizes computed from shapes."""
    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2],
        num_heads=[2],
        window_size=[4, 4],
        num_classes=CLASSES,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    ), image()


def _reader(layer: nn.Module, *, tokens_first: bool = False) -> Sample:
    return Reader(layer, tokens_first=tokens_first), {"input_ids": words()}


def _encoder(*, batch_first: bool, norm_first: bool, activation: str) -> Sample:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, HIDDEN, activation=activation, batch_first=batch_first, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
    return _reader(encoder, tokens_first=not batch_first)
