"""What the benchmarks of a GPU make of times and errors, without one."""

from __future__ import annotations

from threading import Thread

import pytest

from benchmarks import __main__ as runner
from benchmarks import cuda, devices, family, kernels, machine
from benchmarks.outcome import Benchmark, Outcome, Place
from corp_onnx.errors import DataError
from corp_onnx.latency.race import Latency, Race, Speedup


def raced(*device_ms):
    """A race in which half of every time is copying."""
    return Race(
        tuple(Latency(2 * ms, 2 * ms, 9, 2 * ms, ms) for ms in device_ms),
        tuple(Speedup(device_ms[0] / ms, 0.0, 9.0) for ms in device_ms),
        0,
        (True,) * len(device_ms),
    )


def label(precision, cut, ratio):
    return {"precision": precision, "cut": cut, "macs_ratio": ratio}


def test_a_time_on_the_device_is_held_against_the_dense_model_of_its_precision():
    labels = [
        *(label("fp16", "dense", 1.0), label("fp16", "both", 2.0)),
        *(label("fp32", "dense", 1.0), label("fp32", "both", 2.0)),
    ]
    rows = list(cuda._told(labels, raced(4.0, 2.5, 12.0, 6.0)))
    assert [row["device speed-up"] for row in rows] == [1.0, 1.6, 1.0, 2.0]
    assert [row["share"] for row in rows] == [1.0, 0.8, 1.0, 1.0]
    assert [row["median_ms"] for row in rows] == [8.0, 5.0, 24.0, 12.0]
    assert rows[3]["over fp16 dense"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("speedup", "passed"), [(1.63, False), (1.65, True)])
def test_the_published_speed_up_is_looked_for_where_it_was_published(speedup, passed):
    row = {"model": "DeiT-H/4", "batch": 128, **label("fp16", "both", 1.7)}
    rows = [row | {"device speed-up": speedup}, row | {"batch": 8, "device speed-up": 0.1}]
    (check,) = cuda._checks(rows)
    assert check.passed is passed


@pytest.mark.parametrize(("error", "passed"), [(0.1001, True), (0.09, False), (0.11, False)])
def test_a_model_from_the_gpu_is_as_good_as_one_from_the_processor(error, passed):
    common = {"model": "net", "method": "best"}
    rows = [
        common | {"error": 0.1, "together_s": 8.0},
        common | {"error": error, "together_s": 2.0},
    ]
    (check,) = devices._checks(rows)
    assert check.passed is passed
    assert "4.0 times as fast" in check.found


def test_errors_are_to_fall_from_size_to_size():
    rows = [
        {"size": size, "cut": "both", "method": method, "error": error}
        for method, errors in {"corp": (0.3, 0.2, 0.1), "best": (0.3, 0.1, 0.2)}.items()
        for size, error in zip(family.MODELS, errors, strict=True)
    ]
    passed = {check.name: check.passed for check in family._checks(rows)}
    assert passed == {
        "both, corp: the error falls as models grow": True,
        "both, best: the error falls as models grow": False,
    }


def test_models_measured_apart_have_a_file_each(monkeypatch, tmp_path):
    def measure(place):
        return Outcome({"table": [{"model": place.model, "value": 1.0}]})

    benchmark = Benchmark(measure, "a trial", models=("DeiT-T", "DeiT-H/4"), apart=True)
    monkeypatch.setitem(runner.BENCHMARKS, "trial", benchmark)
    assert runner.main(["trial", "--out", str(tmp_path)]) == 0
    for model in ("DeiT-T", "DeiT-H-4"):
        assert len(list(tmp_path.glob(f"*-trial-{model}-*.json"))) == 1
    assert runner.main(["trial", "--only", "DeiT-T", "--quick", "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_family_that_was_not_trained_is_asked_for(tmp_path):
    with pytest.raises(DataError, match="holds none of 1M, 5M, 20M; train each on a GPU"):
        family.measure(Place(tmp_path, tmp_path))


def test_kernels_are_told_apart_by_their_names():
    found = [
        kernels._Kernel("sm90_xmma_gemm_f16f16_f16f32", 4.0, 2.0),
        kernels._Kernel("fmha_cutlassF_f16_aligned_64x64_rf_sm80", 1.0, 0.5),
        kernels._Kernel("void cuApplyLayerNorm<__half, float>", 2.0, 0.25),
        kernels._Kernel("void _BinaryElementWise<__half, OP_Add>", 8.0, 1.0),
        kernels._Kernel("Memcpy HtoD (Pageable -> Device)", 1.0, 9.0),
    ]
    assert kernels._by_kind(found) == {
        **{"launches": 15.0, "together_ms": 3.75},
        **{"attention_ms": 0.5, "norms_ms": 0.25, "products_ms": 2.0, "elementwise_ms": 1.0},
    }
    assert [row["kind"] for row in kernels._longest(found)][:2] == ["copies", "products"]


def test_only_one_benchmark_of_a_machine_times_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "TURN", tmp_path / "turn.lock")
    done = []

    def other():
        with machine.alone():
            done.append("other")

    with machine.alone():
        thread = Thread(target=other)
        thread.start()
        thread.join(timeout=0.2)
        done.append("first")
    thread.join()
    assert done == ["first", "other"]
