"""Causal language models of transformers, without a cache and without their heads."""

from __future__ import annotations

import transformers

from tests.zoo_models import TOKENS, VOCABULARY
from tools.zoo.sample import DEPTH, Sample, text

WIDTH, HEADS, KV_HEADS, HIDDEN = 48, 4, 2, 80
POSITIONS = 4 * TOKENS
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}


def hf_opt() -> Sample:
    """Scaled queries, biases everywhere, ReLU."""
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        ffn_dim=HIDDEN,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=WIDTH,
        **MARKS,
    )
    return transformers.OPTModel(config), text()


def hf_gpt2() -> Sample:
    """Packed projections as Gemm."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=DEPTH,
        n_head=HEADS,
        n_inner=HIDDEN,
        n_positions=POSITIONS,
        **MARKS,
    )
    return transformers.GPT2Model(config), text()


def hf_gpt_bigcode() -> Sample:
    """All query heads share one head of keys and values, without rotation."""
    config = transformers.GPTBigCodeConfig(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=DEPTH,
        n_head=HEADS,
        n_inner=HIDDEN,
        n_positions=POSITIONS,
        multi_query=True,
        **MARKS,
    )
    return transformers.GPTBigCodeModel(config), text()


def hf_llama() -> Sample:
    """Rotated queries and keys, grouped heads, a gated MLP, no biases."""
    return transformers.LlamaModel(transformers.LlamaConfig(**_sizes())), text()


def hf_llama_eager() -> Sample:
    """The same with MatMul, mask and Softmax as Python code."""
    config = transformers.LlamaConfig(**_sizes(), attn_implementation="eager")
    return transformers.LlamaModel(config), text()


def hf_mistral() -> Sample:
    """The same with a sliding window."""
    config = transformers.MistralConfig(**_sizes(1), sliding_window=8)
    return transformers.MistralModel(config), text()


def hf_qwen3() -> Sample:
    """Queries and keys are normalised, then rotated."""
    config = transformers.Qwen3Config(**_sizes(1), head_dim=16)
    return transformers.Qwen3Model(config), text()


def hf_smollm3() -> Sample:
    """Every second layer has grouped heads that are not rotated."""
    config = transformers.SmolLM3Config(**_sizes(), no_rope_layers=[1, 0])
    return transformers.SmolLM3Model(config), text()


def hf_gemma() -> Sample:
    """One head of keys and values, heads wider than the stream, a gated GELU."""
    sizes = _sizes(1) | {"num_key_value_heads": 1}
    return transformers.GemmaModel(transformers.GemmaConfig(**sizes, head_dim=16)), text()


def hf_gemma2() -> Sample:
    """Logits are capped by a tanh; norms before and behind every branch."""
    config = transformers.Gemma2Config(
        **_sizes(), head_dim=16, query_pre_attn_scalar=16, sliding_window=8
    )
    config._attn_implementation = "eager"
    return transformers.Gemma2Model(config), text()


def hf_phi() -> Sample:
    """Part of every head is rotated; attention and MLP side by side."""
    config = transformers.PhiConfig(
        **{**_sizes(1), "num_key_value_heads": HEADS}, partial_rotary_factor=0.5
    )
    return transformers.PhiModel(config), text()


def _sizes(depth: int = DEPTH) -> dict[str, int]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": depth,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": POSITIONS,
        **MARKS,
    }
