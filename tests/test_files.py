"""Files and folders appear whole or not at all."""

from __future__ import annotations

import json
import os

import numpy as np
import onnx
import pytest

from corp_onnx.errors import OutputError
from corp_onnx.files import whole, whole_folder
from tests.builders import WIDTH, Net, mlp, relu
from tests.inputs import activations
from tests.test_cli import document


class Failure(Exception):
    """Something goes wrong halfway."""


def fill(folder, fail=False, **files):
    with whole_folder(folder, log="log", last="record") as draft:
        for name, text in files.items():
            (draft / name.replace("_", ".")).write_text(text)
        if fail:
            raise Failure


def held(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="it is a device or a pipe; name a file"), whole(pipe):
        pass
    assert pipe.is_fifo()


def test_a_link_stays_one(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    with whole(link) as draft:
        draft.write_text("after")
    assert link.is_symlink()
    assert target.read_text() == "after"


def test_a_folder_is_filled_once_all_is_there(tmp_path):
    folder = tmp_path / "new" / "engine"
    fill(folder, model="1", record="of 1")
    assert held(folder) == {"model": "1", "record": "of 1"}
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_what_fails_leaves_a_folder_as_it_was_but_for_the_log(tmp_path):
    folder = tmp_path / "engine"
    fill(folder, model="1", model_data="weights", record="of 1")
    before = held(folder)
    with pytest.raises(Failure):
        fill(folder, fail=True, model="2")
    assert held(folder) == before
    with pytest.raises(Failure):
        fill(folder, fail=True, model="2", log="why")
    assert held(folder) == before | {"log": "why"}


def test_what_fails_makes_no_folder(tmp_path):
    with pytest.raises(Failure):
        fill(tmp_path / "new" / "engine", fail=True, model="1")
    assert not list(tmp_path.iterdir())


def test_weights_beside_what_is_replaced_go_with_it_and_other_files_stay(tmp_path):
    fill(tmp_path / "engine", model="1", model_data="weights", notes="mine")
    fill(tmp_path / "engine", model="2")
    assert held(tmp_path / "engine") == {"model": "2", "notes": "mine"}
    fill(tmp_path / "engine", model="3", model_data="other weights")
    assert held(tmp_path / "engine")["model.data"] == "other weights"


def test_a_folder_that_takes_no_files_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        fill(tmp_path / "file" / "engine", model="1")


@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
def test_an_engine_that_fails_leaves_the_one_before(command, files, tmp_path, target):
    folder, broken = tmp_path / "engine", tmp_path / "broken.onnx"
    net = Net(0)
    net("Nowhere", net.x())
    y = net("Invented", "x", domain="nobody")
    onnx.save(net.build(y), broken)
    assert command("build", files.model, "-o", folder, "--target", target).status == 0
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert command("build", broken, "-o", folder, "--target", target).status == 2
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    new = tmp_path / "other"
    assert command("build", broken, "-o", new, "--target", target).status == 2
    assert not new.exists()
    assert command("build", files.model, "-o", new, "--target", target).status == 0


def test_options_in_a_record_are_numbers_and_truth_values(command, files, tmp_path):
    folder = tmp_path / "engine"
    assert command("build", files.model, "-o", folder).status == 0
    options = json.loads((folder / "build.json").read_text())["options"]
    assert (options["arena"], options["threads"], options["cache"]) == (True, 0, None)


@pytest.mark.parametrize("verb", ["build", "bench", "verify"])
def test_weights_that_are_not_there_are_an_error_of_a_quantised_model_too(
    command, files, tmp_path, verb
):
    net = Net(0)
    y = net("DynamicQuantizeLinear", mlp(net, net.x(), relu), outputs=3)
    proto = net.build(net("DequantizeLinear", *y))
    model = tmp_path / "model.onnx"
    onnx.save(proto, model, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    more = {
        "build": ("-o", tmp_path / "engine"),
        "bench": ("--runs", 1),
        "verify": (files.model, "--data", files.data),
    }[verb]
    ended = command(verb, model, *more)
    assert ended.status == 2
    assert "weights" in ended.message
    assert "Traceback" not in ended.stderr


def test_a_file_that_must_not_be_read_is_an_error(command, files, tmp_path, monkeypatch):
    """Also of one who may read everything, such as root in a container."""

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", "model.onnx")

    monkeypatch.setattr(onnx, "load", denied)
    ended = command("inspect", files.model)
    assert ended.status == 2
    assert ended.message == "corp-onnx: model.onnx cannot be read or written: Permission denied"


@pytest.mark.parametrize("samples", [5, 300])
@pytest.mark.parametrize("batch", ["batch", 32])
def test_an_engine_in_int8_takes_what_the_batch_needs(command, tmp_path, samples, batch):
    net = Net(0)
    model, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    onnx.save(net.build(mlp(net, net.x(batch, 7, WIDTH), relu)), model)
    np.savez(data, x=activations(samples))
    given = ("build", model, "-o", tmp_path / "engine", "--precision", "int8", "--data", data)
    ended = command(*given, "--json")
    if batch == 32 and samples == 5:
        assert ended.status == 2
        assert "32" in ended.message
    else:
        assert ended.status == 0, ended
        assert document(ended)["precision"] == "int8"
