"""The one door to torch, timm, transformers and safetensors."""

from __future__ import annotations

import importlib
from types import ModuleType

from corp_onnx.errors import BackendUnavailable


def package(name: str) -> ModuleType:
    """A package of the export extra, or an error that says how to get it."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torch and torchvision do not match
        raise BackendUnavailable(
            f"exporting needs {name}, which cannot be imported ({error}); install it with "
            "`pip install 'corp_onnx[export]'`"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error of one of these packages says, without its pages of advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
