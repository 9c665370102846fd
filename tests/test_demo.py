"""The demonstration, whole: the bundled model, the bundled images, every method."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console

from corp_onnx import cli, commands, example
from corp_onnx.blocks import find_blocks
from corp_onnx.commands.demo import Demo
from corp_onnx.graph.model import load
from corp_onnx.session import open_session

pytestmark = pytest.mark.slow

KEYS = {
    *("method", "mlp", "qk", "vo", "top1", "relative_error"),
    *("macs", "params", "bytes", "median_ms"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "run"


@dataclass(frozen=True, slots=True, eq=False)
class Ran:
    """One run: its document, and the table that people are shown."""

    document: dict[str, Any]
    table: str


@pytest.fixture(scope="module")
def ran(folder):
    """The command, run once for all tests."""
    answers = []

    class Kept(Demo):
        def __call__(self, progress):
            answers.append(Demo.__call__(self, progress))
            return answers[0]

    stdout, screen = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(commands, "Demo", Kept)
        assert cli.main(["demo", "--json", "--run-dir", str(folder)]) == 0
    Console(file=screen, width=120).print(answers[0].table)
    return Ran(json.loads(stdout.getvalue()), screen.getvalue())


@pytest.fixture(scope="module")
def found(ran):
    return ran.document


@pytest.fixture(scope="module")
def rows(found):
    return {row["method"]: row for row in found["rows"]}


def test_every_row_has_the_documented_keys(found):
    assert [row["method"] for row in found["rows"]] == ["dense", "none", "mean", "corp", "best"]
    for row in found["rows"]:
        assert row.keys() >= KEYS
        assert row["median_ms"] > 0
        assert 0 <= row["top1"] <= 1


def test_the_dense_model_is_cut_by_nothing_and_the_others_by_half(rows):
    shares = {method: (row["mlp"], row["qk"], row["vo"]) for method, row in rows.items()}
    assert shares.pop("dense") == (0, 0, 0)
    assert set(shares.values()) == {(0.5, 0.5, 0)}
    assert rows["dense"]["relative_error"] == 0
    for key in ("macs", "params", "bytes"):
        values = {rows[method][key] for method in shares}
        assert max(values) < 0.75 * rows["dense"][key]


def test_the_bundled_model_is_as_good_as_promised(rows):
    assert rows["dense"]["top1"] >= 0.9
    assert example.MODEL.stat().st_size <= 8_000_000
    blocks = find_blocks(load(example.MODEL)).blocks
    heads = [block.head_width for block in blocks if block.id.startswith("attention")]
    assert len(heads) >= 6
    assert min(heads) >= 32


def test_the_cut_hurts_and_the_repair_shows(rows):
    errors = {method: row["relative_error"] for method, row in rows.items()}
    assert errors["corp"] < 0.5 * min(errors["none"], errors["mean"])
    assert errors["best"] < 0.5 * errors["corp"]
    lost = {method: rows["dense"]["top1"] - row["top1"] for method, row in rows.items()}
    assert lost["none"] > 0.05
    assert lost["corp"] < 0.5 * min(lost["none"], lost["mean"])


def test_the_repaired_model_is_where_it_says(found, folder):
    output = Path(found["output"])
    assert output.parent == folder
    onnx.checker.check_model(onnx.load(output), full_check=True)
    (spec,) = open_session(output).inputs
    images = np.zeros((3, *spec.shape[1:]), spec.dtype)
    (logits,) = open_session(output).run({spec.name: images}).values()
    assert logits.shape == (3, 10)
    assert output.with_name(f"{output.stem}.preprocessing.json").exists()


def test_people_are_told_what_was_found_and_how_to_use_it(ran, rows, folder):
    for row in rows.values():
        assert f"{row['top1']:.1%}" in ran.table
    for words in (
        "pruned, no repair",
        "pruned, mean-only repair",
        "pruned, the paper's repair",
        "import onnxruntime",
        "corp-onnx prune model.onnx -o small.onnx --data images/",
    ):
        assert words in ran.table
    joined = ran.table.replace("\n", "")
    assert f'onnxruntime.InferenceSession("{folder / "fashion_vit_best.onnx"}")' in joined
