"""Real models, and real architectures as they are exported today, give back what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import tasks
from benchmarks.outcome import Place
from corp_onnx.blocks import Mlp, axes_of, find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.graph.model import load
from corp_onnx.plan import uniform
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate
from corp_onnx.verify.basis import turned
from tests import zoo_models
from tests.assets import asset
from tests.full_width import narrowed, padded, run, squared_error, unchanged
from tests.test_macs import by_hand

pytestmark = pytest.mark.slow

BOUND = 1e-10
"""Of ``‖ŷ - y‖² / ‖y‖²``, whatever was computed in between in float32."""

NETWORKS = Path(tasks.__file__).with_name("networks.py")

DEIT_TINY = {"width": 192, "heads": 3, "hidden": 768, "head": 64}

EXPORTERS = {"ts17": ("torchscript", 17), "dynamo18": ("dynamo", 18), "dynamo23": ("dynamo", 23)}

TRANSFORMERS = (
    "hf_vit_eager.dynamo23",
    "hf_vit_sdpa.ts17",
    "hf_vit_sdpa.dynamo18",
    "hf_bert_eager.dynamo23",
    "hf_bert_sdpa.ts17",
    "hf_bert_sdpa.dynamo23",
)
"""Also combinations that the zoo does not hold."""


def deit_tiny():
    """DeiT-Tiny of full size, with weights that leave no part of it idle."""
    import timm
    import torch

    module = timm.create_model("deit_tiny_patch16_224")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(zoo_models.draw(name, tuple(parameter.shape))))
    return module.eval(), (torch.randn(2, 3, 224, 224),)


def check_exactness(model, catalog, inputs, expected=None):
    """Nothing changes at ratio 0 and in another basis; a narrow cut is what its zeros say."""
    expected = expected or run(model, *inputs)
    full = turned(model, catalog)
    for solution in (unchanged(model, catalog), full):
        made = operate(model, catalog, solution).model
        check(run(made, *inputs), expected, at_most=BOUND)
    small = operate(model, catalog, narrowed(full, 0.5)).model
    onnx.checker.check_model(small.proto(), full_check=True)
    result = run(small, *inputs)
    large = operate(model, catalog, padded(full, 0.5)).model
    check(result, run(large, *inputs), at_most=BOUND)
    assert min(squared_error(*pair) for pair in zip(result, expected, strict=True)) > 1e-3
    assert [axes_of(b) for b in find_blocks(small).blocks] == [axes_of(b) for b in catalog.blocks]


def check(results, expected, *, at_most):
    for pair in zip(results, expected, strict=True):
        assert squared_error(*pair) <= at_most


def widths(catalog):
    """Widths of MLPs, heads and widths of attentions, in the order of the graph."""
    return [
        (block.width,) if isinstance(block, Mlp) else (block.heads, block.head_width)
        for block in catalog.blocks
    ]


def test_dinov2_with_a_decoder():
    """Query and key scaled by 64^-¼ each, LayerScale, norms and GELU written out."""
    model = load(asset("vit_s_focus.onnx"))
    catalog = find_blocks(model)
    assert widths(catalog) == [(6, 64), (1536,)] * 12
    assert all(axes_of(block) for block in catalog.blocks)
    assert catalog.refusals == ()
    rng = np.random.default_rng(0)
    (name,) = (value.name for value in model.graph.inputs)
    inputs = [{name: rng.standard_normal((b, 3, 224, 224), np.float32)} for b in (1, 3)]
    check_exactness(model, catalog, inputs)


def test_minilm():
    """An additive mask, norms after the residuals, keys transposed at once."""
    model = load(asset("minilm_l3.onnx"))
    catalog = find_blocks(model)
    assert widths(catalog) == [(12, 32), (1536,)] * 3
    assert all(axes_of(block) for block in catalog.blocks)
    assert catalog.refusals == ()
    assert {block.padding.kind for block in catalog.blocks} == {"added"}
    inputs = [texts(batch, tokens) for batch, tokens in ((1, 9), (3, 21))]
    check_exactness(model, catalog, inputs)


def texts(batch, tokens):
    """Random words; the first text is two tokens shorter than the others."""
    words = np.random.default_rng(0).integers(1000, 20000, (batch, tokens))
    mask = np.ones_like(words)
    mask[0, -2:] = 0
    return {"input_ids": words, "attention_mask": mask}


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_deit_tiny_as_it_is_exported(exporter, tmp_path):
    path = exported(f"{__file__}:deit_tiny", exporter, tmp_path)
    model = load(path)
    catalog = find_blocks(model)
    assert widths(catalog) == [(3, 64), (768,)] * 12
    assert catalog.refusals == ()
    assert catalog.macs == by_hand(**DEIT_TINY)
    rng = np.random.default_rng(0)
    (name,) = (value.name for value in model.graph.inputs)
    inputs = [{name: rng.standard_normal((b, 3, 224, 224), np.float32)} for b in (1, 3)]
    check_exactness(model, catalog, inputs)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_as_they_are_exported(name, tmp_path):
    from tools import make_zoo

    module, _, exporter = name.partition(".")
    model = load(exported(f"{make_zoo.__file__}:{module}", exporter, tmp_path))
    catalog = find_blocks(model)
    heads = (make_zoo.TRANSFORMERS_HEADS, make_zoo.WIDTH // make_zoo.TRANSFORMERS_HEADS)
    assert widths(catalog) == [heads, (make_zoo.HIDDEN,)] * make_zoo.DEPTH
    assert catalog.refusals == ()
    zoo = next(known for known in zoo_models.NAMES if known.startswith(module))
    check_exactness(model, catalog, [zoo_models.feeds(zoo, batch) for batch in (1, 3)])


def test_four_exports_of_one_encoder_are_pruned_alike(tmp_path):
    """Two exporters, two ways to write attention: the same channels go, the same function is left.

    What is left differs by float32 rounding, amplified by repairs of condition 1e3 and more.
    """
    place = Place(asset("minilm_l6").parent, tmp_path, quick=True)
    asset("minilm_l3.onnx"), asset("data.noun")
    task = tasks.glosses(place)
    found = []
    for network in ("minilm_l6_eager", "minilm_l6_sdpa"):
        for exporter in ("ts17", "dynamo18"):
            folder = tmp_path / f"{network}.{exporter}"
            folder.mkdir()
            model = load(exported(f"{NETWORKS}:{network}", exporter, folder))
            catalog = find_blocks(model)
            assert widths(catalog) == [(12, 32), (1536,)] * 6
            statistics = gather(model, catalog, task.calibration[:4])
            plan = uniform(catalog, {"mlp": 0.5, "qk": 0.5})
            solution = solve(model, catalog, plan, statistics, Recipe("corp"))
            found.append(run(operate(model, catalog, solution).model, *task.test[:2]))
    seen = [batch["attention_mask"][..., None] for batch in task.test[:2]]
    first, *others = ([_only(y, where) for y, where in zip(f, seen, strict=True)] for f in found)
    for other in others:
        check(other, first, at_most=1e-8)


def _only(outputs, seen):
    """Outputs by place, for exporters name them differently; zeros where texts are padded."""
    return {str(place): y * seen for place, y in enumerate(outputs.values())}


def exported(source, exporter, folder) -> Path:
    pytest.importorskip("torch", reason="exporting needs torch: pip install 'corp_onnx[export]'")
    from corp_onnx.export import export

    kind, opset = EXPORTERS[exporter]
    export(source, folder / "model.onnx", exporter=kind, opset=opset)
    return folder / "model.onnx"
