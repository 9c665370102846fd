"""Torch modules to export, with weights that all do visible work.

Fresh modules of timm and transformers have zero biases and nearly uniform attention: a wrong fold
would hardly show. `draw` gives every parameter a value of its own.
"""

from __future__ import annotations

import timm
import torch
import transformers

from tests.zoo_models import draw
from tools.fetch_assets import FOLDER

IMAGE, CHANNELS = 224, 3
SMALL_IMAGE, SMALL_PATCH = 64, 8
DEEP, QUARTER = 28, 8
TOKENS, VOCABULARY, POSITIONS = 12, 1000, 64

Inputs = tuple[torch.Tensor, ...] | dict[str, torch.Tensor]


def deit_s() -> tuple[torch.nn.Module, Inputs]:
    """DeiT-S: packed query, key and value."""
    return _timm("deit_small_patch16_224")


def vit_s() -> tuple[torch.nn.Module, Inputs]:
    """ViT-S with a LayerScale behind every branch."""
    return _timm("vit_small_patch16_224", init_values=0.5)


def vit_deep() -> tuple[torch.nn.Module, Inputs]:
    """Many nodes and few weights: 28 blocks, norms of queries and keys."""
    return _timm("vit_tiny_patch16_224", depth=DEEP, qk_norm=True)


def dinov2_s() -> tuple[torch.nn.Module, Inputs]:
    """DINOv2 ViT-S: patches of 14 pixels, so a third more tokens, and LayerScale."""
    return _timm("vit_small_patch14_dinov2", img_size=IMAGE)


def deit_h() -> tuple[torch.nn.Module, Inputs]:
    """A quarter of DeiT-H: 8 of its 32 blocks, which are all alike."""
    return _timm("deit3_huge_patch14_224", depth=QUARTER)


def hf_vit_eager() -> tuple[torch.nn.Module, Inputs]:
    """Separate projections; MatMul, scale and Softmax as Python code."""
    return _hf_vit("eager")


def hf_vit_sdpa() -> tuple[torch.nn.Module, Inputs]:
    """Separate projections; torch's scaled_dot_product_attention."""
    return _hf_vit("sdpa")


def hf_bert_eager() -> tuple[torch.nn.Module, Inputs]:
    """An additive mask; norms after the residuals; a dynamic sequence."""
    return _hf_bert("eager")


def hf_bert_sdpa() -> tuple[torch.nn.Module, Inputs]:
    """The same with a mask into scaled_dot_product_attention."""
    return _hf_bert("sdpa")


def minilm_l6_eager() -> tuple[torch.nn.Module, Inputs]:
    """all-MiniLM-L6 as fetched; MatMul, scale and Softmax as Python code."""
    return _minilm("eager")


def minilm_l6_sdpa() -> tuple[torch.nn.Module, Inputs]:
    """The same with torch's scaled_dot_product_attention."""
    return _minilm("sdpa")


def minilm_l6_drawn() -> tuple[torch.nn.Module, Inputs]:
    """The shape of all-MiniLM-L6, for its times."""
    return _hf_bert("eager", width=384, layers=6, heads=12, positions=512)


def smollm2() -> tuple[torch.nn.Module, Inputs]:
    """SmolLM2-135M as fetched, dequantised to float32; from token numbers to logits."""
    return _smollm2(), {"input_ids": torch.randint(0, VOCABULARY, (2, TOKENS))}


def smollm2_masked() -> tuple[torch.nn.Module, Inputs]:
    """The same with a mask: without one, transformers looks for packed texts by `diff`.

    The TorchScript exporter has no form for that.
    """
    return _smollm2(), _sentences()


def _smollm2() -> torch.nn.Module:
    language_model = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, gguf_file="smollm2.gguf", dtype=torch.float32
    )
    language_model.generation_config = None

    class Reading(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = language_model

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
        ) -> torch.Tensor:
            given = {"input_ids": input_ids, "attention_mask": attention_mask}
            logits: torch.Tensor = self.model(**given, use_cache=False).logits
            return logits

    return Reading().eval()


def _minilm(attention: str) -> tuple[torch.nn.Module, Inputs]:
    module = transformers.AutoModel.from_pretrained(
        FOLDER / "minilm_l6", attn_implementation=attention, add_pooling_layer=False
    )
    return module.eval(), _sentences()


def _sentences() -> dict[str, torch.Tensor]:
    """Two texts, the second shorter."""
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, -2:] = 0
    return {"input_ids": torch.randint(0, VOCABULARY, (2, TOKENS)), "attention_mask": mask}


def _timm(name: str, **options: float) -> tuple[torch.nn.Module, Inputs]:
    module = timm.create_model(name, num_classes=10, **options)
    return _drawn(module), (torch.randn(2, CHANNELS, IMAGE, IMAGE),)


def _hf_vit(attention: str) -> tuple[torch.nn.Module, Inputs]:
    config = transformers.ViTConfig(
        hidden_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=SMALL_IMAGE,
        patch_size=SMALL_PATCH,
        attn_implementation=attention,
    )
    module = transformers.ViTModel(config, add_pooling_layer=False)
    return _drawn(module), {"pixel_values": torch.randn(2, CHANNELS, SMALL_IMAGE, SMALL_IMAGE)}


def _hf_bert(
    attention: str, *, width: int = 128, layers: int = 3, heads: int = 4, positions: int = POSITIONS
) -> tuple[torch.nn.Module, Inputs]:
    config = transformers.BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=VOCABULARY,
        max_position_embeddings=positions,
        attn_implementation=attention,
    )
    module = transformers.BertModel(config, add_pooling_layer=False)
    return _drawn(module), _sentences()


def _drawn(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))))
    return module.eval()
