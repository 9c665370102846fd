"""Torch modules with example inputs: from timm, from transformers, from the user's script."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from corp_onnx.data.loaders import importable
from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.errors import BackendUnavailable, DataError, GraphError
from corp_onnx.export.backend import first_line, package
from corp_onnx.export.checkpoint import few, fill, read_checkpoint
from corp_onnx.export.module import MASK, Module, Sourced, positional

_log = logging.getLogger(__name__)

BATCH, TOKENS = 2, 12
"""Size of the example inputs that are made here."""

IMAGE, IDS = "pixel_values", "input_ids"

OTHER_WEIGHTS = "give a file with --checkpoint, or --random-weights for freshly drawn weights"


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
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    own_weights = state is None and not random_weights
    kind, _, name = source.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "timm":
            sourced = _from_timm(name, state, own_weights=own_weights)
        elif kind == "hf":
            sourced = _from_transformers(name, own_weights=own_weights)
        else:
            sourced = _from_script(source)
    if state is not None and checkpoint is not None:
        fill(sourced.module, state, path=checkpoint)
    return positional(source, sourced)


def _from_timm(name: str, state: Mapping[str, Any] | None, *, own_weights: bool) -> Sourced:
    timm = package("timm")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        hint = f"close names: {', '.join(close)}" if close else "timm.list_models() lists them"
        raise GraphError(f"timm {timm.__version__} has no model {name!r}; {hint}")
    try:
        module = timm.create_model(name, pretrained=own_weights, **_classes(timm, name, state))
    except OSError as error:
        raise BackendUnavailable(
            f"the weights of {name} cannot be downloaded ({first_line(error)}); {OTHER_WEIGHTS}"
        ) from error
    except RuntimeError as error:
        raise GraphError(f"timm: {first_line(error)} Or {OTHER_WEIGHTS}") from error
    config = timm.data.resolve_data_config(model=module)
    image = package("torch").randn(BATCH, *config["input_size"])
    recipe = _recipe(name, Preprocessing.from_timm, config)
    return Sourced(module, {IMAGE: image}, recipe=recipe)


def _classes(timm: ModuleType, name: str, state: Mapping[str, Any] | None) -> dict[str, int]:
    """The number of classes of a checkpoint's head, where it has one."""
    head = timm.get_pretrained_cfg(name).classifier or ""
    weight = f"{head if isinstance(head, str) else head[0]}.weight"
    return {"num_classes": len(state[weight])} if state and weight in state else {}


def _from_transformers(name: str, *, own_weights: bool) -> Sourced:
    transformers = package("transformers")
    config = _config(transformers, name)
    named = (getattr(config, "architectures", None) or ["AutoModel"])[0]
    family = getattr(transformers, named, transformers.AutoModel)
    if own_weights:
        module = _pretrained(family, name)
    else:
        module = getattr(family, "from_config", family)(config)
    module.config.use_cache = False
    if module.main_input_name == IDS:
        return Sourced(module, _text(config), by_name=True)
    if module.main_input_name != IMAGE:
        raise GraphError(
            f"{name} takes {module.main_input_name}; only {IMAGE} and {IDS} are known: write a "
            "function that returns the module and its example inputs, and export it"
        )
    recipe = _processor(transformers, name)
    return Sourced(module, _image(name, config, recipe), by_name=True, recipe=recipe)


def _config(transformers: ModuleType, name: str) -> Any:  # noqa: ANN401 (a transformers config)
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except ValueError as error:
        raise GraphError(f"{name} is no model of transformers: {first_line(error)}") from error
    except OSError as error:
        if Path(name).is_dir():
            raise GraphError(f"{name} has no usable config.json: {first_line(error)}") from error
        raise BackendUnavailable(
            f"there is no folder {name}, and no model of that name could be downloaded "
            f"({first_line(error)}); give the path of a folder with config.json and weights"
        ) from error


def _pretrained(family: Any, name: str) -> Any:  # noqa: ANN401 (classes of transformers)
    try:
        module, loaded = family.from_pretrained(name, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise GraphError(
            f"the weights of {name} cannot be loaded ({first_line(error)}); {OTHER_WEIGHTS}"
        ) from error
    if loaded["missing_keys"]:
        raise GraphError(
            f"{name} has no weights for {few(loaded['missing_keys'])}, which {family.__name__} "
            "needs; correct `architectures` in its config.json"
        )
    return module


def _text(config: Any) -> dict[str, Any]:  # noqa: ANN401 (a transformers config)
    """Random tokens, the last two of the second text masked."""
    torch = package("torch")
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    mask[1, -2:] = 0
    return {IDS: torch.randint(0, config.vocab_size, (BATCH, TOKENS)), MASK: mask}


def _image(
    name: str,
    config: Any,  # noqa: ANN401 (a transformers config)
    recipe: Preprocessing | None,
) -> dict[str, Any]:
    size = getattr(config, "image_size", None) or getattr(recipe, "size", None)
    if size is None:
        raise GraphError(f"neither config.json nor an image processor of {name} gives a size")
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


def _from_script(source: str) -> Sourced:
    place, _, name = source.rpartition(":")
    if not (place.endswith(".py") and name.isidentifier()):
        raise GraphError(
            f"{source!r} is no source; give timm:NAME, hf:FOLDER or script.py:function"
        )
    with importable(Path(place).resolve().parent):
        made = _function(Path(place), name)()
    if not (isinstance(made, tuple) and len(made) == 2 and hasattr(made[0], "forward")):
        raise GraphError(f"{source} must return (module, example inputs), not {made!r:.100}")
    module, given = made
    by_name = isinstance(given, Mapping)
    parameters = inspect.signature(module.forward).parameters
    examples = dict(given if by_name else zip(parameters, given, strict=False))
    kind = package("torch").Tensor
    if not examples or not all(isinstance(t, kind) and t.ndim > 0 for t in examples.values()):
        raise GraphError(
            f"{source} must return example inputs as a tuple or dict of tensors [b, …]"
        )
    if len({len(t) for t in examples.values()}) > 1:
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in examples.items())
        raise GraphError(f"the example inputs of {source} differ in their batch: {shapes}")
    return Sourced(module, examples, by_name=by_name)


def _function(script: Path, name: str) -> Callable[[], object]:
    spec = importlib.util.spec_from_file_location(f"_corp_onnx_{script.stem}", script)
    if not script.is_file() or spec is None or spec.loader is None:
        raise GraphError(f"the script {script} does not exist; check the path before the colon")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the script look their module up there
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise GraphError(f"the script {script} cannot be imported: {first_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise GraphError(
            f"{script} has no function {name!r}; it has {', '.join(found) or 'no function'}"
        )
    made: Callable[[], object] = function
    return made
