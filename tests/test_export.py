"""Exporting: real modules through both exporters, and every way in which a source can be wrong."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import onnx
import pytest

from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.errors import (
    BackendUnavailable,
    GraphError,
    OutputError,
    PlanError,
    VerificationError,
)
from corp_onnx.export import export
from corp_onnx.export.backend import first_line, root
from corp_onnx.export.checkpoint import few
from corp_onnx.session import open_session

TINY_TIMM = "test_vit"
BOTH = pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])

SCRIPT = """
    import torch

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(50, 8)
            self.out = torch.nn.Linear(8, 3)

        def forward(self, ids, weights):
            hidden = self.out(self.embedding(ids))
            return hidden, (hidden * weights[:, None, :]).mean(1)

    class Counting(torch.nn.Module):
        def forward(self, x):
            return x + float(len(x))

    class NotANumber(torch.nn.Module):
        def forward(self, x):
            return x * float("nan")

    class Silent(torch.nn.Module):
        def forward(self, x):
            return None

    class Elsewhere(Counting):
        # Depends on the batch where the mask is so: exports keep the traced batch.

        def __init__(self, where):
            super().__init__()
            self.where = where
            self.table = torch.nn.Embedding(50, 4)

        def forward(self, ids, attention_mask):
            hidden = self.table(ids)
            there = (attention_mask == self.where)[..., None]
            return torch.where(there, super().forward(hidden), hidden)

    class Pooled(Elsewhere):
        def forward(self, ids, attention_mask):
            return super().forward(ids, attention_mask).mean(1)

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(50, 4)

        def forward(self, ids, decoder_ids):
            read, written = self.table(ids), self.table(decoder_ids)
            return written + (written @ read.transpose(1, 2)).softmax(-1) @ read, read

    class Fixed(torch.nn.Module):
        def forward(self, ids, states):
            return ids[..., None] + states

    class Differences(torch.nn.Module):
        def forward(self, x):
            return torch.diff(x)

    def pair():
        return Pair(), {"ids": torch.ones(2, 7).long(), "decoder_ids": torch.ones(2, 5).long()}

    def fixed():
        return Fixed(), (torch.ones(2, 5).long(), torch.randn(2, 5, 4))

    def differences():
        return Differences(), (torch.randn(2, 5),)

    def text():
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        return {"ids": torch.randint(0, 50, (2, 5)), "attention_mask": mask}

    def at_padding():
        return Elsewhere(0), text()

    def at_tokens():
        return Elsewhere(1), text()

    def pooled():
        return Pooled(0), text()

    def by_position():
        return Mean(), (torch.randint(0, 50, (2, 5)), torch.randn(2, 3))

    def by_name():
        ids, weights = torch.randint(0, 50, (2, 5)), torch.randn(2, 3)
        return Mean(), {"weights": weights, "ids": ids}

    def one_row():
        return torch.nn.Linear(4, 2), (torch.randn(1, 4),)

    def counting():
        return Counting(), (torch.randn(2, 4),)

    def not_a_number():
        return NotANumber(), (torch.randn(2, 4),)

    def silent():
        return Silent(), (torch.randn(2, 4),)

    def misfit():
        return torch.nn.Linear(4, 2), (torch.randn(2, 5),)

    def two_batches():
        return Mean(), (torch.randint(0, 50, (2, 5)), torch.randn(3, 3))

    def no_examples():
        return torch.nn.Linear(4, 2), ()

    def no_module():
        return torch.randn(2, 4)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    return path


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "model.onnx"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def left_behind(output):
    return sorted(path.name for path in output.parent.iterdir())


def test_the_library_imports_export_without_torch():
    code = "import sys, corp_onnx.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"exporter": "torchscript", "opset": 23}, "torchscript exporter writes opset 13 to 20"),
        ({"exporter": "dynamo", "opset": 17}, "dynamo exporter writes opset 18 to 23"),
        ({"exporter": "fx"}, "no exporter 'fx'; choose torchscript or dynamo"),
        ({"random_weights": True}, "exclude each other"),
    ],
)
def test_contradicting_options_are_refused(options, reason, output):
    with pytest.raises(PlanError, match=reason):
        export("timm:any", output, checkpoint=output, **options)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        export("timm:any", tmp_path / "nowhere" / "model.onnx")


@pytest.mark.parametrize("missing", ["torch", "timm", "transformers"])
def test_a_missing_package_is_named_with_its_cure(missing, output, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    source = "hf:folder" if missing == "transformers" else "timm:any"
    with pytest.raises(BackendUnavailable, match=rf"{missing}.*pip install 'corp_onnx\[export\]'"):
        export(source, output)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("model.pt", "is no source; give timm:NAME"),
        ("script.py:", "is no source"),
        ("{folder}/absent.py:make", "does not exist"),
        ("{folder}/script.py:absent", "no function 'absent'; it has pair, fixed"),
        ("{folder}/script.py:no_module", "must return"),
        ("{folder}/script.py:no_examples", "example inputs as a tuple or dict of tensors"),
        (
            "{folder}/script.py:two_batches",
            r"differ in their batch: ids \[2, 5\], weights \[3, 3\]",
        ),
        ("{folder}/script.py:misfit", "cannot be run on its example inputs"),
        ("{folder}/script.py:silent", "returns NoneType, not tensors"),
    ],
)
def test_a_source_that_is_wrong_is_refused_with_the_reason(source, reason, script, output):
    with pytest.raises(GraphError, match=reason):
        export(source.format(folder=script.parent), output)
    assert left_behind(output) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [("import nothing_of_that_name", "nothing_of_that_name"), ("def f(:", "cannot be imported")],
)
def test_a_script_that_cannot_be_imported_is_refused(content, reason, script, output):
    script.write_text(content, encoding="utf-8")
    with pytest.raises(GraphError, match=reason):
        export(f"{script}:make", output)


def test_names_are_listed_up_to_three():
    assert few({"b", "a"}) == "a, b"
    assert few(["d", "c", "b", "a"]) == "a, b, c and 1 more"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("absent.pth", None, "does not exist"),
        ("broken.pth", b"PK\x03\x04", "cannot be read as weights alone"),
        ("empty.pth", b"", "cannot be read as weights alone"),
        ("broken.safetensors", b"\xff" * 16, "cannot be read"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_refused(name, content, reason, script, output):
    path = script.with_name(name)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GraphError, match=reason):
        export(f"{script}:by_position", output, checkpoint=path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"out.bias": None}, "does not fit the model: missing: out.bias"),
        ({"extra": (1,)}, "does not fit the model: not in the model: extra"),
        ({"out.weight": (3, 9)}, r"of another shape: out.weight \[3, 9\] for \[3, 8\]"),
        ({"epoch": 3}, "holds more than weights by name"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_key(changes, reason, script, output):
    import torch

    shapes = {"embedding.weight": (50, 8), "out.weight": (3, 8), "out.bias": (3,)} | changes
    state = {
        name: torch.zeros(shape) if isinstance(shape, tuple) else shape
        for name, shape in shapes.items()
        if shape is not None
    }
    torch.save(state, script.with_name("weights.pth"))
    with pytest.raises(GraphError, match=reason):
        export(f"{script}:by_position", output, checkpoint=script.with_name("weights.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("function", ["counting", "not_a_number"])
def test_an_export_that_computes_something_else_is_not_written(function, script, output):
    with pytest.raises(VerificationError, match="its outputs differ from torch's by"):
        export(f"{script}:{function}", output)
    assert left_behind(output) == []


@pytest.mark.slow
def test_what_comes_out_at_padding_is_nobodys_business(script, output):
    assert export(f"{script}:at_padding", output).parity < 1e-6
    for counts in ("at_tokens", "pooled"):
        with pytest.raises(VerificationError, match="its outputs differ from torch's by"):
            export(f"{script}:{counts}", output)


@pytest.mark.slow
@BOTH
def test_sequences_of_other_lengths_have_axes_of_their_own(exporter, script, output):
    made = export(f"{script}:pair", output, exporter=exporter)
    assert made.inputs == {"ids": ("batch", "sequence"), "decoder_ids": ("batch", "sequence_2")}
    ids, decoder_ids = np.ones((3, 9), np.int64), np.ones((3, 4), np.int64)
    results = open_session(output).run({"ids": ids, "decoder_ids": decoder_ids})
    assert [value.shape for value in results.values()] == [(3, 4, 4), (3, 9, 4)]


@pytest.mark.slow
def test_a_module_that_cannot_read_shorter_texts_is_refused_with_the_shapes(script, output):
    with pytest.raises(GraphError, match=r"another batch and length \(ids \[3, 4\], states"):
        export(f"{script}:fixed", output)


@pytest.mark.slow
def test_torch_prints_no_graph_that_it_cannot_write(script, output, capfd):
    with pytest.raises(GraphError, match=r"aten::diff.* not supported; try the other exporter"):
        export(f"{script}:differences", output)
    assert capfd.readouterr().out == ""


def test_a_failure_is_told_by_its_root():
    cause = AssertionError("only 4D query, key, and value are supported")
    failure = RuntimeError("step 3 of 3 failed. Next steps:")
    failure.__cause__ = cause
    assert first_line(root(failure)) == str(cause)
    assert first_line(failure) == str(failure)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "OPT", "Gemma2", "Qwen3"])
def test_a_causal_model_is_compared_with_padding_on_either_side(
    kind, exporter, tmp_path, output, monkeypatch
):
    folder = causal(kind, tmp_path)
    made = export(f"hf:{folder}", output, random_weights=True, exporter=exporter)
    assert made.parity < 1e-5
    if kind == "Llama" and exporter == "dynamo":  # behind padding that comes first
        monkeypatch.setattr("corp_onnx.export.module.Module.counted", lambda *_: {})
        with pytest.raises(VerificationError, match="its outputs differ from torch's by"):
            export(f"hf:{folder}", output, random_weights=True, exporter=exporter)


def causal(kind, folder):
    """A folder with a small language model of transformers, without its weights."""
    import transformers

    old = {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    new = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 48,
    }
    family = getattr(transformers, f"{kind}Config")
    config = family(vocab_size=60, pad_token_id=0, **(old if kind == "GPT2" else new))
    config.architectures = ["GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"]
    config.save_pretrained(folder / kind)
    return folder / kind


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("function", ["by_position", "by_name", "one_row"])
def test_a_module_of_a_script_runs_at_any_batch_and_length(function, exporter, script, output):
    made = export(f"{script}:{function}", output, exporter=exporter)
    assert made.parity < 1e-6
    assert left_behind(output) == ["model.onnx"]
    session = open_session(output)
    if function == "one_row":
        assert made.inputs == {"input": ("batch", 4)}
        assert session.run({"input": np.ones((7, 4), np.float32)})["output"].shape == (7, 2)
        return
    assert made.inputs == {"ids": ("batch", "sequence"), "weights": ("batch", 3)}
    assert list(made.inputs) == (
        ["ids", "weights"] if function == "by_position" else ["weights", "ids"]
    )
    assert made.parameters == 50 * 8 + 8 * 3 + 3
    results = session.run(
        {"ids": np.ones((4, 9), np.int64), "weights": np.ones((4, 3), np.float32)}
    )
    assert [value.shape for value in results.values()] == [(4, 9, 3), (4, 3)]


@pytest.mark.slow
def test_weights_too_large_for_one_file_lie_in_one_other(script, output, monkeypatch):
    monkeypatch.setattr("corp_onnx.export.writer.LARGEST_PROTOBUF_BYTES", 1000)
    export(f"{script}:by_position", output, exporter="dynamo")
    assert left_behind(output) == ["model.onnx", "model.onnx.data"]
    ids, weights = np.ones((4, 9), np.int64), np.ones((4, 3), np.float32)
    assert len(open_session(output).run({"ids": ids, "weights": weights})) == 2


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bare.safetensors", "bare.pth", "wrapped.pth"])
def test_the_weights_of_a_checkpoint_are_what_runs(form, script, output):
    import torch
    from safetensors.torch import save_file

    linear = {"weight": torch.arange(8.0).reshape(2, 4), "bias": torch.tensor([1.0, -1.0])}
    path = script.with_name(form)
    if path.suffix == ".safetensors":
        save_file(linear, path)
    elif form == "wrapped.pth":
        torch.save(
            {"model": {f"module.{k}": v.half() for k, v in linear.items()}, "epoch": 7}, path
        )
    else:
        torch.save(linear, path)
    export(f"{script}:one_row", output, checkpoint=path)
    x = np.random.default_rng(0).standard_normal((5, 4), dtype=np.float32)
    expected = x @ linear["weight"].numpy().T + linear["bias"].numpy()
    result = open_session(output).run({"input": x})["output"]
    # four products of numbers below 7, and a bias
    np.testing.assert_allclose(result, expected, atol=5 * 4 * 7 * np.finfo(np.float32).eps)


@pytest.mark.slow
@BOTH
def test_a_timm_model_is_exported_with_its_preprocessing(exporter, tmp_path, output):
    import timm
    import torch

    module = timm.create_model(TINY_TIMM, num_classes=7).eval()
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    made = export(
        f"timm:{TINY_TIMM}", output, checkpoint=tmp_path / "weights.pth", exporter=exporter
    )
    assert made.parity < 1e-5
    assert made.parameters == sum(weight.numel() for weight in module.parameters())
    assert left_behind(output) == ["model.onnx", "model.preprocessing.json"]
    assert onnx.load(output).opset_import[0].version == made.opset

    recipe = Preprocessing.beside(output)
    config = timm.data.resolve_data_config(model=module)
    assert made.preprocessing == Preprocessing.path_beside(output)
    assert made.inputs == {recipe.input: ("batch", recipe.channels, *recipe.size)}
    assert (recipe.channels, *recipe.size) == config["input_size"]
    assert (recipe.mean, recipe.std) == (config["mean"], config["std"])
    images = recipe.normalise(
        np.random.default_rng(0).integers(0, 256, (5, recipe.channels, *recipe.size), np.uint8)
    )
    result = open_session(output).run({recipe.input: images})["output"]
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    assert np.linalg.norm(result - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.slow
def test_random_weights_are_the_same_every_time(tmp_path):
    for name in ("first.onnx", "second.onnx"):
        export(f"timm:{TINY_TIMM}", tmp_path / name, random_weights=True)
    first, second = (onnx.load(tmp_path / name) for name in ("first.onnx", "second.onnx"))
    assert first.graph.initializer == second.graph.initializer


@pytest.mark.slow
def test_a_recipe_that_was_there_is_warned_of_and_stays(script, output, caplog):
    """Somebody may have written it by hand, for this very model."""
    recipe = Preprocessing("x", (4, 4), 1, (0.5,), (0.5,), "bicubic", 1.0)
    recipe.save_beside(output)
    export(f"{script}:one_row", output)
    assert left_behind(output) == ["model.onnx", "model.preprocessing.json"]
    assert Preprocessing.beside(output) == recipe
    assert "remove it if it is of another model" in caplog.text


@pytest.mark.slow
def test_an_unknown_timm_name_brings_close_ones(output):
    with pytest.raises(
        GraphError, match=r"no model 'deit_tinny_patch16_224'.*deit_tiny_patch16_224"
    ):
        export("timm:deit_tinny_patch16_224", output)


@pytest.mark.slow
def test_weights_that_cannot_be_downloaded_leave_two_ways_out(output, offline):
    with pytest.raises(BackendUnavailable, match="give a file with --checkpoint, or --random"):
        export("timm:deit_tiny_patch16_224", output)
    with pytest.raises(GraphError, match=r"nonsense.*give a file with --checkpoint, or --random"):
        export("timm:deit_tiny_patch16_224.nonsense", output)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["./no/such/folder", "nobody/nothing"])
def test_a_missing_transformers_folder_is_refused(name, output, offline):
    with pytest.raises(BackendUnavailable, match=f"there is no folder {name}"):
        export(f"hf:{name}", output)


@pytest.mark.slow
def test_a_folder_without_a_transformers_model_is_refused(tmp_path, output):
    with pytest.raises(GraphError, match="is no model of transformers"):
        export(f"hf:{tmp_path}", output)


@pytest.fixture
def bert(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=60,
        max_position_embeddings=32,
        num_labels=5,
    )
    folder = tmp_path / "bert"
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@BOTH
def test_a_text_model_keeps_its_head_and_any_length(exporter, bert, output):
    made = export(f"hf:{bert}", output, exporter=exporter)
    assert made.parity < 1e-5
    assert made.preprocessing is None
    assert made.inputs == {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "sequence"),
    }
    feeds = {name: np.ones((4, 19), np.int64) for name in made.inputs}
    results = open_session(output).run(feeds)
    assert {name: value.shape for name, value in results.items()} == {"logits": (4, 5)}


@pytest.mark.slow
def test_a_text_model_without_its_weights_is_refused_unless_random(bert, output):
    (bert / "model.safetensors").unlink()
    with pytest.raises(GraphError, match=r"cannot be loaded.*--random"):
        export(f"hf:{bert}", output)
    assert export(f"hf:{bert}", output, random_weights=True).parity < 1e-5


@pytest.mark.slow
def test_weights_that_a_head_lacks_are_not_drawn_in_silence(bert, output):
    from safetensors.torch import load_file, save_file

    weights = load_file(bert / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "classifier" not in name}
    save_file(kept, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraphError, match=r"no weights for classifier\.bias, classifier\.weight"):
        export(f"hf:{bert}", output)


@pytest.mark.slow
def test_a_picture_model_of_transformers_is_exported_with_its_preprocessing(tmp_path, output):
    from transformers import BitImageProcessor, ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=16,
    )
    folder = tmp_path / "vit"
    ViTForImageClassification(config).save_pretrained(folder)
    processor = BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=[0.4] * 3
    )
    processor.save_pretrained(folder)
    made = export(f"hf:{folder}", output)
    assert made.parity < 1e-5
    assert made.inputs == {"pixel_values": ("batch", 3, 32, 32)}
    recipe = Preprocessing.beside(output)
    assert recipe == Preprocessing(
        "pixel_values",
        (32, 32),
        3,
        (0.4, 0.4, 0.4),
        tuple(processor.image_std),
        "bicubic",
        0.8,
    )
