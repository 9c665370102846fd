"""House rules that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "corp_onnx").rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]

LONGEST_MODULE = 300
MACHINE_PATHS = re.compile(rb"(?<![\w.])/(work|home|root|Users|tmp)/\w|[A-Z]:\\\\Users")
BINARY_SUFFIXES = {".npz", ".png", ".jpg", ".gz"}


def tracked():
    """Files of the repository: those that git knows, and new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True,
        check=True,
        cwd=ROOT,
    )
    paths = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    return [path for path in paths if path.is_file()]


def calls(path):
    """Every call in a file, as it is written up to the bracket."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_only_the_command_line_prints_exits_and_configures_logging(path):
    loud = {"print", "sys.exit", "exit", "logging.basicConfig", "logging.disable", "warnings.warn"}
    found = loud & set(calls(path))
    assert not found or path.name in {"__main__.py", "cli.py", "screen.py"}


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_nothing_is_caught_that_was_not_expected(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert not {"Exception", "BaseException"} & set(
                re.findall(r"\w+", ast.unparse(node.type))
            )


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_modules_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < LONGEST_MODULE


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_records_are_frozen_unless_they_gather(path):
    """A public dataclass is a record; what changes is private."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for decorator in node.decorator_list:
                if "dataclass" in ast.unparse(decorator):
                    assert "frozen=True" in ast.unparse(decorator), node.name
                    assert "slots=True" in ast.unparse(decorator), node.name


def test_no_file_names_a_path_of_somebody_s_machine():
    """Also not the models, in which exporters like to leave where they ran."""
    named = {
        str(path.relative_to(ROOT)): found[0].decode(errors="replace")
        for path in tracked()
        if path.suffix not in BINARY_SUFFIXES and path != Path(__file__)
        for found in [MACHINE_PATHS.search(path.read_bytes())]
        if found
    }
    assert not named


def test_the_repository_is_small():
    sizes = {path: path.stat().st_size for path in tracked()}
    assert max(sizes.values()) <= 8_000_000
    assert sum(sizes.values()) <= 20_000_000
