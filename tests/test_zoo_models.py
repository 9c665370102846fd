"""The zoo loads and runs, is small, and is what the exporters write."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import onnx
import onnxruntime
import pytest

from corp_onnx.blocks import Mlp, axes_of, find_blocks
from corp_onnx.graph.model import from_proto
from tests.zoo_models import FOLDER, NAMES, TRUTH, draw, feeds, load, module_of
from tools.zoo.table import MODULES, UNEXPORTABLE

LARGEST_BYTES = 7_000_000

# Two exports of a module round in another order: a few hundred sums of 16 to 192 float32 products
# each, on the way through two to five blocks that amplify by 1.5 a layer.
AGREEMENT = 1e-5
HALF = float(np.finfo(np.float16).eps / np.finfo(np.float32).eps)
"""How much coarser float16 rounds."""

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
        error = relative_error(run(name, inputs) * seen, expected * seen)
        assert error < AGREEMENT * (HALF if name.endswith("fp16") else 1), name


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
@pytest.mark.parametrize("name", NAMES)
def test_the_exporters_still_write_what_the_zoo_holds(name, tmp_path):
    """Every form is written again: four and a half minutes for all, on one core of an AMD EPYC."""
    pytest.importorskip("torch", reason="exporting needs torch: pip install 'corp_onnx[export]'")
    from tools.make_zoo import make

    module, _, form = name.partition(".")
    assert make(module, form, tmp_path) == TRUTH[module]
    made, committed = load(name, tmp_path), load(name)
    if not same_operators(made, committed):  # another version writes it in another way
        assert found(made) == found(committed)
    assert difference(name, made, committed) < AGREEMENT * (HALF if form.endswith("fp16") else 1)


@pytest.mark.parametrize("name", ["timm_deit.ts17", "hf_llama.dynamo18"])
def test_another_model_is_not_taken_for_what_the_zoo_holds(name):
    """Weights that change places leave no other operators; a longer MLP is another catalog."""
    committed, changed = load(name), load(name)
    large = [t for t in changed.graph.initializer if list(t.dims) == list(largest(changed).dims)]
    first, second = large[0].raw_data, large[1].raw_data
    large[0].raw_data, large[1].raw_data = second, first
    assert same_operators(changed, committed)
    assert difference(name, changed, committed) > 100 * AGREEMENT
    other = load("timm_deit3.ts17")
    assert not same_operators(other, committed)
    assert found(other) != found(committed)


def largest(model):
    """The weight of the most values that there are two of."""
    sizes = Counter(tuple(t.dims) for t in model.graph.initializer)
    twice = [t for t in model.graph.initializer if sizes[tuple(t.dims)] > 1]
    return max(twice, key=lambda tensor: len(tensor.raw_data))


def same_operators(made, committed):
    """Whether a model has the same operators, whatever they are called."""
    counts = [Counter(node.op_type for node in model.graph.node) for model in (made, committed)]
    return counts[0] == counts[1]


def found(model):
    """What is found in a model, without the names of nodes and tensors."""
    return [
        (block.width,)
        if isinstance(block, Mlp)
        else (block.heads, block.kv_heads, block.head_width, block.value_width, axes_of(block))
        for block in find_blocks(from_proto(model)).blocks
    ]


def difference(name, made, committed):
    """Relative error of what a model computes where tokens count."""
    inputs = feeds(name, 3)
    by_place = dict(zip((i.name for i in made.graph.input), inputs.values(), strict=True))
    result, expected = run(name, by_place, made), run(name, inputs, committed)
    seen = inputs.get("attention_mask", np.ones((3, 1)))[:, :, None].astype(bool)
    seen = seen if expected.ndim == 3 else True
    return relative_error(result * seen, expected * seen)
