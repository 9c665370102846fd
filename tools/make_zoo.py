"""Write tests/zoo: small models as real exporters write them, without their large weights.

Run it from the checkout, in an environment with the ``export`` extra::

    python -m tools.make_zoo            # all models
    python -m tools.make_zoo hf_bert    # those whose name contains a word
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
import transformers
from onnx import numpy_helper

from corp_onnx.export import export
from tests.zoo_models import FOLDER, draw, mark

LARGE = 1024
"""Weights with more values than this are drawn on loading."""

EXPORTERS = {
    "ts17": ("torchscript", 17),
    "dynamo18": ("dynamo", 18),
    "dynamo23": ("dynamo", 23),
}
MODULES = {
    "timm_deit": ("ts17", "dynamo18", "dynamo23"),
    "timm_vit_layerscale": ("ts17", "dynamo18", "dynamo23"),
    "hf_vit_eager": ("ts17", "dynamo18"),
    "hf_vit_sdpa": ("ts17", "dynamo18", "dynamo23"),
    "hf_bert_eager": ("ts17", "dynamo18"),
    "hf_bert_sdpa": ("ts17", "dynamo18", "dynamo23"),
}
"""Which exporters write which of the functions below."""

DEPTH, WIDTH, HIDDEN = 2, 64, 160
TIMM_HEADS, TRANSFORMERS_HEADS = 2, 4
IMAGE, PATCH, CHANNELS = 32, 8, 3
TOKENS, VOCABULARY = 12, 100


def timm_deit() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """Packed query, key and value; scale from timm's fused attention."""
    return _timm("deit_tiny_patch16_224")


def timm_vit_layerscale() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """The same with a LayerScale behind every branch."""
    return _timm("vit_tiny_patch16_224", init_values=0.5)


def hf_vit_eager() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Separate projections; MatMul, scale, Softmax as Python code."""
    return _hf_vit("eager")


def hf_vit_sdpa() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Separate projections; torch's scaled_dot_product_attention."""
    return _hf_vit("sdpa")


def hf_bert_eager() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """An additive mask; norms after the residuals; a dynamic sequence."""
    return _hf_bert("eager")


def hf_bert_sdpa() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The same with a boolean mask into scaled_dot_product_attention."""
    return _hf_bert("sdpa")


def make(name: str, exporter: str, folder: Path) -> dict[str, object]:
    """Write one model into a folder and return the truth about it."""
    path = folder / f"{name}.{exporter}.onnx"
    kind, opset = EXPORTERS[exporter]
    made = export(f"{__file__}:{name}", path, exporter=kind, opset=opset)
    module, examples = globals()[name]()
    model = onnx.load(path)
    parameters = {key: value.detach().numpy() for key, value in module.named_parameters()}
    for tensor in model.graph.initializer:
        _leave_out(tensor, parameters)
    _drop_metadata(model)
    onnx.save(model, path)
    heads = TIMM_HEADS if name.startswith("timm") else TRANSFORMERS_HEADS
    named = (
        examples if isinstance(examples, dict) else dict(zip(made.inputs, examples, strict=True))
    )
    return {
        "mlp": DEPTH,
        "attention": DEPTH,
        "width": WIDTH,
        "heads": heads,
        "head_width": WIDTH // heads,
        "mlp_width": HIDDEN,
        "inputs": {key: _spec(key, value) for key, value in named.items()},
        "dynamic": {key: list(shape) for key, shape in made.inputs.items()},
        "exporter": kind,
        "opset": opset,
    }


def _timm(name: str, **options: float) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    module = timm.create_model(
        name,
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=TIMM_HEADS,
        mlp_ratio=HIDDEN / WIDTH,
        num_classes=10,
        **options,
    )
    return _drawn(module), (torch.randn(2, CHANNELS, IMAGE, IMAGE),)


def _hf_vit(attention: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=TRANSFORMERS_HEADS,
        intermediate_size=HIDDEN,
        image_size=IMAGE,
        patch_size=PATCH,
        attn_implementation=attention,
    )
    module = transformers.ViTModel(config, add_pooling_layer=False)
    return _drawn(module), {"pixel_values": torch.randn(2, CHANNELS, IMAGE, IMAGE)}


def _hf_bert(attention: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=TRANSFORMERS_HEADS,
        intermediate_size=HIDDEN,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * TOKENS,
        attn_implementation=attention,
    )
    module = transformers.BertModel(config, add_pooling_layer=False)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, -2:] = 0
    tokens = torch.randint(0, VOCABULARY, (2, TOKENS))
    return _drawn(module), {"input_ids": tokens, "attention_mask": mask}


def _drawn(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape))))
    return module.eval()


def _leave_out(tensor: onnx.TensorProto, parameters: dict[str, np.ndarray]) -> None:
    """Leave a large tensor out of the file if it is a parameter, as it was or transposed."""
    values = numpy_helper.to_array(tensor)
    for name, parameter in parameters.items() if values.size > LARGE else ():
        for transposed, form in ((False, parameter), (True, parameter.T)):
            if np.array_equal(values, form):
                mark(tensor, name, transposed=transposed)
                return


def _drop_metadata(model: onnx.ModelProto) -> None:
    """Remove what torch notes about its own sources: stack traces with paths of this machine."""
    graph = model.graph
    del model.metadata_props[:]
    del graph.metadata_props[:]
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    for node in graph.node:
        node.ClearField("doc_string")


def _spec(name: str, example: torch.Tensor) -> dict[str, object]:
    high = {"input_ids": VOCABULARY, "attention_mask": 2}.get(name)
    return {"shape": list(example.shape), "dtype": str(example.numpy().dtype), "high": high}


def main(words: list[str]) -> None:
    """Write the models whose names contain every word, and the truth about all of them."""
    wanted = [
        (name, exporter)
        for name, exporters in MODULES.items()
        for exporter in exporters
        if all(word in f"{name}.{exporter}" for word in words)
    ]
    path = FOLDER / "truth.json"
    truth = json.loads(path.read_text()) if path.is_file() else {}
    FOLDER.mkdir(exist_ok=True)
    for name, exporter in wanted:
        truth[f"{name}.{exporter}"] = make(name, exporter, FOLDER)
        print(f"{name}.{exporter}")
    path.write_text(json.dumps(dict(sorted(truth.items())), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
