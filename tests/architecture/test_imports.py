"""Heavy packages stay behind their doors, and layers know only those below."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "corp_onnx").rglob("*.py"))

OPTIONAL = (
    *("torch", "torchvision", "timm", "transformers", "onnxscript", "safetensors", "tokenizers"),
    *("onnxruntime", "tensorrt", "cuda", "onnxruntime_ep_nv_tensorrt_rtx", "openvino", "cupy"),
)

DOORS = {
    "onnxruntime": {"session.py"},
    "tensorrt": {"bindings.py"},
    "cuda": {"cuda.py"},
    "onnxruntime_ep_nv_tensorrt_rtx": {"rtx.py"},
    "openvino": {"openvino.py"},
    "cupy": {"device.py"},
}
"""The only files that may import a heavy package; one that is not listed is imported by none."""

WITHOUT_OPTIONAL = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
import corp_onnx
for info in pkgutil.walk_packages(corp_onnx.__path__, prefix="corp_onnx."):
    importlib.import_module(info.name)
    print(info.name)
"""

RUN_WITHOUT_OPTIONAL = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
from corp_onnx.cli import main
sys.exit(main(sys.argv[1:]))
"""


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_every_module_imports_without_any_optional_package():
    done = python(WITHOUT_OPTIONAL)
    assert done.returncode == 0, done.stderr
    names = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in SOURCES
    }
    assert set(done.stdout.split()) == names - {"corp_onnx"}


def test_importing_the_command_line_loads_no_optional_package():
    done = python(
        f"import sys, corp_onnx.cli\nprint([name for name in {OPTIONAL!r} if name in sys.modules])"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_looking_needs_no_optional_package(files):
    done = python(RUN_WITHOUT_OPTIONAL, "inspect", files.model)
    assert done.returncode == 0, done.stderr
    assert "attention.0" in done.stdout


def test_a_missing_runtime_is_an_error_that_says_how_to_get_it(files, tmp_path):
    done = python(
        *(RUN_WITHOUT_OPTIONAL, "calibrate", files.model, "--data", files.data),
        *("-o", tmp_path / "statistics.npz"),
    )
    assert done.returncode == 2
    assert "pip install 'corp_onnx[cpu]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_exporter_is_an_error_that_says_how_to_get_it(tmp_path):
    done = python(
        *(RUN_WITHOUT_OPTIONAL, "export", "timm:vit_tiny_patch16_224"),
        *("-o", tmp_path / "model.onnx", "--random-weights"),
    )
    assert done.returncode == 2
    assert "corp_onnx[export]" in done.stderr
    assert "Traceback" not in done.stderr


def imported(path):
    """The packages that a file imports, anywhere in it, by their first name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("package", OPTIONAL)
def test_an_optional_package_has_one_door(package):
    users = {path.name for path in SOURCES if package in imported(path)}
    assert users == DOORS.get(package, set())


def test_layers_know_only_those_below():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout
