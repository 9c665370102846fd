"""The zoo loads and runs, is small, and is what the exporters write."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.zoo_models import FOLDER, NAMES, TRUTH, draw, feeds, load, module_of
from tools.zoo.table import MODULES, UNEXPORTABLE

LARGEST_BYTES = 7_000_000

# Two exports of a module round in another order: a few hundred sums of 16 to 192 float32 products
# each, on the way through two to five blocks that amplify by 1.5 a layer.
AGREEMENT = 1e-5

PLAIN = [name for name in NAMES if module_of(name) in {"timm_deit", "hf_vit_sdpa", "hf_bert_sdpa"}]


def run(name, inputs, model=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    content = (model or load(name)).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0].astype(np.float64)


def relative_error(result, expected):
    return np.linalg.norm(result - expected) / np.linalg.norm(expected)


def function_of(name):
    """All exports of one architecture draw the same parameters, whatever their attention code."""
    return module_of(name).removesuffix("_eager").removesuffix("_sdpa")


def test_the_zoo_is_complete_and_small():
    assert {*NAMES} == {f"{module}.{form}" for module, forms in MODULES.items() for form in forms}
    assert TRUTH.keys() == MODULES.keys()
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < LARGEST_BYTES


def test_what_cannot_be_exported_is_in_the_zoo_in_another_form():
    for name, reason in UNEXPORTABLE.items():
        assert name not in NAMES
        assert reason
        assert function_of(name) in map(function_of, NAMES)


def test_nothing_in_a_file_tells_where_it_was_written():
    for name in NAMES:
        content = (FOLDER / f"{name}.onnx").read_bytes()
        for word in (b"site-packages", b"/home/", b"/root/", b"/work/", b"/tmp/", b"/usr/"):
            assert word not in content, f"{word} in {name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_model_runs_at_batches_it_was_not_traced_with(name):
    model = load(name)
    onnx.checker.check_model(model, full_check=True)
    for batch in (1, 3):
        result = run(name, feeds(name, batch), model)
        assert len(result) == batch
        assert np.isfinite(result).all()
        assert result.std() > 0.05


@pytest.mark.parametrize("function", sorted({*map(function_of, NAMES)}))
def test_all_exports_of_a_module_compute_the_same(function):
    """But for those whose weights were rounded."""
    exact = [name for name in NAMES if not name.endswith("+nbits")]
    first, *others = [name for name in exact if function_of(name) == function]
    inputs = feeds(first, 3)
    # What comes out at masked positions is nobody's business.
    seen = inputs.get("attention_mask", np.ones((3, 1)))[:, :, None].astype(bool)
    expected = run(first, inputs)
    seen = seen if expected.ndim == 3 else True
    for name in others:
        assert relative_error(run(name, inputs) * seen, expected * seen) < AGREEMENT, name


@pytest.mark.parametrize("name", [name for name in PLAIN if name.endswith(("18", "20", "23"))])
def test_a_bias_of_every_linear_layer_shows_in_the_output(name):
    model = load(name)
    inputs = feeds(name, 2)
    expected = run(name, inputs, model)
    biases = [t for t in model.graph.initializer if t.name.endswith(".bias")]
    assert len(biases) >= 6 * sum("mlp" in block for block in TRUTH[module_of(name)])
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


def test_the_truth_is_whole():
    for block in chain.from_iterable(TRUTH.values()):
        axes = {"mlp"} if "mlp" in block else {"qk", "vo"}
        assert {*block["cut"]} | block.get("refused", {}).keys() == axes
        assert {*block["cut"]}.isdisjoint(block.get("refused", {}))


def test_weights_are_drawn_by_name():
    assert np.array_equal(draw("a.weight", (4, 3)), draw("a.weight", (4, 3)))
    assert not np.array_equal(draw("a.weight", (4, 3)), draw("b.weight", (4, 3)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["timm_deit.ts17", "hf_bert_sdpa.dynamo18", "hf_llama.ts17", "tf_bert.opset13"]
)
def test_the_exporters_still_write_what_the_zoo_holds(name, tmp_path):
    pytest.importorskip("torch", reason="exporting needs torch: pip install 'corp_onnx[export]'")
    from tools.make_zoo import make

    module, _, form = name.partition(".")
    assert make(module, form, tmp_path) == TRUTH[module]
    made = onnx.load(tmp_path / f"{name}.onnx")
    committed = onnx.load(FOLDER / f"{name}.onnx")
    assert operators(made) == operators(committed)
    assert weights(made) == weights(committed)


def operators(model):
    return Counter(node.op_type for node in model.graph.node)


def weights(model):
    return Counter((*tensor.dims, tensor.doc_string) for tensor in model.graph.initializer)
