"""Torch modules with example inputs: from timm, from transformers, or from the user's script."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import logging
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from corp_onnx.errors import BackendUnavailable, DataError, GraphError
from corp_onnx.preprocessing import Preprocessing

_log = logging.getLogger(__name__)

BATCH, TOKENS = 2, 12
"""Size of the example inputs that are made here."""

IMAGE, IDS, MASK = "pixel_values", "input_ids", "attention_mask"
CONTAINERS = ("state_dict", "model", "module")
"""Keys under which training scripts keep the weights of a checkpoint."""

OTHER_WEIGHTS = "give a file with --checkpoint, or --random for freshly drawn weights"


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """A torch module in float32 and evaluation mode, and how it is called.

    Attributes:
        module: Takes the inputs by position; returns a tensor, or a tuple of them.
        examples: One tensor per input, by name, all with the same batch first.
        outputs: Names of what it returns, in order.
        recipe: How pictures become its input, where that is known.
    """

    module: Any
    examples: Mapping[str, Any]
    outputs: tuple[str, ...]
    recipe: Preprocessing | None

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Output arrays by name."""
        with package("torch").no_grad():
            result = self.module(*inputs.values())
        tensors = result if isinstance(result, tuple) else (result,)
        return {name: t.numpy() for name, t in zip(self.outputs, tensors, strict=True)}

    def inputs(self, batch: int) -> dict[str, Any]:
        """Other inputs of a batch size: rows used again, tokens one fewer, each row reversed."""
        return {name: _varied(example, batch) for name, example in self.examples.items()}


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """A module as its source gave it; ``keyword`` if it takes its examples by name."""

    module: Any
    examples: Mapping[str, Any]
    keyword: bool
    recipe: Preprocessing | None


def package(name: str) -> ModuleType:
    """A package of the export extra, or an error that says how to get it."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torch and torchvision do not match
        raise BackendUnavailable(
            f"exporting needs {name}, which cannot be imported ({error}); install it with "
            "`pip install 'corp_onnx[export]'`"
        ) from error


def load_module(source: str, *, checkpoint: Path | None, random_weights: bool) -> Module:
    """The module that a source names, with its weights. Whatever is drawn is drawn with seed 0.

    Args:
        source: ``timm:NAME``, ``hf:FOLDER``, ``hf:NAME`` or ``script.py:function``.
        checkpoint: Weights to load instead of the source's own.
        random_weights: Draw the weights of a timm or transformers model.

    Raises:
        GraphError: If the source or the checkpoint is not usable.
        BackendUnavailable: If a package is missing, or weights cannot be downloaded.
    """
    torch = package("torch")
    state = None if checkpoint is None else _state(checkpoint)
    own_weights = state is None and not random_weights
    kind, _, name = source.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "timm" and name:
            found = _from_timm(name, state, own_weights=own_weights)
        elif kind == "hf" and name:
            found = _from_transformers(name, own_weights=own_weights)
        else:
            found = _from_script(source)
    if state is not None:
        _fill(found.module, state, checkpoint)
    found.module.float().eval()
    return _callable(source, found)


def is_tokens(example: Any) -> bool:  # noqa: ANN401 (a tensor)
    """Whether an input is a batch of sequences of whole numbers, ``[b, t]``."""
    return bool(example.ndim == 2 and not example.is_floating_point())


def _varied(example: Any, batch: int) -> Any:  # noqa: ANN401 (tensors)
    rows = package("torch").arange(batch) % len(example)
    shorter = example[:, : max(2, example.shape[1] - 1)] if is_tokens(example) else example
    return shorter[rows].flip(-1) if example.ndim > 1 else shorter[rows]


def _callable(source: str, found: _Found) -> Module:
    """A module that takes tensors by position and returns tensors by position."""
    torch = package("torch")
    call: Callable[..., object] = _by_name(found) if found.keyword else found.module
    examples = {
        name: t.float() if t.is_floating_point() else t for name, t in found.examples.items()
    }
    try:
        with torch.no_grad():
            result = call(*examples.values())
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise GraphError(
            f"the module of {source} cannot be run on its example inputs "
            f"({', '.join(examples)}): {_first_line(error)}"
        ) from error
    outputs = tuple(_tensors(result))
    if not outputs:
        raise GraphError(f"the module of {source} returned {type(result).__name__}, not tensors")
    plain = isinstance(result, torch.Tensor) or (type(result) is tuple and len(outputs) == len(result))
    module = found.module if plain and not found.keyword else _flat(found, call)
    return Module(module, examples, outputs, found.recipe)


def _by_name(found: _Found) -> Callable[..., object]:
    names = tuple(found.examples)
    return lambda *inputs: found.module(**dict(zip(names, inputs, strict=True)))


def _flat(found: _Found, call: Callable[..., object]) -> Any:  # noqa: ANN401 (a torch module)
    """The module behind one that returns its tensors, and nothing else, as a tuple."""

    class Flat(package("torch").nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = found.module

        def forward(self, *inputs: object) -> tuple[Any, ...]:
            return tuple(_tensors(call(*inputs)).values())

    return Flat().eval()


def _tensors(result: object) -> dict[str, Any]:
    """The tensors that a module returned, by name; other things it returned are left out."""
    kind = package("torch").Tensor
    if isinstance(result, kind):
        return {"output": result}
    if isinstance(result, Mapping):
        return {str(name): value for name, value in result.items() if isinstance(value, kind)}
    if isinstance(result, tuple | list):
        return {f"output_{i}": value for i, value in enumerate(result) if isinstance(value, kind)}
    return {}


# Sources ---------------------------------------------------------------------------------------


def _from_timm(name: str, state: Mapping[str, Any] | None, *, own_weights: bool) -> _Found:
    timm = package("timm")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        hint = f"close names: {', '.join(close)}" if close else "timm.list_models() lists them"
        raise GraphError(f"timm {timm.__version__} has no model {name!r}; {hint}")
    try:
        module = timm.create_model(name, pretrained=own_weights, **_classes(timm, name, state))
    except OSError as error:
        raise BackendUnavailable(
            f"the weights of {name} cannot be downloaded ({_first_line(error)}); {OTHER_WEIGHTS}"
        ) from error
    except RuntimeError as error:
        raise GraphError(f"timm: {_first_line(error)} Or {OTHER_WEIGHTS}") from error
    config = timm.data.resolve_data_config(model=module)
    image = package("torch").randn(BATCH, *config["input_size"])
    return _Found(module, {IMAGE: image}, False, _recipe(name, Preprocessing.from_timm, config))


def _classes(
    timm: ModuleType, name: str, state: Mapping[str, Any] | None
) -> dict[str, int]:
    """The number of classes of a checkpoint's head, where it has one."""
    head = timm.get_pretrained_cfg(name).classifier
    weight = f"{head if isinstance(head, str) else (head or [''])[0]}.weight"
    return {"num_classes": len(state[weight])} if state and weight in state else {}


def _from_transformers(name: str, *, own_weights: bool) -> _Found:
    transformers = package("transformers")
    config = _config(transformers, name)
    named = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    family = getattr(transformers, named, transformers.AutoModel)
    if own_weights:
        module = _pretrained(family, name)
    elif family is transformers.AutoModel:
        module = family.from_config(config)
    else:
        module = family(config)
    module.config.use_cache = False
    if module.main_input_name == IDS:
        return _Found(module, _text(config), True, None)
    if module.main_input_name != IMAGE:
        raise GraphError(
            f"{name} takes {module.main_input_name}; only {IMAGE} and {IDS} are known: write a "
            "function that returns the module and its example inputs, and export script.py:function"
        )
    recipe = _processor(transformers, name)
    return _Found(module, _image(name, config, recipe), True, recipe)


def _config(transformers: ModuleType, name: str) -> Any:  # noqa: ANN401 (a transformers config)
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except ValueError as error:
        raise GraphError(f"{name} is no model of transformers: {_first_line(error)}") from error
    except OSError as error:
        if Path(name).is_dir():
            raise GraphError(f"{name} has no usable config.json: {_first_line(error)}") from error
        raise BackendUnavailable(
            f"there is no folder {name}, and no model of that name could be downloaded "
            f"({_first_line(error)}); give the path of a folder with config.json and weights"
        ) from error


def _pretrained(family: Any, name: str) -> Any:  # noqa: ANN401 (classes of transformers)
    try:
        module, loaded = family.from_pretrained(name, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise GraphError(
            f"the weights of {name} cannot be loaded ({_first_line(error)}); {OTHER_WEIGHTS}"
        ) from error
    if loaded["missing_keys"]:
        raise GraphError(
            f"{name} has no weights for {_few(loaded['missing_keys'])}, which {family.__name__} "
            "needs; correct `architectures` in its config.json"
        )
    return module


def _text(config: Any) -> dict[str, Any]:  # noqa: ANN401 (a transformers config)
    """Random tokens, the last two of the second text masked."""
    torch = package("torch")
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    mask[1, -2:] = 0
    return {IDS: torch.randint(0, config.vocab_size, (BATCH, TOKENS)), MASK: mask}


def _image(name: str, config: Any, recipe: Preprocessing | None) -> dict[str, Any]:  # noqa: ANN401
    size = getattr(config, "image_size", None) or (recipe and recipe.size)
    if size is None:
        raise GraphError(f"neither config.json nor an image processor in {name} gives an image size")
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "num_channels", 3)
    return {IMAGE: package("torch").randn(BATCH, channels, height, width)}


def _processor(transformers: ModuleType, name: str) -> Preprocessing | None:
    try:
        config = transformers.AutoImageProcessor.from_pretrained(name).to_dict()
    except OSError:
        _log.warning("%s has no image processor; no preprocessing is written", name)
        return None
    return _recipe(name, Preprocessing.from_transformers, config)


def _recipe(
    name: str, read: Callable[..., Preprocessing], config: Mapping[str, Any]
) -> Preprocessing | None:
    try:
        return read(config, name=IMAGE)
    except DataError as error:
        _log.warning("the preprocessing of %s is not written: %s", name, error)
        return None


def _from_script(source: str) -> _Found:
    place, _, name = source.rpartition(":")
    if not (place.endswith(".py") and name.isidentifier()):
        raise GraphError(
            f"{source!r} is no source; give timm:NAME, hf:FOLDER or script.py:function"
        )
    function = _function(Path(place), name)
    made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and hasattr(made[0], "forward")):
        raise GraphError(f"{source} must return (module, example inputs), not {type(made).__name__}")
    module, given = made
    if isinstance(given, Mapping):
        examples = dict(given)
    else:
        parameters = list(inspect.signature(module.forward).parameters)
        examples = dict(zip(parameters, given, strict=False))
