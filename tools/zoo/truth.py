"""What a torch module holds, told by its own attributes: every MLP and every attention that runs.

Nothing of corp_onnx is asked. What may be cut exactly follows from what a class is known to do:
whatever stands between a projection and its product refuses that axis, under a short key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from tools.zoo.attentions import ATTENTIONS
from tools.zoo.entries import MLP, Entry, mlp

DOWN: Mapping[str, str] = {
    "ConvMlp": "fc2",
    "ConvMlpWithNorm": "fc2",
    "GlobalResponseNormMlp": "fc2",
    "GluMlp": "fc2",
    "LevitMlp": "ln2.linear",
    "Mlp": "fc2",
    "MlpWithDepthwiseConv": "fc2",
    "ParallelScalingBlock": "mlp_out_proj",
    "SEModule": "fc2",
    "SqueezeExcite": "fc2",
    "SwiGLU": "fc2",
    "MLP": "3",
    "MLPBlock": "3",
    "TransformerEncoderLayer": "linear2",
    "AlbertLayer": "ffn_output",
    "BertOutput": "dense",
    "CLIPMLP": "fc2",
    "DINOv3ViTMLP": "down_proj",
    "DebertaV2Output": "dense",
    "Dinov2MLP": "fc2",
    "FFN": "lin2",
    "GPT2MLP": "c_proj",
    "GPTBigCodeMLP": "c_proj",
    "GemmaMLP": "down_proj",
    "Gemma2MLP": "down_proj",
    "LlamaMLP": "down_proj",
    "MistralMLP": "down_proj",
    "ModernBertMLP": "Wo",
    "OPTDecoderLayer": "fc2",
    "PhiMLP": "fc2",
    "Qwen3MLP": "down_proj",
    "RobertaOutput": "dense",
    "SamMLPBlock": "lin2",
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


def blocks_of(module: nn.Module, run: Callable[[], object]) -> list[Entry]:
    """An entry for every run of an MLP or an attention, in the order of running.

    An MLP that makes a bias of relative positions is none of the model's data.
    """
    entries: list[Entry] = []
    hooks = [
        part.register_forward_hook(lambda part, *_: entries.extend(_entries(part)))
        for name, part in module.named_modules()
        if _kind(part) in ATTENTIONS.keys() | DOWN.keys() and "rel_pos" not in name
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return entries


def _entries(part: nn.Module) -> Iterator[Entry]:
    kind = _kind(part)
    if kind in ATTENTIONS:
        yield ATTENTIONS[kind](part)
    if kind in DOWN:
        yield mlp(_width_in(part.get_submodule(DOWN[kind])), {MLP: _inside(part)})


def _kind(part: nn.Module) -> str:
    """The name of a module's class; where classes share one, with that of the file before it."""
    kind, place = type(part).__name__, type(part).__module__.rpartition(".")[2]
    return f"{place}.{kind}" if f"{place}.{kind}" in ATTENTIONS else kind


def _width_in(layer: nn.Module) -> int:
    """How many channels a linear layer, a convolution or GPT-2's Conv1D takes."""
    rows, columns = layer.weight.shape[:2]
    return int(rows if type(layer).__name__ == "Conv1D" else columns)


def _inside(part: nn.Module) -> str | None:
    """What mixes the hidden channels of an MLP."""
    if type(part).__name__ == "GlobalResponseNormMlp":
        return "channels compared"
    return "norm" if isinstance(getattr(part, "norm", None), nn.LayerNorm) else None
