"""Times that trtexec wrote, in the form that it writes."""

from __future__ import annotations

import json
import re

import pytest

from corp_onnx import example
from corp_onnx.errors import DataError
from corp_onnx.latency.trtexec import read_times

KEYS = (
    *("startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs"),
    *("startD2hMs", "endD2hMs", "h2dMs", "computeMs", "d2hMs", "latencyMs"),
)

TIMES = """[
  { "startEnqMs" : 0.0, "endEnqMs" : 0.4, "startH2dMs" : 0.1, "endH2dMs" : 0.2, "startComputeMs" : \
0.2, "endComputeMs" : 4.2, "startD2hMs" : 4.2, "endD2hMs" : 4.3, "h2dMs" : 0.1, "computeMs" : 4.0, \
"d2hMs" : 0.1, "latencyMs" : 4.2 }
, { "startEnqMs" : 5.0, "endEnqMs" : 5.4, "startH2dMs" : 5.1, "endH2dMs" : 5.2, "startComputeMs" : \
5.2, "endComputeMs" : 8.2, "startD2hMs" : 8.2, "endD2hMs" : 8.3, "h2dMs" : 0.1, "computeMs" : 3.0, \
"d2hMs" : 0.1, "latencyMs" : 3.2 }
]
"""


@pytest.fixture
def times(tmp_path):
    def written(text=TIMES):
        path = tmp_path / "times.json"
        path.write_text(text)
        return path

    return written


def test_every_inference_has_its_times(times):
    assert all(f'"{key}"' in TIMES for key in KEYS)
    found = read_times(times())
    assert found.latency_ms.tolist() == [4.2, 3.2]
    assert found.device_ms.tolist() == [4.0, 3.0]
    with pytest.raises(ValueError, match="read-only"):
        found.latency_ms[0] = 0.0


def longer(text, factor):
    return re.sub(r'"(latencyMs|computeMs)" : ([0-9.]+)',
                  lambda m: f'"{m[1]}" : {float(m[2]) * factor}', text)  # fmt: skip


def test_bench_reports_them(command, tmp_path):
    """The twin: the other way round it is slower."""
    (tmp_path / "dense.json").write_text(longer(TIMES, 2))
    (tmp_path / "cut.json").write_text(TIMES)
    asked = ("--batch", 8, "--precision", "fp16", "--json")
    files = tmp_path / "dense.json", tmp_path / "cut.json"
    ended = command("bench", *files, *asked)
    assert ended.status == 0, ended.stderr
    found = json.loads(ended.stdout)
    first, second = found["runs"]
    assert (first["target"], first["precision"], first["batch"]) == ("trtexec", "fp16", 8)
    assert second["median_ms"] == pytest.approx(3.7)
    assert second["device_ms"] == pytest.approx(3.5)
    (speedup,) = found["speedups"]
    assert speedup["ratio"] == pytest.approx(2.0)
    assert 2 * 3.2 / 4.2 <= speedup["low"] <= 2.0 <= speedup["high"] <= 2 * 4.2 / 3.2
    assert (found["conditions"], found["conditions_after"]) == (None, None)
    assert (first["warmup"], first["settled"], first["threads"]) == (None, None, None)
    assert first["versions"] == {}
    assert (speedup["over_target"], speedup["over_precision"]) == ("trtexec", "fp16")
    assert json.loads(command("bench", *files[::-1], *asked).stdout)["speedups"][0]["ratio"] < 1
    assert "2.00x" in command("bench", *files).stdout


def test_times_from_elsewhere_do_not_race_with_models(command, tmp_path):
    (tmp_path / "dense.json").write_text(TIMES)
    ended = command("bench", tmp_path / "dense.json", example.MODEL)
    assert ended.status == 2
    assert "cannot race with models" in ended.message
    for flag in (("--profile",), ("--runs", 3), ("--target", "openvino"), ("--threads", 1)):
        ended = command("bench", tmp_path / "dense.json", *flag)
        assert ended.status == 2
        assert "one precision and one batch" in ended.message


def test_a_warm_up_can_be_left_out(times):
    assert read_times(times(), after_ms=1.0).latency_ms.tolist() == [3.2]
    with pytest.raises(DataError, match="no inference after 100 ms"):
        read_times(times(), after_ms=100.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "{}",
        "3",
        "[3]",
        '[{"name": "layer", "timeMs": 3}]',
        '[{"latencyMs": null, "computeMs": 1, "startComputeMs": 0}]',
        '{"a": 1}',
        '[["latencyMs"]]',
    ],
)
def test_other_files_are_refused(text, times):
    with pytest.raises(DataError, match=r"no inference|trtexec --exportTimes=FILE"):
        read_times(times(text))


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_times(tmp_path / "times.json")


@pytest.mark.parametrize("latency", ["NaN", "0", "-1"])
def test_times_that_are_none_are_refused(latency, times):
    with pytest.raises(DataError, match="no numbers above 0"):
        read_times(times(f'[{{"latencyMs": {latency}, "computeMs": 1, "startComputeMs": 0}}]'))
