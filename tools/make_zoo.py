"""Write tests/zoo: small models as real exporters write them, without their large weights.

Run it from the checkout, in an environment with the extras ``export`` and ``dev``::

    python -m tools.make_zoo                 # all models
    python -m tools.make_zoo hf_bert ts17    # those whose name contains all these words
    python -m tools.make_zoo --truth         # no models, only the truth about all of them
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import onnx
import torch

from tests.zoo_models import FOLDER, draw
from tools.zoo import (
    converters,
    decoders,
    forms,
    senses,
    texts,
    timm_stages,
    timm_vits,
    torch_layers,
)
from tools.zoo.entries import Entry
from tools.zoo.sample import DEPTH, HIDDEN, TRANSFORMERS_HEADS, WIDTH, Sample
from tools.zoo.strip import strip
from tools.zoo.table import MODULES
from tools.zoo.truth import blocks_of

__all__ = ["DEPTH", "HIDDEN", "TRANSFORMERS_HEADS", "WIDTH", "main", "make", "sample"]

FAMILIES = (timm_vits, timm_stages, texts, decoders, senses, torch_layers)


def sample(name: str) -> Sample:
    """A module by its name in the table, with its weights drawn, and its example inputs."""
    (family,) = (family for family in FAMILIES if hasattr(family, name))
    module, examples = getattr(family, name)()
    with torch.no_grad():
        for key, tensor in drawn_of(module).items():
            tensor.copy_(torch.from_numpy(draw(key, tuple(tensor.shape))))
    return module.eval(), examples


def drawn_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything of a module that is drawn: its parameters, and the statistics of batch norms."""
    statistics = {
        name: tensor
        for name, tensor in module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }
    return dict(module.named_parameters()) | statistics


def __getattr__(name: str) -> object:
    """Every module of the table as a function, which is how `corp_onnx.export` takes a script."""
    if name in MODULES:
        return lambda: sample(name)
    raise AttributeError(name)


def make(name: str, form: str, folder: Path) -> list[Entry]:
    """Write one model into a folder and return the truth about it."""
    path = folder / f"{name}.{form}.onnx"
    if name in converters.MODELS:
        model, truth, weights = converters.MODELS[name]()
    else:
        model = forms.write(f"{__file__}:{name}", form)
        module, _ = sample(name)
        weights = {key: value.detach().numpy() for key, value in drawn_of(module).items()}
        truth = truth_of(name)
    left = strip(model, weights)
    onnx.save(model, path)
    print(f"{name}.{form}: {path.stat().st_size} bytes", *left, sep="; ")
    return truth


def truth_of(name: str) -> list[Entry]:
    """What a module holds."""
    if name in converters.MODELS:
        return converters.MODELS[name]()[1]
    module, examples = sample(name)
    given = (examples, ()) if isinstance(examples, dict) else ({}, examples)
    return blocks_of(module, lambda: module(*given[1], **given[0]))


def write_truth(path: Path, truth: dict[str, list[Entry]]) -> None:
    """The truth by module, one block a line."""
    lines = [
        f" {json.dumps(name)}: [\n"
        + ",\n".join(f"  {json.dumps(block)}" for block in truth[name])
        + "\n ]"
        for name in sorted(truth)
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(words: list[str]) -> None:
    """Write the models whose names contain every word, and the truth about their modules."""
    path = FOLDER / "truth.json"
    truth = json.loads(path.read_text()) if path.is_file() else {}
    FOLDER.mkdir(exist_ok=True)
    if words == ["--truth"]:
        truth = {name: truth_of(name) for name in MODULES}
        write_truth(path, truth)
        return
    for name, wanted in MODULES.items():
        for form in wanted:
            if all(word in f"{name}.{form}" for word in words):
                truth[name] = make(name, form, FOLDER)
                write_truth(path, {name: truth[name] for name in MODULES if name in truth})


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main(sys.argv[1:])
