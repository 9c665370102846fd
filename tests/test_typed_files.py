"""Files of other types than float32, and of one batch size, through the verbs that run them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests.builders import TINY, Net, residual_block
from tests.test_cli import HALF, document
from tests.test_widened import narrow

NOTE = "weights are stored as bfloat16, which is run in float32 here; they stay bfloat16"


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    """The transformer in bfloat16."""
    path = tmp_path_factory.mktemp("brain") / "model.onnx"
    onnx.save(narrow(TINY["transformer"](0).proto)[0], path)
    return path


def test_a_model_in_bfloat16_is_cut_compared_and_stays_so(command, files, brain, tmp_path):
    small, statistics = tmp_path / "small.onnx", tmp_path / "s.npz"
    ended = command("prune", brain, "-o", small, "--data", files.data, *HALF, "--json")
    assert ended.status == 0, ended
    assert document(ended)["notes"] == [NOTE]
    kinds = {tensor.data_type for tensor in onnx.load(small).graph.initializer}
    assert TensorProto.BFLOAT16 in kinds
    assert TensorProto.FLOAT not in kinds
    found = document(command("verify", brain, small, "--data", files.data, "--json"))
    assert 1e-6 < found["relative_error"] < 0.2
    assert command("calibrate", brain, "-o", statistics, "--data", files.data).status == 0
    assert document(command("inspect", brain, "--json"))["notes"] == [NOTE]


def test_a_model_in_float32_has_no_note(command, files):
    assert document(command("inspect", files.model, "--json"))["notes"] == []


def test_a_finished_model_in_int8_is_held_against_the_dense_one(command, files, tmp_path):
    small, rounded = tmp_path / "small.onnx", tmp_path / "int8.onnx"
    given = (files.model, "--data", files.data, *HALF, "--json")
    assert command("prune", *given, "-o", small).status == 0
    int8 = document(command("prune", *given, "-o", rounded, "--precision", "int8"))
    found = [
        document(command("verify", files.model, path, "--data", files.data, "--json"))
        for path in (small, rounded)
    ]
    assert found[0]["macs"] == found[1]["macs"]
    assert found[0]["relative_error"] != found[1]["relative_error"]
    wide, narrow_ = (each["relative_error"] for each in found)
    said = int8["precision"]["error_against_dense"]
    assert 0.3 * said < narrow_ < 3 * said
    assert narrow_ < wide + 0.1


def test_labels_of_samples_that_fill_no_batch_are_left_out(command, tmp_path, files):
    """64 samples are two batches of 24 and some: 16 are not compared, and their labels neither."""
    net = Net(0)
    y = residual_block(net, net.input("x", 24, 7, 10))
    model, labels = tmp_path / "fixed.onnx", tmp_path / "labels.npy"
    onnx.save(net.build(net("ReduceMean", y, [1], keepdims=0)), model)
    np.save(labels, np.zeros(64, int))
    given = ("verify", model, model, "--data", files.data, "--labels", labels, "--json")
    found = document(command(*given))
    assert found["samples"] == 48
    assert found["top1"]["dense"] == found["top1"]["pruned"]


def test_a_recipe_that_cannot_be_read_is_an_error_before_anything_is_written(
    command, files, tmp_path
):
    """Also where statistics are given and no picture is read."""
    model, statistics = tmp_path / "model.onnx", tmp_path / "s.npz"
    model.write_bytes(files.model.read_bytes())
    assert command("calibrate", model, "-o", statistics, "--data", files.data).status == 0
    (tmp_path / "model.preprocessing.json").write_text(json.dumps({"input": "x"}))
    small = tmp_path / "small.onnx"
    ended = command("prune", model, "-o", small, "--stats", statistics, *HALF)
    assert ended.status == 2
    assert "is missing" in ended.message
    assert not small.exists()
