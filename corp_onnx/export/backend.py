"""The one door to torch, timm, transformers and safetensors."""

from __future__ import annotations

import importlib
from types import ModuleType

from corp_onnx.errors import BackendUnavailable

FAILURES = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What modules raise that cannot be run on some inputs, and exporters that meet the unknown."""


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
    r"""What an error of one of these packages says, without its pages of advice.

    >>> first_line(ValueError("sizes conflict:\n- 12 is static\nSee our guide"))
    'sizes conflict: 12 is static'
    """
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    more = f" {others[0].strip(' -')}" if first.endswith(":") and others else ""
    return f"{first}{more}"[:300]


def root(error: BaseException) -> BaseException:
    """What an error was raised because of, and that because of, to the first of them."""
    return root(error.__cause__) if error.__cause__ else error
