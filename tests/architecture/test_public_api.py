"""What is public exists, says what it is, and is documented."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import corp_onnx

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    info.name for info in pkgutil.walk_packages(corp_onnx.__path__, prefix="corp_onnx.")
)


@pytest.mark.parametrize("name", corp_onnx.__all__)
def test_every_public_name_exists_and_has_a_docstring(name):
    documented = inspect.getdoc(getattr(corp_onnx, name))
    assert documented
    assert len(documented.splitlines()[0]) <= 100


def test_public_names_are_sorted_once_each_and_few():
    assert corp_onnx.__all__ == sorted(set(corp_onnx.__all__))
    assert 10 <= len(corp_onnx.__all__) <= 20


@pytest.mark.parametrize("name", corp_onnx.__all__)
def test_every_public_name_is_in_the_reference(name):
    reference = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    assert f"`{name}" in reference or f" {name}" in reference


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert module.__doc__.strip().splitlines()[0].endswith((".", "?"))


def test_types_are_shipped():
    assert (ROOT / "corp_onnx" / "py.typed").exists()
