"""What README and docs say can be typed, clicked and imported."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer.main
from PIL import Image

from corp_onnx import cli, example
from corp_onnx.data.preprocessing import Preprocessing

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "corp_onnx").rglob("*.md")]
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
COMMANDS = typer.main.get_command(cli.app).commands

OPERATORS = {"|", "||", "&&", ">", ";", "2>"}
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def blocks(path, language):
    """The fenced blocks of one language."""
    found = FENCED.findall(path.read_text(encoding="utf-8"))
    return [body for name, body in found if name == language]


def lines(program):
    """Every line in a bash block of any document that runs a program, as words."""
    return [
        pytest.param(words, id=f"{name}: {' '.join(words)}")
        for name, path in zip(NAMES, DOCUMENTS, strict=True)
        for words in typed(path, program)
    ]


def typed(path, program):
    """The words of every such line of one document, up to the first operator of the shell."""
    for body in blocks(path, "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            if line.split()[:1] == [program]:
                words = shlex.split(line, comments=True)
                yield list(itertools.takewhile(lambda word: word not in OPERATORS, words))


@pytest.mark.parametrize("words", lines("corp-onnx"))
def test_every_command_that_is_shown_can_be_typed(words):
    """Its verb, its flags and the number of its arguments are those of the program."""
    _, verb, *arguments = words
    assert verb in COMMANDS
    assert COMMANDS[verb].make_context(verb, arguments).params


@pytest.mark.parametrize("words", lines("corp-onnx"))
def test_the_help_of_every_verb_that_is_shown_names_its_flags(words, command):
    _, verb, *arguments = words
    ended = command(verb, "--help")
    assert ended.status == 0
    for flag in (word.partition("=")[0] for word in arguments if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", ended.stdout), flag


@pytest.mark.parametrize("words", lines("make"))
def test_every_make_target_that_is_shown_exists(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(words[1:]) <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


PYTHON_BLOCKS = [
    pytest.param(body, id=f"{name}:{number}")
    for name, path in zip(NAMES, DOCUMENTS, strict=True)
    for number, body in enumerate(blocks(path, "python"))
]


@pytest.mark.parametrize("body", PYTHON_BLOCKS)
def test_every_python_block_compiles_and_imports_what_exists(body):
    for node in ast.walk(ast.parse(body)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("corp_onnx"):
            module = __import__(node.module, fromlist=[alias.name for alias in node.names])
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.fixture
def folder_of_a_reader(tmp_path, monkeypatch):
    """What the README takes for granted: a model, and a folder of images for it."""
    model = tmp_path / "model.onnx"
    model.write_bytes(example.MODEL.read_bytes())
    recipe = Preprocessing.beside(example.MODEL)
    assert recipe is not None
    recipe.save_beside(model)
    (tmp_path / "images").mkdir()
    with np.load(example.CALIBRATION) as stored:
        for number, image in enumerate(stored[recipe.input][:300]):
            Image.fromarray(image[0]).save(tmp_path / "images" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_the_other(folder_of_a_reader, command):
    for words in typed(README, "corp-onnx"):
        if words[1] != "export":  # it may download weights
            ended = command(*words[1:])
            assert ended.status == 0, (words, ended)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(folder_of_a_reader, capsys):
    for body in blocks(README, "python"):
        exec(compile(body, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out


PAGES = [
    pytest.param(path, id=name)
    for name, path in zip(NAMES, DOCUMENTS, strict=True)
    if path.is_relative_to(ROOT / "docs") and (blocks(path, "bash") or blocks(path, "python"))
]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    for folder in ("corp_onnx", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    shells = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    for language, body in FENCED.findall(page.read_text(encoding="utf-8")):
        if language in shells:
            ended = subprocess.run(
                [*shells[language], body], cwd=tmp_path, check=False, capture_output=True, text=True
            )
            assert ended.returncode == 0, (body, ended.stderr)


def slugs(path):
    """The anchors of a document's headings, as GitHub makes them."""
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")
        for heading in HEADING.findall(text)
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_link_leads_somewhere(path):
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    for target in (link or image for link, image in LINK.findall(text)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        place, _, anchor = target.partition("#")
        linked = (path.parent / place).resolve() if place else path
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        if anchor:
            assert anchor in slugs(linked), target


def test_the_two_commands_come_first():
    first = FENCED.search(README.read_text(encoding="utf-8"))
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[2].splitlines()] == [
        "make demo",
        "make test",
    ]


def test_the_architecture_lists_every_module():
    text = (ROOT / "docs" / "concepts" / "architecture.md").read_text(encoding="utf-8")
    folders, listed = [], set()
    for indent, name in re.findall(r"^    ((?:  )*)(\S+\.py|\w+/)(?: |$)", text, re.MULTILINE):
        folders[len(indent) // 2 :] = [name]
        if name.endswith(".py"):
            listed.add("".join(folders))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "corp_onnx").rglob("*.py")}
    assert listed == {name for name in modules if not name.endswith("/__init__.py")} | {
        "corp_onnx/__init__.py"
    }


@pytest.mark.parametrize("verb", list(COMMANDS))
def test_every_command_is_in_the_reference(verb):
    reference = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert f"corp-onnx {verb}" in reference
    flags = [flag for option in COMMANDS[verb].params for flag in option.opts if flag[:2] == "--"]
    assert "--json" in flags
    assert [flag for flag in flags if flag not in reference] == []
