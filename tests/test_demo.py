"""The demonstration, whole: the bundled model, the bundled images, every method."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from corp_onnx import example
from corp_onnx.blocks import find_blocks
from corp_onnx.graph import load
from corp_onnx.session import open_session

pytestmark = pytest.mark.slow

KEYS = {
    *("method", "mlp", "qk", "vo", "top1", "relative_error"),
    *("macs", "params", "bytes", "median_ms"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "run"


@pytest.fixture(scope="module")
def found(folder):
    """The document, of one run for all tests."""
    import contextlib
    import io

    from corp_onnx.cli import main

    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert main(["demo", "--json", "--run-dir", str(folder)]) == 0
    return json.loads(stdout.getvalue())


@pytest.fixture(scope="module")
def rows(found):
    return {row["method"]: row for row in found["rows"]}


def test_every_row_has_the_documented_keys(found):
    assert [row["method"] for row in found["rows"]] == ["dense", "none", "mean", "corp"]
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


def test_the_repair_shows(rows):
    errors = {method: row["relative_error"] for method, row in rows.items()}
    assert errors["corp"] < errors["mean"] < errors["none"]
    assert rows["corp"]["top1"] > rows["none"]["top1"]


def test_the_repaired_model_is_where_it_says(found, folder):
    output = Path(found["output"])
    assert output.parent == folder
    onnx.checker.check_model(onnx.load(output), full_check=True)
    (spec,) = open_session(output).inputs
    images = np.zeros((3, *spec.shape[1:]), spec.dtype)
    (logits,) = open_session(output).run({spec.name: images}).values()
    assert logits.shape == (3, 10)
    assert output.with_name(f"{output.stem}.preprocessing.json").exists()


def test_people_are_told_how_to_use_it(command, tmp_path):
    ended = command("demo", "--run-dir", tmp_path)
    assert ended.status == 0
    for words in (
        "pruned, the paper's repair",
        f'onnxruntime.InferenceSession("{tmp_path / "fashion_vit_corp.onnx"}")',
        "corp-onnx prune model.onnx -o small.onnx --data images/",
    ):
        assert words in ended.stdout
