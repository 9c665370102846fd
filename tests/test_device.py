"""The same functions on the host, in the standard's namespace, and on CUDA where there is any."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from corp_onnx import device as module
from corp_onnx.allocation.probes import probe
from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import gather
from corp_onnx.calibration.moments import Accumulator, Collector
from corp_onnx.device import HOST, device_of, to_host
from corp_onnx.errors import BackendUnavailable, DataError
from corp_onnx.graph.model import from_proto
from corp_onnx.plan import uniform
from corp_onnx.sequential.fit import fit_in_sequence
from corp_onnx.solve import METHODS, Recipe, solve
from corp_onnx.solve.elimination import eliminate
from corp_onnx.solve.folds import MlpFold, QueryKeyFold, ValueOutputFold
from corp_onnx.terminal import gathering, pruning
from tests.attention_builders import GROUPED
from tests.builders import TINY, feeds
from tests.conftest import STRICT
from tests.inputs import activations
from tests.oracles import vectors
from tests.tolerances import distance, rounding

FLOAT32 = 1e-6
"""What `Accumulator.add` promises for float32 batches."""
SOLVED = rounding(width=10**3, condition=1e6)
"""Two ways to solve systems of this condition from the same moments."""
SHARES = {"mlp": 0.5, "qk": 0.5, "vo": 0.5}


def model_of(name):
    model = from_proto({**TINY, **GROUPED}[name](0).proto)
    return model, find_blocks(model)


def seen(name, device, **options):
    proto = {**TINY, **GROUPED}[name](0).proto
    batches = [feeds(proto, 8, 9, seed) for seed in range(6)]
    return gather(*model_of(name), batches, device=device, **options)


def arrays_of(fold):
    """What a fold does to its block, whatever the signs of singular vectors."""
    if isinstance(fold, QueryKeyFold):
        heads = len(fold.query) // len(fold.key)
        return [fold.query @ np.repeat(fold.key, heads, axis=0).swapaxes(-1, -2)]
    if isinstance(fold, ValueOutputFold):
        shared = len(fold.weight) // len(fold.value)
        return [np.repeat(fold.value, shared, axis=0) @ fold.weight, fold.bias]
    return [fold.weight, fold.bias]


def assert_same(found, expected, tolerance=SOLVED):
    """The same folds, as far as rounding goes, with their evidence; arrays are the host's."""
    assert [fold.axis for fold in found] == [fold.axis for fold in expected]
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, MlpFold):
            assert one.kept.tolist() == other.kept.tolist()
        for made, wanted in zip(arrays_of(one), arrays_of(other), strict=True):
            assert type(made) is np.ndarray
            assert made.dtype == np.float64
            assert distance(made, wanted) <= tolerance
        for part in ("error", "unexplained"):
            assert abs(getattr(one.evidence, part) - getattr(other.evidence, part)) <= tolerance


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6,), (3, 4)], ids=["vectors", "heads"])
@pytest.mark.parametrize("kind", [Accumulator, Collector])
def test_moments_are_the_same_everywhere(kind, shape, dtype, device):
    x = np.random.default_rng(0).normal(3.0, 1.0, (90, *shape)).astype(dtype)
    found, expected = (kind(shape, place) for place in (device, HOST))
    for batch in np.split(x, [1, 30, 31]):
        found.add(batch)
        expected.add(batch)
    found, expected = found.moments(), expected.moments()
    tolerance = FLOAT32 if dtype == np.float32 else rounding(width=90)
    assert found.count == expected.count == 90
    assert not found.mean.flags.writeable
    assert not found.scatter.flags.writeable
    assert distance(found.mean, expected.mean) <= tolerance
    assert distance(found.scatter, expected.scatter) <= tolerance
    gram = expected.scatter + 90 * expected.mean[..., :, None] * expected.mean[..., None, :]
    assert distance(found.scatter, gram) > 0.1  # the wrong twin: not centred


def test_what_is_not_finite_is_refused_everywhere(any_device):
    accumulator = Accumulator((2,), any_device)
    accumulator.add(np.ones((3, 2)))
    for broken in (np.nan, np.inf, 1e200):
        with pytest.raises(DataError, match="NaN or infinity"):
            accumulator.add(np.array([[broken, 1.0], [-broken, 2.0]]))
    assert accumulator.moments().count == 3


@pytest.mark.parametrize("width", [20, 150])
def test_channels_go_in_the_same_order_everywhere(width, device):
    rng = np.random.default_rng(0)
    x = vectors(rng, np.geomspace(1.0, 1e-2, width), samples=4 * width)
    covariance, weight = np.cov(x.T, bias=True), rng.standard_normal((width, 7))
    covariance[[3], :] = covariance[:, [3]] = 0.0
    expected = eliminate(covariance, weight, ridge=1e-3)
    found = eliminate(*map(device.asarray, (covariance, weight)), ridge=1e-3)
    assert found.order.tolist() == expected.order.tolist()
    assert distance(found.costs, expected.costs) <= rounding(width=width**2, condition=1e2)
    assert abs(found.total / expected.total - 1) <= rounding(width=width**2)
    other = eliminate(*map(device.asarray, (covariance, np.ones_like(weight))), ridge=1e-3)
    assert other.order.tolist() != expected.order.tolist()  # the wrong twin


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["transformer", "packed_split", "packed_grouped", "mlp_tied"])
def test_a_plan_is_solved_alike_everywhere(name, method, device):
    (model, catalog), statistics = model_of(name), seen(name, HOST)
    plan, recipe = uniform(catalog, SHARES, align=1), Recipe(method)
    expected = solve(model, catalog, plan, statistics, recipe).folds
    found = solve(model, catalog, plan, statistics, replace(recipe, device=device)).folds
    assert_same(found, expected)
    other = Recipe("none" if method == "best" else "best", device=device)
    with pytest.raises(AssertionError):
        assert_same(solve(model, catalog, plan, statistics, other).folds, expected)


@pytest.mark.parametrize("name", ["transformer", "packed_grouped"])
def test_statistics_are_the_same_everywhere(name, device):
    found, expected = seen(name, device), seen(name, HOST)
    assert found.sites.keys() == expected.sites.keys()
    for site, moments in expected.sites.items():
        assert distance(found.sites[site].scatter, moments.scatter) <= FLOAT32
    mixed = found + expected  # a shard of each
    assert mixed.samples == 2 * expected.samples


@pytest.mark.parametrize("shares", [SHARES, {"mlp": 0.5, "qk": 0.5}], ids=["all", "no values"])
def test_blocks_are_fitted_in_sequence_alike_everywhere(shares, device):
    model, catalog = model_of("transformer")
    plan = uniform(catalog, shares, align=1)
    parts = [[{"x": activations(24, 12, seed)}] for seed in (0, 1)]
    expected, found, other = (
        fit_in_sequence(model, catalog, plan, parts, Recipe(ridge=ridge, device=place))
        for place, ridge in ((HOST, 1e-3), (device, 1e-3), (device, 1.0))
    )
    tolerance = FLOAT32 * 1e3  # of float32 products, times what the ridge lets through
    assert_same(found.solution.folds, expected.solution.folds, tolerance)
    assert_same(found.bare.folds, expected.bare.folds, tolerance)
    with pytest.raises(AssertionError):
        assert_same(other.solution.folds, expected.solution.folds, tolerance)


def test_curves_are_the_same_everywhere(device):
    (model, catalog), statistics = model_of("transformer"), seen("transformer", HOST)
    batches = [{"x": activations(4)}]
    found, expected = (
        probe(model, catalog, statistics, batches, Recipe(device=place), align=1)
        for place in (device, HOST)
    )
    for one, other in zip(found, expected, strict=True):
        assert (one.blocks, one.axis) == (other.blocks, other.axis)
        assert distance(one.harm, other.harm) <= FLOAT32


def test_a_device_is_given_one_system_at_a_time():
    assert STRICT.workers == 1 <= HOST.workers


def test_nothing_of_the_host_is_copied():
    values = np.ones(3)
    assert HOST.asarray(values) is values
    assert to_host(values) is values
    assert HOST.is_host
    assert not STRICT.is_host


def prune(command, files, folder, *options):
    output = folder / f"{len(list(folder.iterdir()))}.onnx"
    return command(
        *("prune", files.model, "-o", output, "--data", files.data, "--align", 1, "--json"),
        *options,
    )


@pytest.mark.parametrize("method", ["best", "corp"])
def test_a_device_does_the_whole_job(monkeypatch, command, files, tmp_path, method):
    """Named on the command line; the model itself is run where ``--providers`` says."""
    asked = []
    monkeypatch.setattr(pruning, "device_of", lambda name: asked.append(name) or STRICT)
    cpu = ("--providers", "CPUExecutionProvider")
    ended = prune(command, files, tmp_path, "--method", method, "--device", "cuda", *cpu)
    assert ended.status == 0, ended.stderr
    assert asked == ["cuda"]


def test_statistics_of_a_device_serve_the_host(monkeypatch, command, files, tmp_path):
    monkeypatch.setattr(gathering, "device_of", lambda name: STRICT)
    kept = tmp_path / "statistics.npz"
    given = ("--device", "cuda", "--providers", "CPUExecutionProvider")
    ended = command("calibrate", files.model, "--data", files.data, "-o", kept, *given)
    assert ended.status == 0, ended.stderr
    output = tmp_path / "small.onnx"
    ended = command("prune", files.model, "-o", output, "--stats", kept, "--align", 1)
    assert ended.status == 0, ended.stderr


@pytest.mark.gpu
def test_cuda_does_the_whole_job(command, files, tmp_path):
    try:
        device_of("cuda")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    ended = prune(command, files, tmp_path, "--device", "cuda")
    assert ended.status == 0, ended.stderr


def test_without_cupy_the_message_says_how_to_get_it(monkeypatch, command, files, tmp_path):
    monkeypatch.setitem(sys.modules, "cupy", None)
    ended = prune(command, files, tmp_path, "--device", "cuda")
    assert ended.status == 2
    assert "--device cuda needs CuPy" in ended.message
    assert "pip install 'corp_onnx[gpu]'" in ended.message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_a_cuda_device_must_be_there(monkeypatch, there):
    cupy, namespace = ModuleType("cupy"), ModuleType("array_api_compat.cupy")
    cupy.__version__ = "14.0"
    cupy.cuda = SimpleNamespace(is_available=lambda: there)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "array_api_compat.cupy", namespace)
    if there:
        assert device_of("cuda") == module.Device("cuda", namespace)
        return
    with pytest.raises(BackendUnavailable, match="finds no CUDA device"):
        device_of("cuda")


def test_another_device_is_a_wrong_request(command, files, tmp_path):
    ended = prune(command, files, tmp_path, "--device", "tpu")
    assert ended.status == 2
    assert "is not one of" in ended.message
