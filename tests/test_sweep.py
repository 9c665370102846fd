"""`sweep`: several budgets from one calibration."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from PIL import Image

from corp_onnx import example
from corp_onnx.allocation.budget import Budget
from corp_onnx.commands import Source
from corp_onnx.commands.sweep import Sweep
from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.deploy.targets import open_target
from corp_onnx.pipeline import Settings
from corp_onnx.session import open_session

QUICK = ("--data", example.CALIBRATION, "--samples", 120)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    from corp_onnx.cli import main

    folder = tmp_path_factory.mktemp("sweep") / "results"
    arguments = ("sweep", example.MODEL, *QUICK, "--macs", "0.5,0.8", "-o", folder)
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        status = main([*map(str, arguments), "--json"])
    return status, json.loads(printed[-1]), folder


@pytest.mark.slow
def test_every_budget_is_a_model_that_keeps_it(swept):
    status, document, folder = swept
    assert status == 0
    points = document["points"]
    assert [point["macs"] for point in points] == [0.8, 0.5]
    for point in points:
        assert 0.9 * point["macs"] < point["macs_kept"] <= point["macs"]
        path = folder / f"fashion_vit_macs{100 * point['macs']:g}.onnx"
        assert point["output"] == str(path)
        onnx.checker.check_model(onnx.load(path), full_check=True)
        (logits,) = open_session(path).run({"image": np.zeros((2, 1, 28, 28), np.float32)}).values()
        assert logits.shape == (2, 10)
        assert point["median_ms"] > 0
        assert point["speedup"].keys() == {"ratio", "low", "high"}
    assert points[0]["relative_error"] < points[1]["relative_error"]


@pytest.mark.slow
def test_the_smallest_that_passed_is_chosen(swept):
    _, document, _ = swept
    assert document["chosen"] == document["points"][-1]["output"]


@pytest.mark.slow
def test_table_and_plot_are_beside_the_models(swept):
    _, document, folder = swept
    assert json.loads((folder / "sweep.json").read_text()) == document
    with Image.open(folder / "sweep.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 3  # it shows something
    assert (folder / "fashion_vit_macs50.preprocessing.json").is_file()


@pytest.mark.slow
def test_limits_choose_and_fail(command, tmp_path, swept):
    _, document, _ = swept
    limit = (document["points"][0]["relative_error"] + document["points"][1]["relative_error"]) / 2
    arguments = ("sweep", example.MODEL, *QUICK, "--macs", "0.8,0.5", "--json")
    ended = command(*arguments, "-o", tmp_path / "some", "--max-error", limit)
    assert ended.status == 0
    assert json.loads(ended.stdout)["chosen"].endswith("macs80.onnx")
    none = command(*arguments, "-o", tmp_path / "none", "--max-error", 0)
    assert none.status == 1
    assert json.loads(none.stdout)["chosen"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--macs", "0.5,half"), "is no list of shares"),
        (("--macs", "1.5"), "is not a share to keep"),
        (("--macs", "0.5", "--params", "0.5"), "give either --macs or --params"),
        (("--macs", "0.01"), "cannot be kept"),
    ],
)
def test_a_request_that_makes_no_sense_is_exit_status_2(command, tmp_path, options, words):
    ended = command("sweep", example.MODEL, *QUICK, *options, "-o", tmp_path / "out")
    assert ended.status == 2
    assert words in ended.message
    assert not list(tmp_path.rglob("*.onnx"))


@pytest.mark.slow
def test_budgets_that_are_nearly_the_same_have_files_of_their_own(tmp_path):
    model, source = example.MODEL, Source(str(example.CALIBRATION))
    target = open_target("ort-cpu")
    asked = Sweep(model, tmp_path, source, (), Settings(), target)
    names = {asked._output(Budget("macs", kept)).name for kept in (0.6, 0.61234567, 0.61234568)}
    assert len(names) == 3
    assert f"{model.stem}_macs60.onnx" in names


def test_a_model_of_a_fixed_batch_is_timed_at_that_and_on_the_target(command, tmp_path):
    fixed = onnx.load(example.MODEL)
    for tensor in (*fixed.graph.input, *fixed.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(fixed, tmp_path / "fixed.onnx")
    Preprocessing.beside(example.MODEL).save_beside(tmp_path / "fixed.onnx")
    asked = ("--macs", "0.8", "--target", "openvino", "-o", tmp_path / "out", "--method", "corp")
    ended = command("sweep", tmp_path / "fixed.onnx", *QUICK, *asked, "--json")
    assert ended.status == 0
    assert json.loads(ended.stdout)["points"][0]["speedup"]["ratio"] > 0


def test_a_target_that_is_not_here_is_refused_before_any_work(command, tmp_path):
    ended = command("sweep", example.MODEL, *QUICK, "--target", "ort-cuda", "-o", tmp_path / "out")
    assert ended.status == 2
    assert "CUDAExecutionProvider" in ended.message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_prune_keeps_a_budget(command, tmp_path):
    arguments = ("prune", example.MODEL, *QUICK, "-o", tmp_path / "out.onnx", "--json")
    ended = command(*arguments, "--params", 0.7)
    assert ended.status == 0
    found = json.loads(ended.stdout)
    left = found["params"]["pruned"] / found["params"]["dense"]
    assert 0.6 < left <= 0.7
    assert found["one_shot"] is False
    assert (
        len({cut["mlp"]["to"] for block in found["blocks"] if "mlp" in (cut := block["cuts"])}) > 1
    )
