"""The command line, driven for real: documents, exit statuses, and what is left after an error."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

import corp_onnx
from corp_onnx import __main__ as entry
from corp_onnx import cli
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.deploy.ort import LACKING
from corp_onnx.report.results import ONE_SHOT
from tests.builders import HEAD, HIDDEN, TINY, Net, mlp, relu
from tests.conftest import Files
from tests.inputs import activations, sentences

VERBS = ("demo", "export", "inspect", "calibrate", "merge", "prune", "verify", "build", "bench")
HALF = ("--mlp", 0.5, "--qk", 0.5, "--align", 1)


def document(ended):
    """The one JSON document on standard output; json.loads refuses anything more."""

    def not_json(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(ended.stdout, parse_constant=not_json)


@pytest.fixture(scope="session")
def pruned(files: Files) -> Path:
    """The files' model, cut by the command in a process of its own."""
    output = files.folder / "pruned.onnx"
    arguments = ["prune", files.model, "-o", output, "--data", files.data, *HALF]
    subprocess.run([sys.executable, "-m", "corp_onnx.cli", *map(str, arguments)], check=True)
    return output


@pytest.fixture(scope="session")
def labels(files: Files) -> Path:
    path = files.folder / "labels.npy"
    np.save(path, np.random.default_rng(0).integers(0, 3, 64))
    return path


# Documents


def test_inspect_gives_blocks_refusals_and_counts(command, files):
    ended = command("inspect", files.model, "--json")
    assert ended.status == 0
    found = document(ended)
    assert found.keys() >= {"blocks", "refusals", "shapes", "macs", "params", "macs_prunable"}
    assert found["notes"] == []
    assert found["shapes"] == {"x": [1, 128, 10]}
    assert found["macs"] > found["macs_prunable"] > 0
    attention, hidden, *_ = found["blocks"]
    for block in found["blocks"]:
        assert block.keys() >= {
            *("id", "kind", "width", "heads", "kv_heads", "head_width", "value_width"),
            *("prunable", "refused"),
        }
    assert (attention["kind"], attention["prunable"]) == ("attention", ["qk", "vo"])
    assert (attention["heads"], attention["kv_heads"], attention["head_width"]) == (2, 2, HEAD)
    assert (hidden["kind"], hidden["prunable"], hidden["width"]) == ("mlp", ["mlp"], HIDDEN)
    (refusal,) = found["refusals"]
    assert refusal.keys() == {"node", "op", "reason"}
    assert refusal["op"] == "Softmax"


def test_shapes_set_the_sizes_that_macs_are_counted_at(command, files):
    usual = document(command("inspect", files.model, "--json"))
    ended = command("inspect", files.model, "--shapes", "x:4x128x10", "--json")
    found = document(ended)
    assert found["shapes"] == {"x": [4, 128, 10]}
    assert found["macs"] == 4 * usual["macs"]


def test_calibrate_and_merge_give_what_they_saw(command, files, tmp_path):
    parts = []
    for index in range(2):
        parts.append(tmp_path / f"{index}.npz")
        ended = command(
            *("calibrate", files.model, "--data", files.data, "-o", parts[-1]),
            *("--shard", f"{index}/2", "--json"),
        )
        assert ended.status == 0
        found = document(ended)
        assert found["samples"] + found["held_out"] == 32
        assert found["output"] == str(parts[-1])
        assert found["source"] == str(files.data)
        assert set(found["tokens"].values()) == {7 * found["samples"]}
    ended = command("merge", *parts, "-o", tmp_path / "all.npz", "--json")
    assert ended.status == 0
    assert document(ended)["samples"] == 2 * found["samples"]
    ended = command(
        *("prune", files.model, "-o", tmp_path / "out.onnx", "--stats", tmp_path / "all.npz"),
        *(*HALF, "--json"),
    )
    merged = document(ended)
    assert merged["samples"] == 2 * found["samples"]
    assert merged["one_shot"] is True
    assert ended.status == (0 if merged["passed"] else 1)


def test_calibrate_resumes_what_was_asked_for_and_tidies_up(command, files, tmp_path):
    output, left = tmp_path / "all.npz", tmp_path / "all.npz.partial"
    arguments = ("calibrate", files.model, "--data", files.data, "-o", output, "--resume", "--json")
    statistics = tmp_path / "done.npz"
    assert command(*arguments[:5], statistics, "--json").status == 0
    done = Statistics.load(statistics)
    request = f"--data {files.data} --samples None --seed 1 --crops auto --shard 0/1"
    replace(done, source=request).save(left)
    refused = command(*arguments)
    assert refused.status == 2
    assert "--seed 1 --crops auto --shard 0/1, not with" in refused.stderr
    assert left.exists()
    resumed = command(*arguments, "--seed", 1)
    assert resumed.status == 0
    assert document(resumed)["samples"] == done.samples
    assert output.exists()
    assert not left.exists()


def test_prune_gives_cuts_counts_times_and_checks(command, files, tmp_path):
    output = tmp_path / "out.onnx"
    arguments = ("prune", files.model, "-o", output, "--data", files.data, *HALF, "--json")
    ended = command(*arguments)
    assert ended.status == 0
    found = document(ended)
    assert [block["id"] for block in found["blocks"]] == [
        "attention.0",
        "mlp.0",
        "attention.1",
        "mlp.1",
    ]
    for block in found["blocks"]:
        axis = "mlp" if block["id"].startswith("mlp") else "qk"
        (cut,) = block["cuts"].items()
        assert cut[0] == axis
        assert cut[1].keys() >= {"from", "to", "unexplained", "condition"}
        assert (cut[1]["from"], cut[1]["to"]) == ((HIDDEN, 7) if axis == "mlp" else (HEAD, 3))
        assert 0 < cut[1]["unexplained"] < 1
    for key in ("macs", "params"):
        assert 0 < found[key]["pruned"] < found[key]["dense"]
    assert all(seconds >= 0 for seconds in found["seconds"].values())
    assert found["output"] == str(output)
    assert found["passed"] is True
    assert found["one_shot"] is False
    for block in found["blocks"]:
        if block["id"].startswith("mlp"):
            assert block["output"] is None
        else:  # fitted, although its values keep their width
            assert 0 < block["output"]["error"] <= block["output"]["unseen"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]

    counted = document(command("inspect", output, "--json"))
    assert counted["macs"] == found["macs"]["pruned"]
    assert counted["params"] == found["params"]["pruned"]


def test_verify_compares_two_files(command, files, pruned, labels):
    ended = command(
        "verify", files.model, pruned, "--data", files.data, "--labels", labels, "--json"
    )
    assert ended.status == 0
    found = document(ended)
    assert 0 < found["relative_error"] < 0.1
    (name, error), *others = found["relative_errors"].items()
    assert (name, error, others) == (found["output"], found["relative_error"], [])
    assert 0.9 < found["cosine"] <= 1
    assert 0.5 < found["top1_agreement"] <= 1
    assert found["top1"].keys() == {"dense", "pruned"}
    for key in ("macs", "params"):
        assert 0 < found[key]["pruned"] < found[key]["dense"]
    assert (found["samples"], found["passed"]) == (64, True)
    assert "top1" not in document(
        command("verify", files.model, pruned, "--data", files.data, "--json")
    )


def test_verify_compares_internal_tensors(command, files, pruned):
    blocks = document(command("inspect", files.model, "--json"))["refusals"]
    tensor = onnx.load(files.model).graph.node[-1].input[0]
    assert blocks[0]["op"] == "Softmax"
    ended = command(
        "verify", files.model, pruned, "--data", files.data, "--output", tensor, "--json"
    )
    assert document(ended)["relative_errors"].keys() == {tensor}


def test_bench_gives_runs_and_speedups_over_the_first(command, files, pruned):
    ended = command("bench", files.model, pruned, pruned, "--runs", 5, "--batch", 2, "--json")
    assert ended.status == 0
    found = document(ended)
    assert [run["model"] for run in found["runs"]] == [str(files.model), str(pruned), str(pruned)]
    for run in found["runs"]:
        assert (run["target"], run["precision"], run["batch"]) == ("ort-cpu", "fp32", 2)
        assert run["iterations"] == 5
        assert 0 < run["median_ms"] <= run["p95_ms"]
    assert len(found["speedups"]) == 2
    for speedup in found["speedups"]:
        assert (speedup["model"], speedup["over"]) == (str(pruned), str(files.model))
        assert 0 < speedup["low"] <= speedup["ratio"] <= speedup["high"]


def test_bench_takes_several_targets_precisions_and_batches(command, files, pruned):
    ended = command(
        *("bench", files.model, pruned, "--target", "ort-cpu,openvino", "--batch", "1,3"),
        *("--runs", 3, "--json"),
    )
    found = document(ended)
    engines = [(run["batch"], run["target"], run["model"]) for run in found["runs"]]
    models = (str(files.model), str(pruned))
    assert engines == [
        (batch, target, model)
        for batch in (1, 3)
        for target in ("ort-cpu", "openvino")
        for model in models
    ]
    told = [run["device_ms"] is not None for run in found["runs"]]
    assert told == [run["target"] == "openvino" for run in found["runs"]]
    assert {entry["over"] for entry in found["speedups"]} == {str(files.model)}
    assert len(found["speedups"]) == 6
    assert found["conditions"]["cores"] >= 1


@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
def test_what_was_built_can_be_timed_where_it_was_built_for(command, files, tmp_path, target):
    folder = tmp_path / "engine"
    built = document(command("build", files.model, "--target", target, "-o", folder, "--json"))
    assert built["size_bytes"] == sum(
        file.stat().st_size for file in folder.iterdir() if file.name != "build.json"
    )
    assert Path(built["path"]).parent == folder
    assert command("bench", folder, "--target", target, "--runs", 2).status == 0
    other = {"ort-cpu": "openvino", "openvino": "ort-cpu"}[target]
    assert_refused(command("bench", folder, "--target", other), f"was built for {target} in fp32")


def test_a_model_with_narrow_inputs_is_written_and_compared_all_the_same(command, files, tmp_path):
    narrow = tmp_path / "narrow.onnx"
    asked = ("prune", files.model, "-o", narrow, "--data", files.data, *HALF)
    assert command(*asked, "--precision", "fp16", "--narrow-io").status == 0
    graph = onnx.load(narrow).graph
    types = {end.type.tensor_type.elem_type for end in (*graph.input, *graph.output)}
    assert types == {onnx.TensorProto.FLOAT16}
    ended = command("verify", files.model, narrow, "--data", files.data, "--json")
    assert 0 < document(ended)["relative_error"] < 1
    assert_refused(command(*asked, "--narrow-io"), "goes with --precision fp16 or bf16")


def test_bench_leaves_out_what_a_target_lacks(command, files, monkeypatch):
    """As long as every target and every precision is there; else it is a mistake."""
    monkeypatch.setitem(LACKING, "ort-cpu", ("int8",))
    asked = ("bench", files.model, "--warmup", 0, "--runs", 1, "--json")
    both = ("--target", "ort-cpu,openvino", "--precision")
    ended = command(*asked, *both, "fp32,int8")
    ran = {(run["target"], run["precision"]) for run in json.loads(ended.stdout)["runs"]}
    assert ran == {("ort-cpu", "fp32"), ("openvino", "fp32"), ("openvino", "int8")}
    assert "left out: ort-cpu has no kernels for int8" in " ".join(ended.stderr.split())

    assert_refused(command(*asked, *both, "int8"), "ort-cpu has no kernels for int8")
    alone = ("--target", "ort-cpu", "--precision", "fp32,int8")
    assert_refused(command(*asked, *alone), "ort-cpu has no kernels for int8")


def test_bench_tells_where_the_time_goes(command, files, pruned):
    ended = command("bench", files.model, pruned, "--runs", 2, "--profile", "--json")
    profiles = document(ended)["profiles"]
    assert [profile["model"] for profile in profiles] == [str(files.model), str(pruned)]
    assert all("LayerNormalization" in profile["operators_ms"] for profile in profiles)
    shown = command("bench", files.model, pruned, "--runs", 2, "--profile").stdout
    assert "ms of one inference" in " ".join(shown.split())


def test_bench_draws_a_picture(command, files, pruned, tmp_path):
    picture = tmp_path / "times.png"
    ended = command("bench", files.model, pruned, "--runs", 2, "--batch", "1,2", "--plot", picture)
    assert ended.status == 0
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20)) > 3  # it shows something


def test_a_model_of_one_batch_is_not_timed_at_another(command, tmp_path):
    net = Net(0)
    fixed = net.build(net("Mul", net.x(), 2.0))
    for dim, size in zip(fixed.graph.input[0].type.tensor_type.shape.dim, (1, 7, 10), strict=True):
        dim.dim_value = size
    onnx.save(fixed, tmp_path / "fixed.onnx")
    assert command("bench", tmp_path / "fixed.onnx", "--runs", 2).status == 0
    ended = command("bench", tmp_path / "fixed.onnx", "--batch", 2)
    assert_refused(ended, "a model has a fixed batch of 1")


def test_bench_takes_the_batch_of_the_sizes_and_no_other(command, files):
    four = ("--shapes", "ids:4x16,seen:4x16", "--runs", 2)
    (run,) = document(command("bench", files.text_model, *four, "--json"))["runs"]
    assert run["batch"] == 4
    assert_refused(command("bench", files.text_model, *four, "--batch", 8), "a batch of 4")


def test_an_engine_takes_the_place_of_no_other_file(command, files, tmp_path):
    model = tmp_path / "model.onnx"
    model.write_bytes(files.model.read_bytes())
    ended = command("build", model, "-o", tmp_path)
    assert_refused(ended, "holds the model itself")
    ended = command("build", files.model, "-o", tmp_path)
    assert_refused(ended, "holds files that are no engine")
    assert model.read_bytes() == files.model.read_bytes()
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "build.log").write_text("of a build that failed")
    for _ in range(2):  # a second engine may take the place of the first
        assert command("build", model, "-o", tmp_path / "engine").status == 0


def test_an_engine_that_cannot_be_built_leaves_no_folder(command, files, tmp_path):
    folder = tmp_path / "new" / "engine"
    ended = command(
        "build", files.model, "-o", folder, "--precision", "fp16", "--target", "openvino"
    )
    assert_refused(ended, "fp16")
    assert not folder.parent.exists()


def test_a_folder_for_an_engine_that_cannot_be_made_is_an_error(command, files):
    ended = command("build", files.model, "-o", files.model / "engine")
    assert_refused(ended, "takes no files")


def test_a_picture_that_cannot_be_drawn_is_an_error_before_anything_is_timed(command, files):
    ended = command("bench", files.model, "--plot", files.folder / "none" / "times.png")
    assert_refused(ended, "does not exist")


def test_bench_takes_sizes_by_input_name(command, files):
    long = ("--shapes", "ids:1x16", "--shapes", "seen:1x16")
    ended = command("bench", files.text_model, "--runs", 2, *long, "--json")
    assert ended.status == 0


def test_numbers_that_json_does_not_have_are_null(command, files, tmp_path):
    """A model whose output is zero, against one whose output is not: the error is infinite."""
    net = Net(0)
    onnx.save(net.build(net("Mul", net.x(), 0.0)), tmp_path / "zero.onnx")
    changed = onnx.load(tmp_path / "zero.onnx")
    changed.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.float32(1), changed.graph.initializer[0].name)
    )
    onnx.save(changed, tmp_path / "one.onnx")
    ended = command(
        *("verify", tmp_path / "zero.onnx", tmp_path / "one.onnx", "--data", files.data),
        *("--max-error", 1, "--json"),
    )
    assert ended.status == 1
    assert document(ended)["relative_error"] is None


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("inspect", ["attention.0", "qk vo", "not in a block", "MACs"]),
        ("calibrate", ["51 samples", "357 tokens", "13 samples held out", "written to"]),
        ("prune", ["mlp.1", "structure passed", "promises passed", "held-out relative error"]),
        ("verify", ["relative error", "top-1 agreement", "params"]),
        ("bench", ["median", "speed-up", "95 % interval", "x"]),
    ],
)
def test_people_get_tables_and_no_control_characters(command, files, pruned, tmp_path, verb, words):
    out = ("-o", tmp_path / "out")
    arguments = {
        "inspect": (files.model,),
        "calibrate": (files.model, "--data", files.data, *out),
        "prune": (files.model, "--data", files.data, *out, *HALF),
        "verify": (files.model, pruned, "--data", files.data),
        "bench": (files.model, pruned, "--runs", 2),
    }[verb]
    ended = command(verb, *arguments)
    assert (ended.status, ended.stderr) == (0, "")
    assert "\x1b" not in ended.stdout
    for word in words:
        assert word in " ".join(ended.stdout.split())


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_explains_itself_and_has_json(command, verb):
    ended = command(verb, "--help")
    assert ended.status == 0
    assert "--json" in ended.stdout
    assert "--log-level" in ended.stdout


# The same answer, twice


def test_statistics_give_the_same_file_as_the_data(command, files, tmp_path):
    statistics = tmp_path / "statistics.npz"
    assert command("calibrate", files.model, "--data", files.data, "-o", statistics).status == 0
    again = tmp_path / "again.onnx"
    corp = (*HALF, "--method", "corp")
    assert command("prune", files.model, "-o", again, "--stats", statistics, *corp).status == 0
    data = tmp_path / "from_data.onnx"
    assert command("prune", files.model, "-o", data, "--data", files.data, *corp).status == 0
    assert again.read_bytes() == data.read_bytes()
    other = tmp_path / "other.onnx"
    ended = command("prune", files.model, "-o", other, "--stats", statistics, "--mlp", 0.3)
    assert ended.status == 0
    assert ONE_SHOT in ended.stdout
    ended = command("prune", files.model, "-o", data, "--data", files.data, *HALF)
    assert ONE_SHOT not in ended.stdout
    assert ended.stdout.count(" output ") == 2  # of two attentions, fitted at full width
    assert other.read_bytes() != again.read_bytes()


def test_ratio_zero_gives_back_the_function(command, files, tmp_path):
    output = tmp_path / "same.onnx"
    nothing = ("--mlp", 0, "--qk", 0)
    ended = command("prune", files.model, "-o", output, "--data", files.data, *nothing, "--json")
    assert ended.status == 0
    found = document(ended)
    assert found["macs"]["dense"] == found["macs"]["pruned"]
    verified = document(command("verify", files.model, output, "--data", files.data, "--json"))
    assert verified["relative_error"] <= 1e-10
    assert output.read_bytes() != files.model.read_bytes()


def test_an_axis_that_is_not_given_is_not_cut_and_none_given_is_half_of_both(
    command, files, tmp_path
):
    def cut(*options):
        output = tmp_path / "out.onnx"
        ended = command(
            "prune",
            files.model,
            "-o",
            output,
            "--data",
            files.data,
            *options,
            "--align",
            1,
            "--json",
        )
        return {
            (axis, cut["to"])
            for block in document(ended)["blocks"]
            for axis, cut in block["cuts"].items()
        }

    assert cut("--mlp", 0.5) == {("mlp", 7)}
    assert cut("--qk", 0.5) == {("qk", 3)}
    assert cut() == {("mlp", 7), ("qk", 3)}


@pytest.mark.parametrize("method", ["corp", "mean", "none"])
@pytest.mark.parametrize("ranking", ["energy", "energy-norm"])
def test_methods_and_rankings_are_chosen_by_name(command, files, tmp_path, method, ranking):
    ended = command(
        *("prune", files.text_model, "-o", tmp_path / "out.onnx", "--data", files.text_data),
        *("--method", method, "--ranking", ranking, *HALF, "--json"),
    )
    assert ended.status in {0, 1}
    assert document(ended)["method"] == method


def test_the_preprocessing_goes_with_the_model(command, files, tmp_path):
    model = tmp_path / "model.onnx"
    model.write_bytes(files.model.read_bytes())
    recipe = Preprocessing("x", (7, 10), 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    recipe.save_beside(model)
    ended = command("prune", model, "-o", tmp_path / "out.onnx", "--data", files.data, *HALF)
    assert ended.status == 0
    assert Preprocessing.beside(tmp_path / "out.onnx") == recipe


def test_a_preprocessing_of_another_model_is_warned_of_and_stays(command, files, tmp_path):
    recipe = Preprocessing("x", (7, 10), 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    recipe.save_beside(tmp_path / "out.onnx")
    ended = command("prune", files.model, "-o", tmp_path / "out.onnx", "--data", files.data, *HALF)
    assert ended.status == 0
    assert "remove it if it is of another model" in ended.message
    assert Preprocessing.beside(tmp_path / "out.onnx") == recipe


def test_logs_go_to_standard_error_as_loud_as_asked(command, files, tmp_path):
    few = ("--samples", 8, "-o", tmp_path / "s.npz", "--json")
    arguments = ("calibrate", files.model, "--data", files.data, *few)
    loud = command(*arguments)
    assert "tokens per channel" in loud.message
    assert document(loud)["samples"] == 6
    silent = command(*arguments, "--log-level", "error")
    assert silent.stderr == ""


# Exit statuses


def test_a_failed_gate_is_exit_status_1_and_the_model_is_there(command, files, tmp_path):
    output = tmp_path / "out.onnx"
    arguments = ("prune", files.model, "-o", output, "--data", files.data, *HALF)
    ended = command(*arguments, "--max-error", 0, "--json")
    assert ended.status == 1
    found = document(ended)
    assert found["passed"] is False
    assert [check["name"] for check in found["checks"] if not check["passed"]] == ["max-error"]
    assert output.exists()
    verified = command(
        *("verify", files.model, output, "--data", files.data, "--max-error", 0, "--json"),
    )
    assert verified.status == 1
    assert document(verified)["passed"] is False
    assert command(*arguments, "--min-agreement", 0).status == 0


def saved(path, proto):
    onnx.save(proto, path)
    return path


def arrays(path, **values):
    np.savez(path, **values)
    return path


def text(path, content):
    path.write_text(content)
    return path


def conv():
    net = Net(0)
    return net.build(net("Conv", net.x("batch", 3, 8, 8), net.random(4, 3, 3, 3)))


def quantised():
    net = Net(0)
    y = net("QuantizeLinear", net.x(), np.float32(0.1), np.uint8(3))
    return net.build(net("DequantizeLinear", y, np.float32(0.1), np.uint8(3)))


def with_opset(version):
    proto = TINY["mlp"](0).proto
    proto.opset_import[0].version = version
    return proto


def with_custom_operator():
    """An MLP, and behind it an operator that nobody knows."""
    proto = TINY["mlp"](0).proto
    proto.opset_import.append(helper.make_opsetid("my.ops", 1))
    output = proto.graph.output[0]
    proto.graph.node.append(
        helper.make_node("Mystery", [output.name], ["mystery"], "mystery", domain="my.ops")
    )
    output.name = "mystery"
    return proto


def without_external_data(path):
    onnx.save(
        TINY["mlp"](0).proto, path, save_as_external_data=True, size_threshold=0, location="gone"
    )
    (path.parent / "gone").unlink()
    return path


def test_names_are_shown_as_they_are(command, tmp_path):
    net = Net(0)
    logits = net("MatMul", net.x("batch", 5, 5), net("Transpose", "x", perm=[0, 2, 1]))
    proto = net.build(net("MatMul", net("Softmax", logits), "x"))
    for node in proto.graph.node:
        node.name = f"at[/{node.name}]:smile:"
    ended = command("inspect", saved(tmp_path / "model.onnx", proto))
    assert "at[/Softmax_2]:smile:" in "".join(ended.stdout.split())


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_signs_that_the_screen_lacks_are_no_errors(files, tmp_path, monkeypatch, encoding):
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", shown)
    arguments = ["prune", files.model, "-o", tmp_path / "small.onnx", "--data", files.data, *HALF]
    assert cli.main([str(argument) for argument in arguments]) == 0
    shown.flush()
    assert b"written to" in shown.buffer.getvalue()


@pytest.mark.parametrize("verb", ["calibrate", "prune"])
def test_a_model_without_anything_to_prune_is_exit_status_3(command, files, tmp_path, verb):
    model = saved(tmp_path / "conv.onnx", conv())
    data = arrays(tmp_path / "c.npz", x=np.zeros((40, 3, 8, 8), np.float32))
    ended = command(verb, model, "-o", tmp_path / "out", "--data", data, "--json")
    assert (ended.status, ended.stdout) == (3, "")
    assert "no block of the model" in ended.message or "nothing prunable was found" in ended.message
    assert not (tmp_path / "out").exists()


QUANTISED = "is quantised already"

BAD_MODELS = {
    "not ONNX": (lambda f: text(f / "m.onnx", "not onnx"), "is not an ONNX model"),
    "empty": (lambda f: text(f / "m.onnx", ""), "holds no ONNX graph"),
    "missing": (lambda f: f / "m.onnx", "does not exist"),
    "a folder": (lambda f: f, "is not a file"),
    "opset too old": (lambda f: saved(f / "m.onnx", with_opset(9)), "opset 11 or later"),
    "opset unknown": (lambda f: saved(f / "m.onnx", with_opset(99)), "upgrade it with"),
    "quantised": (lambda f: saved(f / "m.onnx", quantised()), QUANTISED),
    "no external data": (
        lambda f: without_external_data(f / "m.onnx"),
        "put the external data file back",
    ),
}


def assert_refused(ended, words, status=2):
    """One paragraph on standard error, and nothing else anywhere."""
    assert ended.status == status
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert words in ended.message
    if not ended.stderr.startswith("Usage:"):
        (line,) = (line for line in ended.stderr.splitlines() if line.startswith("corp-onnx: "))
        assert ended.stderr.endswith(f"{line}\n")


@pytest.fixture
def results(tmp_path):
    """A folder that must be empty after an error."""
    folder = tmp_path / "results"
    folder.mkdir()
    yield folder
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("make", "words"), BAD_MODELS.values(), ids=BAD_MODELS)
@pytest.mark.parametrize("verb", ["inspect", "prune", "verify", "build", "bench"])
def test_a_model_that_cannot_be_used_is_exit_status_2(
    command, files, tmp_path, results, verb, make, words
):
    model = make(tmp_path)
    options = {
        "inspect": (),
        "prune": ("-o", results / "out.onnx", "--data", files.data),
        "verify": (files.model, "--data", files.data),
        "build": ("-o", tmp_path / "engine"),
        "bench": ("--runs", 1),
    }[verb]
    ended = command(verb, model, *options, "--json")
    if verb in {"build", "bench"} and words == QUANTISED:
        assert ended.status == 0  # it can be run, if not cut
    elif verb == "verify" and words == QUANTISED:
        assert_refused(ended, "have no output")  # likewise, but it is another model
    else:
        assert_refused(ended, words)


def test_a_truncated_model_is_exit_status_2(command, files, tmp_path, results):
    whole = files.model.read_bytes()
    model = tmp_path / "model.onnx"
    for share in (0.1, 0.5, 0.9, 0.999):
        model.write_bytes(whole[: int(share * len(whole))])
        ended = command("prune", model, "-o", results / "out.onnx", "--data", files.data)
        assert_refused(ended, "model.onnx")


def test_an_operator_that_onnx_runtime_does_not_know_is_exit_status_2(
    command, files, tmp_path, results
):
    model = saved(tmp_path / "model.onnx", with_custom_operator())
    assert command("inspect", model).status == 0
    ended = command("prune", model, "-o", results / "out.onnx", "--data", files.data, *HALF)
    assert_refused(ended, "my.ops:Mystery")
    assert "is named by --custom-op-library" in ended.message


def test_the_version_is_told(command):
    ended = command("--version")
    assert (ended.status, ended.stdout) == (0, f"corp-onnx {metadata.version('corp_onnx')}\n")
    assert document_of_module("--version") == ended.stdout


def document_of_module(*arguments):
    """What ``python -m corp_onnx`` prints."""
    words = [sys.executable, "-m", "corp_onnx", *arguments]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


BAD_DATA = {
    "another name": (lambda x: {"y": x}, "but the model's inputs are 'x'"),
    "another shape": (lambda x: {"x": x[..., :9]}, "but the model expects [n, ?, 10]"),
    "another type": (
        lambda x: {"x": x.astype(np.int64)},
        "as int64, but the model expects float32",
    ),
    "no samples": (lambda x: {"x": x[:0]}, "has no samples in it"),
    "too few samples": (lambda x: {"x": x[:2, :3]}, "give at least"),
    "not a number": (lambda x: {"x": x * np.nan}, "is not finite (NaN or infinity)"),
}


@pytest.mark.parametrize(("make", "words"), BAD_DATA.values(), ids=BAD_DATA)
@pytest.mark.parametrize("verb", ["calibrate", "prune"])
def test_data_that_do_not_fit_are_exit_status_2(
    command, files, tmp_path, results, verb, make, words
):
    data = arrays(tmp_path / "odd.npz", **make(activations()))
    ended = command(verb, files.model, "-o", results / "out", "--data", data)
    assert_refused(ended, words)


def test_activations_that_overflow_are_exit_status_2(command, tmp_path, results):
    model = saved(tmp_path / "model.onnx", TINY["mlp"](0).proto)
    data = arrays(tmp_path / "data.npz", x=np.float32(3e37) * activations())
    ended = command("prune", model, "-o", results / "out.onnx", "--data", data)
    assert_refused(ended, "the activations hold NaN or infinity")


def test_texts_beyond_the_vocabulary_or_the_positions_are_exit_status_2(
    command, files, tmp_path, results
):
    rng = np.random.default_rng(0)
    for inputs, words in (
        (sentences(rng, samples=40, length=20), "cannot run the model on inputs of shape"),
        (
            sentences(rng, samples=40, length=9) | {"ids": np.full((40, 9), 8)},
            "indices element out of data bounds",
        ),
    ):
        data = arrays(tmp_path / "odd.npz", **inputs)
        ended = command("prune", files.text_model, "-o", results / "out.onnx", "--data", data)
        assert_refused(ended, words)


BAD_REQUESTS = {
    "a share above 1": (("--mlp", 1.5), "--mlp 1.5 is not a share"),
    "a share of 1": (("--qk", 1), "--qk 1 is not a share"),
    "a negative share": (("--mlp", -0.5), "--mlp -0.5 is not a share"),
    "no share": (("--mlp", "nan"), "--mlp nan is not a share"),
    "no number": (("--mlp", "half"), "Invalid value for '--mlp'"),
    "no alignment": (("--align", 0), "--align 0 is not a multiple"),
    "a negative ridge": (("--ridge", -1), "--ridge -1 is no regularisation"),
    "no ridge": (("--ridge", "nan"), "--ridge nan is no regularisation"),
    "unknown ranking": (("--ranking", "size"), "choose one of energy, energy-norm, elimination"),
    "elimination by another method": (
        ("--method", "corp", "--ranking", "elimination"),
        "belongs to --method best",
    ),
    "shares and a budget": (("--macs", 0.5, "--mlp", 0.5), "give either shares to remove"),
    "unknown method": (("--method", "magic"), "is not one of"),
    "unknown flag": (("--mpl", 0.5), "No such option: --mpl"),
    "unknown provider": (("--providers", "MyProvider"), "execution provider MyProvider is not in"),
    "no provider": (("--providers", ""), "choose one of these with --providers"),
    "unknown log level": (("--log-level", "loud"), "is none of debug, info, warning and error"),
    "no gate": (("--max-error", "nan"), "--max-error nan is no limit"),
    "no agreement": (("--min-agreement", 2), "--min-agreement 2 is no share"),
    "no samples": (("--samples", 0), "Invalid value for '--samples'"),
    "shapes of nothing": (("--shapes", "1x2x3"), "is not of the form NAME:1x3x224x224"),
    "shapes of zero": (("--shapes", "x:0x7x10"), "--shapes gives x a dimension of 0"),
    "shapes given twice": (("--shapes", "x:1x7x10,x:2x7x10"), "--shapes gives 'x' twice"),
    "shapes of another input": (("--shapes", "y:1x7x10"), "the inputs of the model are x"),
    "shapes of another rank": (("--shapes", "x:1x7"), "[1, 7] does not fit"),
    "shapes against the model": (("--shapes", "x:1x7x9"), "[1, 7, 9] does not fit"),
    "data and statistics": (("--stats", "s.npz"), "give either --data"),
    "no such library": (("--custom-op-library", "none.so"), "none.so does not exist"),
    "two models": (("other.onnx",), "unexpected extra argument"),
}


@pytest.mark.parametrize(("options", "words"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_request_that_makes_no_sense_is_exit_status_2(command, files, results, options, words):
    given = ("prune", files.model, "-o", results / "out.onnx", "--data", files.data)
    assert_refused(command(*given, *options), words)


def test_a_library_that_is_none_is_exit_status_2(command, files, results):
    ended = command(
        *("prune", files.model, "-o", results / "out.onnx", "--data", files.data),
        *("--custom-op-library", files.data),
    )
    assert_refused(ended, "is no library of custom operators that ONNX Runtime")


def test_neither_data_nor_statistics_is_exit_status_2(command, files, results):
    ended = command("prune", files.model, "-o", results / "out.onnx")
    assert_refused(ended, "give either --data")


def test_data_of_no_known_kind_are_exit_status_2(command, files, results):
    for source, words in (
        ("nowhere", "there are no data at 'nowhere'"),
        (files.model, "is not of a kind that can be read"),
        (files.folder, "takes none; give arrays in a .npz"),
        ("nowhere.py:load_data", "nowhere.py does not exist"),
        ("random", "random numbers are no calibration data"),
    ):
        ended = command("prune", files.model, "-o", results / "out.onnx", "--data", source)
        assert_refused(ended, words)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere/out", "nowhere does not exist"),
        ("", "it is a folder"),
        ("/proc/out", "/proc takes no files"),
    ],
)
@pytest.mark.parametrize("verb", ["calibrate", "merge", "prune"])
def test_an_output_that_cannot_be_written_is_exit_status_2(
    command, files, results, verb, target, words
):
    arguments = {
        "calibrate": (files.model, "--data", files.data),
        "merge": (files.data,),
        "prune": (files.model, "--data", files.data),
    }[verb]
    assert_refused(command(verb, *arguments, "-o", results / target), words)


@pytest.mark.parametrize("flag", [("--samples", 8), ("--crops", 2), ("--allow-random",)])
def test_flags_of_data_are_refused_where_statistics_are_given(command, files, tmp_path, flag):
    arguments = ("prune", files.model, "-o", tmp_path / "out.onnx", "--stats", files.data)
    assert_refused(command(*arguments, *flag), "with --stats that is done")


def test_a_negative_seed_is_exit_status_2(command, files, tmp_path):
    arguments = ("--data", files.data, "-o", tmp_path / "out.onnx", "--seed", -1)
    assert_refused(command("prune", files.model, *arguments), "--seed")


def test_widths_that_stay_although_some_was_to_go_are_told(command, files, tmp_path):
    arguments = ("prune", files.model, "--data", files.data, "-o", tmp_path / "out.onnx")
    told = command(*arguments, "--mlp", 0.5, "--align", 64)
    assert "--mlp 0.5 leaves axes of width 14 as they are" in told.message
    assert "leaves axes" not in command(*arguments, "--mlp", 0.5, "--align", 2).message


def test_a_folder_for_results_that_cannot_be_made_is_exit_status_2(command, files):
    ended = command("demo", "--run-dir", files.model / "demo")
    assert_refused(ended, "cannot make the folder")


def test_statistics_that_are_none_are_exit_status_2(command, files, tmp_path, results):
    def prune(model, statistics):
        return command("prune", model, "-o", results / "out.onnx", "--stats", statistics)

    assert_refused(prune(files.model, tmp_path / "none.npz"), "does not exist; make it with")
    assert_refused(prune(files.model, files.data), "holds no calibration statistics")
    assert_refused(prune(files.model, files.model), "holds no calibration statistics")
    other = tmp_path / "other.npz"
    command("calibrate", files.text_model, "--data", files.text_data, "-o", other)
    assert_refused(prune(files.model, other), "were taken of another model")
    mine = tmp_path / "mine.npz"
    command("calibrate", files.model, "--data", files.data, "-o", mine)
    ended = command("merge", mine, other, "-o", results / "all.npz")
    assert_refused(ended, "were taken of different models")


def test_labels_that_do_not_match_are_exit_status_2(command, files, labels, tmp_path):
    def verify(path, *more):
        given = ("verify", files.model, files.model, "--data", files.data)
        return command(*given, "--labels", path, *more)

    assert verify(labels).status == 0
    short = tmp_path / "short.npy"
    np.save(short, np.zeros(63, int))
    assert_refused(verify(short), "holds 63 labels, but")
    assert_refused(verify(tmp_path / "none.npy"), "do not exist")
    assert_refused(verify(files.data), "holds no labels")
    assert_refused(verify(text(tmp_path / "words.txt", "cat dog")), "holds no labels")
    inner = onnx.load(files.model).graph.node[2].output[0]
    assert_refused(verify(labels, "--output", inner), "64 labels for 448 output vectors")


def test_models_that_cannot_be_compared_are_exit_status_2(command, files, tmp_path):
    ended = command("verify", files.model, files.text_model, "--data", files.data)
    assert_refused(ended, "have no output")
    ended = command("verify", files.model, files.model, "--data", files.data, "--output", "nowhere")
    assert_refused(ended, "the model has no tensor 'nowhere'")
    plain = saved(tmp_path / "mlp.onnx", TINY["mlp"](0).proto)
    masked = saved(tmp_path / "masked.onnx", TINY["mask_added"](0).proto)
    ended = command("verify", plain, masked, "--data", files.data, "--output", "x")
    assert_refused(ended, "the model also reads added, which the data do not have")
    net = Net(0)
    narrow = net.build(mlp(net, net.x(), lambda net, y: net("Relu", y)))
    name, other = (each.graph.output[0].name for each in (narrow, TINY["mlp"](0).proto))
    assert name == other
    net = Net(0)
    hidden = net.linear(net.x(), 10, 14)
    for node in net.nodes:
        node.output[:] = [name if output == hidden else output for output in node.output]
    wide = saved(tmp_path / "wide.onnx", net.build(name))
    ended = command("verify", plain, wide, "--data", files.data)
    assert_refused(ended, "has shape (8, 7, 10) in the dense model and (8, 7, 14) in the other")


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "0/0", "-1/2", "1/2/3"])
def test_a_shard_that_is_none_is_exit_status_2(command, files, results, shard):
    ended = command(
        *("calibrate", files.model, "--data", files.data, "-o", results / "s.npz"),
        *("--shard", shard),
    )
    assert_refused(ended, "is not of the form i/n with i from 0 to n - 1")


def test_a_shard_without_samples_is_exit_status_2(command, files, results):
    ended = command(
        *("calibrate", files.model, "--data", files.data, "-o", results / "s.npz"),
        *("--shard", "99/100"),
    )
    assert_refused(ended, "holds no samples")


def test_bench_refuses_sizes_of_inputs_that_are_not_there(command, files):
    ended = command("bench", files.model, "--runs", 1, "--shapes", "y:1x2")
    assert_refused(ended, "--shapes names y, but the inputs are x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "corp-onnx"),
        (("trim",), "No such command 'trim'"),
        (("export", "timm:vit_tiny_patch16_224"), "Missing option '--output'"),
        (("inspect",), "Missing argument 'MODEL'"),
        (("merge", "-o", "out.npz"), "Missing argument 'FILE...'"),
        (("bench", "model.onnx", "--target", "abacus"), "is none of ort-cpu, "),
        (("bench", "model.onnx", "--precision", "fp4"), "is none of fp32, "),
        (("bench", "model.onnx", "--batch", "0"), "is no list of sizes"),
        (("build", "model.onnx", "-o", "out", "--target", "abacus"), "is none of"),
        (("bench", "model.onnx", "--batch", "²"), "is no list of sizes"),
        (("bench", "model.onnx", "--shapes", "x:²"), "--shapes"),
        (("bench", "model.onnx", "--workspace", "1"), "--workspace means nothing to ort-cpu"),
        (
            ("build", "model.onnx", "-o", "out", "--target", "openvino", "--graph-level", "basic"),
            "--graph-level means nothing to openvino",
        ),
        (("bench", "model.onnx", "--data", "d.npz"), "--data is for ranges"),
        (("prune", "m.onnx", "-o", "o.onnx", "--data", "d", "--batch", "2"), "for --latency"),
        (
            ("prune", "m.onnx", "-o", "o.onnx", "--data", "d", "--target", "openvino"),
            "give one too",
        ),
        (
            ("build", "m.onnx", "-o", "e", "--target", "abacus", "--cache", "c"),
            "is none of ort-cpu",
        ),
        (
            (
                *("prune", "m.onnx", "-o", "o.onnx", "--data", "d.npz"),
                *("--weight-only", "int8", "--target", "tensorrt"),
            ),
            "TensorRT does not have",
        ),
    ],
)
def test_a_command_that_is_not_complete_is_exit_status_2(command, arguments, words):
    ended = command(*arguments)
    assert ended.status == 2
    assert words in " ".join((ended.stdout + ended.stderr).split())
    assert "Traceback" not in ended.stderr


def test_a_model_that_chooses_classes_itself_is_refused_at_once(command, tmp_path):
    net = Net(0)
    path = tmp_path / "classes.onnx"
    onnx.save(net.build(net("ArgMax", mlp(net, net.x(), relu), axis=-1)), path)
    ended = command("prune", path, "-o", tmp_path / "out.onnx", "--data", tmp_path / "none.npz")
    assert ended.status == 2
    assert "export the model with its logits among the outputs" in ended.message


def test_an_interrupt_while_modules_are_loaded_has_the_same_status(monkeypatch, capsys):
    class Interrupted:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setattr(corp_onnx, "cli", Interrupted())
    assert entry.main() == 130
    assert capsys.readouterr().err == "corp-onnx: interrupted\n"


# A process of its own


def process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "corp_onnx.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_a_process_prints_one_document_and_ends_with_the_status(files, pruned, tmp_path):
    done = process("verify", files.model, pruned, "--data", files.data, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["passed"] is True
    failed = process(
        "verify", files.model, pruned, "--data", files.data, "--max-error", 0, "--json"
    )
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["passed"] is False
    refused = process("inspect", tmp_path / "none.onnx", "--json")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("corp-onnx: ")


def test_an_interrupt_while_calibrating_is_exit_status_130_and_leaves_nothing(
    files, tmp_path, results
):
    """Ctrl-C as a terminal sends it, once the progress bar says that samples are being read."""
    data = tmp_path / "many.npy"
    np.save(data, np.zeros((400_000, 1, 10), np.float32))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    screen, terminal = pty.openpty()
    arguments = ["prune", files.model, "-o", results / "out.onnx", "--data", data, "--json"]
    running = subprocess.Popen(
        [sys.executable, "-m", "corp_onnx.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=os.environ | {"TMPDIR": str(temporary), "TERM": "xterm"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )
    os.close(terminal)
    shown = b""
    while b"calibrating" not in shown:
        shown += os.read(screen, 4096)
    running.send_signal(signal.SIGINT)
    while b"no file is half-written" not in shown:
        shown += os.read(screen, 4096)
    stdout, _ = running.communicate(timeout=60)
    os.close(screen)
    assert running.returncode == 130
    assert stdout == b""
    assert b"corp-onnx: interrupted" in shown
    assert b"Traceback" not in shown
    assert {path.name for path in temporary.iterdir()} <= {".ses"}  # ONNX Runtime's, on import


# What bench and build are told, and tell


def fixed(path, batch):
    """A model of one batch."""
    net = Net(0)
    return saved(path, net.build(net.linear(net.x(batch, 10), 10, 10)))


def test_bench_takes_the_batch_of_the_model(command, tmp_path):
    """Of one that was built too, whose file is not there to say it."""
    model, engine = fixed(tmp_path / "eight.onnx", 8), tmp_path / "engine"
    assert command("build", model, "-o", engine).status == 0
    for path in (model, engine):
        (run,) = document(command("bench", path, "--runs", 2, "--json"))["runs"]
        assert run["batch"] == 8


def test_bench_says_what_it_ran_with(command, files):
    ended = command(
        *("bench", files.model, "--target", "ort-cpu,openvino", "--threads", 1),
        *("--runs", 2, "--warmup", 2, "--json"),
    )
    found = document(ended)
    first, second = found["runs"]
    assert (first["versions"].keys(), second["versions"].keys()) == (
        {"onnxruntime", "machine"},
        {"openvino"},
    )
    assert [run["threads"] for run in found["runs"]] == [1, 1]
    assert {run["warmup"] >= 2 for run in found["runs"]} == {True}
    assert {type(run["settled"]) for run in found["runs"]} == {bool}
    (speedup,) = found["speedups"]
    assert (speedup["target"], speedup["over_target"]) == ("openvino", "ort-cpu")
    assert found["conditions"].keys() == found["conditions_after"].keys()
    assert found["conditions"]["busy"] is not None
    assert found["conditions_after"]["busy"] is None


@pytest.mark.parametrize("verb", ["build", "bench"])
def test_custom_operators_are_brought_where_a_model_is_quantised(command, files, tmp_path, verb):
    """The twin without the library: the model cannot be run for its ranges."""
    model = saved(tmp_path / "model.onnx", with_custom_operator())
    out = ("-o", tmp_path / "engine") if verb == "build" else ("--runs", 1)
    asked = (verb, model, *out, "--precision", "int8", "--data", files.data)
    assert_refused(command(*asked), "cannot load the model")
    ended = command(*asked, "--custom-op-library", files.data)
    assert_refused(ended, "is no library of custom operators")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("build", "m.onnx", "-o", "e", "--refit"), "--refit means nothing to ort-cpu"),
        (
            ("build", "m.onnx", "-o", "e", "--target", "tensorrt-rtx", "--version-compatible"),
            "--version-compatible means nothing to tensorrt-rtx, it is for tensorrt;",
        ),
        (("build", "m.onnx", "-o", "e", "--cuda-graph"), "No such option: --cuda-graph"),
        (("bench", "m.onnx", "--cuda-graph"), "--cuda-graph means nothing to ort-cpu"),
        (("bench", "m.onnx", "--refit"), "--refit means nothing to ort-cpu"),
        (
            ("bench", ".", "--target", "tensorrt", "--refit"),
            "--refit says how an engine is built, and here all are built already",
        ),
    ],
)
def test_flags_of_tensorrt_are_refused_where_they_mean_nothing(command, asked, words):
    ended = command(*asked)
    assert ended.status == 2
    assert words in " ".join((ended.stdout + ended.stderr).split())
