"""Machines that have TensorRT and a GPU, and have neither: for this process and those it starts."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fake_cuda import FakeCuda

MODULES = ("tensorrt", "cuda", "cuda.bindings", "cuda.bindings.runtime")

TENSORRT = """
import sys
from tests.fake_tensorrt import fake_tensorrt
sys.modules[__name__] = fake_tensorrt({version!r})
"""

RUNTIME = """
import sys
from tests.fake_cuda import FakeCuda
sys.modules[__name__] = FakeCuda(**{facts!r}).module
"""

TEN, ELEVEN = "10.13.0.35", "11.4.0.106"

Machine = Callable[..., FakeCuda]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Have a version of TensorRT, and a GPU as `FakeCuda` takes it; returns the GPU."""
    folder = tmp_path / "site"
    monkeypatch.syspath_prepend(folder)
    before = {name: sys.modules[name] for name in MODULES if name in sys.modules}

    def arrange(version: str = ELEVEN, **facts: object) -> FakeCuda:
        for name in MODULES:
            sys.modules.pop(name, None)
        for package in ("tensorrt", "cuda", "cuda/bindings"):
            shutil.rmtree(folder / package / "__pycache__", ignore_errors=True)
            (folder / package).mkdir(parents=True, exist_ok=True)
            (folder / package / "__init__.py").write_text("")
        (folder / "tensorrt" / "__init__.py").write_text(TENSORRT.format(version=version))
        (folder / "cuda" / "bindings" / "runtime.py").write_text(RUNTIME.format(facts=facts))
        from cuda.bindings import runtime

        fake: FakeCuda = runtime.fake
        return fake

    yield arrange
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(before)
