"""Weights from a file into a torch module, every key accounted for."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from corp_onnx.errors import GraphError
from corp_onnx.export.backend import first_line, package

CONTAINERS = ("state_dict", "model", "module")
"""Keys under which training scripts keep the weights."""

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""

NAMED = 3
"""How many names a message gives as examples."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors by name from a ``.safetensors`` or ``.pth`` file; no code in it is run.

    Raises:
        GraphError: If it holds no such tensors.
    """
    if not path.is_file():
        raise GraphError(f"the checkpoint {path} does not exist; check its path")
    state = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    for container in CONTAINERS:
        if isinstance(state, Mapping) and isinstance(state.get(container), Mapping):
            state = state[container]
    kind = package("torch").Tensor
    if not isinstance(state, Mapping) or not all(isinstance(t, kind) for t in state.values()):
        raise GraphError(
            f"the checkpoint {path} holds more than weights by name; save `module.state_dict()`"
        )
    return {_bare(name): tensor for name, tensor in state.items()}


def fill(module: Any, state: Mapping[str, Any], *, path: Path) -> None:  # noqa: ANN401 (torch's)
    """Load weights into a module; names that share storage (tied weights) count once.

    Raises:
        GraphError: If names or shapes differ; it gives some of each.
    """
    own = module.state_dict()
    loaded = {own[name].data_ptr() for name in state if name in own}
    faults = {
        "missing": [n for n, t in own.items() if n not in state and t.data_ptr() not in loaded],
        "not in the model": [n for n in state if n not in own],
        "of another shape": [
            f"{n} {list(t.shape)} for {list(own[n].shape)}"
            for n, t in state.items()
            if n in own and t.shape != own[n].shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{what}: {few(names)}" for what, names in faults.items() if names)
        raise GraphError(f"the checkpoint {path} does not fit the model: {listed}")
    module.load_state_dict(state, strict=False)


def few(names: Collection[str]) -> str:
    """The first names of a list, and how many follow.

    >>> few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = ", ".join(sorted(names)[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def _safetensors(path: Path) -> object:
    safetensors = package("safetensors.torch")
    try:
        return safetensors.load_file(path)
    except package("safetensors").SafetensorError as error:
        raise GraphError(f"the checkpoint {path} cannot be read: {first_line(error)}") from error


def _pickled(path: Path) -> object:
    try:
        return package("torch").load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise GraphError(
            f"the checkpoint {path} cannot be read as weights alone: {first_line(error)}; save "
            "`module.state_dict()` with torch.save, or as .safetensors"
        ) from error


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
