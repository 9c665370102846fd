"""The zoo loads and runs, is small, and is what the exporters write."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.zoo_models import FOLDER, NAMES, TRUTH, draw, feeds, load

LARGEST_BYTES = 7_000_000

# Two exports of a module round in another order: a few hundred sums of 64 to 160 float32 products
# each, on the way through two blocks that amplify by 1.5 a layer.
AGREEMENT = 1e-5


def run(name, inputs, model=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    content = (model or load(name)).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0].astype(np.float64)


def relative_error(result, expected):
    return np.linalg.norm(result - expected) / np.linalg.norm(expected)


def module_of(name):
    """All exports of one architecture draw the same parameters, whatever their attention code."""
    return name.partition(".")[0].removesuffix("_eager").removesuffix("_sdpa")


def test_the_zoo_is_complete_and_small():
    files = {path.stem for path in FOLDER.glob("*.onnx")}
    assert files == set(NAMES)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < LARGEST_BYTES


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_loads_and_runs_at_a_batch_it_was_not_traced_with(name, batch):
    model = load(name)
    onnx.checker.check_model(model, full_check=True)
    result = run(name, feeds(name, batch), model)
    assert len(result) == batch
    assert np.isfinite(result).all()
    assert result.std() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_all_exports_of_a_module_compute_the_same(name):
    first = next(other for other in NAMES if module_of(other) == module_of(name))
    inputs = feeds(name, 3)
    # What comes out at masked positions is nobody's business.
    seen = inputs.get("attention_mask", np.ones((3, 1)))[:, :, None].astype(bool)
    result, expected = run(name, inputs), run(first, inputs)
    seen = seen if result.ndim == 3 else seen[:, :, 0]
    assert relative_error(result * seen, expected * seen) < AGREEMENT


@pytest.mark.parametrize("name", [name for name in NAMES if "dynamo" in name])
def test_a_bias_of_every_linear_layer_shows_in_the_output(name):
    model = load(name)
    inputs = feeds(name, 2)
    expected = run(name, inputs, model)
    biases = [t for t in model.graph.initializer if t.name.endswith(".bias")]
    assert len(biases) >= 6 * TRUTH[name]["mlp"]
    for bias in biases:
        if is_key_bias(bias.name):  # softmax ignores it
            continue
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        tensor = next(t for t in changed.graph.initializer if t.name == bias.name)
        zeros = np.zeros(tuple(bias.dims), np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(zeros, bias.name))
        assert relative_error(run(name, inputs, changed), expected) > 1e-3, bias.name


def is_key_bias(name):
    return name.endswith(("key.bias", "k_proj.bias"))


def test_weights_are_drawn_by_name():
    assert np.array_equal(draw("a.weight", (4, 3)), draw("a.weight", (4, 3)))
    assert not np.array_equal(draw("a.weight", (4, 3)), draw("b.weight", (4, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm_deit.ts17", "hf_bert_sdpa.dynamo18"])
def test_the_exporters_still_write_what_the_zoo_holds(name, tmp_path):
    from tools.make_zoo import make

    module, _, exporter = name.partition(".")
    assert make(module, exporter, tmp_path) == TRUTH[name]
    made = onnx.load(tmp_path / f"{name}.onnx")
    committed = onnx.load(FOLDER / f"{name}.onnx")
    assert operators(made) == operators(committed)
    assert weights(made) == weights(committed)


def operators(model):
    return Counter(node.op_type for node in model.graph.node)


def weights(model):
    return Counter((*tensor.dims, tensor.doc_string) for tensor in model.graph.initializer)
