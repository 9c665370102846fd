"""Models built for a target and timed there; what is said of the machine and of the times."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from rich.console import Console

from corp_onnx import example
from corp_onnx.deploy.targets import open_target
from corp_onnx.errors import CorpError, PlanError
from corp_onnx.graph.model import load
from corp_onnx.latency import conditions
from corp_onnx.latency.conditions import Conditions
from corp_onnx.latency.footprint import footprint
from corp_onnx.latency.race import Latency, Race, Speedup
from corp_onnx.latency.stopwatch import Lane, Stopwatch
from corp_onnx.report import timetable
from tests.builders import WIDTH, Net
from tests.fake_target import Abacus, AbacusEngine, Clock

CALM = Conditions("processor", 2, 0.0, None, None, ())


@pytest.fixture
def clock(monkeypatch):
    return Clock().install(monkeypatch)


class Sized(Abacus):
    """Remembers the sizes that it was to build for."""

    def sized(self, sizes):
        self.clock.sizes = dict(sizes)
        return self


def test_engines_of_files_and_of_models_are_timed_in_one_race(clock):
    fast, slow = Abacus(clock), Abacus(clock, fixed_ns=1_000_000)
    lanes = [Lane(example.MODEL, slow), Lane(load(example.MODEL), fast)]
    race = Stopwatch(warmup=0, runs=4).race(lanes)
    assert clock.runs == 8
    difference = race.latencies[0].median_ms - race.latencies[1].median_ms
    assert difference == pytest.approx(1.0, abs=0.01)
    assert race.speedups[1].ratio > 5


@pytest.mark.parametrize("batch", [1, 3])
def test_a_target_is_told_the_sizes_before_it_builds(clock, batch):
    Stopwatch(batch, warmup=0, runs=1).race([Lane(example.MODEL, Sized(clock))])
    assert clock.sizes == {"image": (batch, 1, 28, 28)}


def test_sizes_of_inputs_that_no_engine_reads_are_refused(clock):
    watch = Stopwatch(sizes={"picture": (1, 1, 28, 28)}, warmup=0, runs=1)
    with pytest.raises(PlanError, match="--shapes names picture, but the inputs are image"):
        watch.race([Lane(example.MODEL, Abacus(clock))])


def test_sizes_of_another_batch_than_asked_for_are_refused(clock):
    sizes = {"image": (4, 1, 28, 28)}
    with pytest.raises(PlanError, match="--shapes gives a batch of 4, so it cannot be timed at"):
        Stopwatch(8, sizes, warmup=0, runs=1).race([Lane(example.MODEL, Abacus(clock))])
    Stopwatch(4, sizes, warmup=0, runs=1).race([Lane(example.MODEL, Sized(clock))])
    assert clock.sizes == sizes


def short(folder, quantised=False):
    """A model of sequences of at most 16, as its table of positions has it."""
    net = Net(0)
    x = net.x()
    length = net("Slice", net("Shape", x), np.array([1]), np.array([2]))
    table = net("Slice", net.random(16, WIDTH), np.array([0]), length, np.array([0]))
    y = net.linear(net("Add", x, table), WIDTH, WIDTH)
    if quantised:
        scale, zero = np.float32(0.1), np.int8(0)
        y = net("DequantizeLinear", net("QuantizeLinear", y, scale, zero), scale, zero)
    path = folder / ("quantised.onnx" if quantised else "short.onnx")
    onnx.save(net.build(y), path)
    return path


def test_the_sequence_of_a_quantised_model_fits_it(clock, tmp_path):
    watch = Stopwatch(warmup=0, runs=1)
    for quantised in (False, True):
        watch.race([Lane(short(tmp_path, quantised), Sized(clock))])
        assert clock.sizes["x"] == (1, 16, WIDTH)


def test_an_engine_is_timed_at_the_sizes_of_the_models_beside_it(tmp_path):
    """The twin: alone nothing says how long its sequences are, and 128 do not fit."""
    path, target = short(tmp_path), open_target("ort-cpu")
    engine = tmp_path / "engine"
    engine.mkdir()
    target.build(path, engine, "fp32")
    watch = Stopwatch(warmup=0, runs=1)
    assert len(watch.race([Lane(engine, target), Lane(path, target)]).latencies) == 2
    with pytest.raises(CorpError, match="x"):
        watch.race([Lane(engine, target)])
    both = [Lane(path, target), Lane(engine, target)]
    assert all(watch.operator_times(both))
    assert footprint(both[1], watch.beside(both)).peak_bytes


def test_one_disturbed_profile_is_not_what_is_told(monkeypatch, tmp_path, clock):
    """Engines are profiled in turn, and of each the median counts."""
    order, calm = [], AbacusEngine.operator_times

    def disturbed(engine, feeds, *, runs=1):
        order.append(engine)
        (ms,) = calm(engine, feeds, runs=runs).values()
        return {"MatMul": 10 * ms if len(order) == 1 else ms}

    monkeypatch.setattr(AbacusEngine, "operator_times", disturbed)
    lanes = [Lane(short(tmp_path), Abacus(clock, fixed_ns=cost)) for cost in (0, 1000)]
    one, other = Stopwatch().operator_times(lanes)
    assert other["MatMul"] - one["MatMul"] == pytest.approx(1e-3)
    assert order[0] is not order[1]
    assert order[:2] == order[2:4]


def test_an_engine_of_one_batch_beside_a_model_of_any_says_so(tmp_path):
    net = Net(0)
    proto = net.build(net.linear(net.x(), WIDTH, WIDTH))
    onnx.save(proto, tmp_path / "any.onnx")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(proto, tmp_path / "four.onnx")
    target, engine = open_target("ort-cpu"), tmp_path / "engine"
    engine.mkdir()
    target.build(tmp_path / "four.onnx", engine, "fp32")
    lanes = [Lane(tmp_path / "any.onnx", target), Lane(engine, target)]
    with pytest.raises(PlanError, match="a model has a fixed batch of 4"):
        Stopwatch(warmup=0, runs=1).race(lanes)
    assert Stopwatch(4, warmup=0, runs=1).race(lanes)


def test_the_batch_is_that_of_the_first_input(tmp_path):
    """The twin: masks of 8 beside a picture of 1 would be counted as 8 samples."""
    net = Net(0)
    picture = net.input("picture", 1, WIDTH)
    onnx.save(net.build(net("Add", picture, net.x("batch", WIDTH))), tmp_path / "one.onnx")
    lane = Lane(tmp_path / "one.onnx", open_target("ort-cpu"))
    with pytest.raises(PlanError, match="a fixed batch of 1"):
        Stopwatch(8, warmup=0, runs=1).race([lane])


def test_inputs_without_a_batch_have_no_say_in_it(tmp_path):
    net = Net(0)
    scale = net.input("scale")
    onnx.save(net.build(net("Mul", net.x(), scale)), tmp_path / "scaled.onnx")
    race = Stopwatch(3, warmup=0, runs=1).race(
        [Lane(tmp_path / "scaled.onnx", open_target("ort-cpu"))]
    )
    assert race.latencies[0].median_ms > 0


def test_an_engine_with_more_weights_takes_more_memory(tmp_path):
    """In a process of its own: what this one holds does not count."""
    held = np.ones(2**27, np.uint8)
    watch, target = Stopwatch(), open_target("ort-cpu")
    peaks = {}
    for width in (16, 8192):
        net = Net(0)
        onnx.save(
            net.build(net.linear(net.linear(net.x(), WIDTH, width), width, width)),
            tmp_path / "model.onnx",
        )
        peaks[width] = footprint(Lane(tmp_path / "model.onnx", target), watch).peak_bytes
    assert peaks[8192] - peaks[16] > 4 * 8192**2
    assert peaks[16] < 3 * len(held)


# The machine


def test_the_machine_says_what_it_is():
    found = conditions.read()
    assert found.processor
    assert found.cores >= 1
    assert 0.0 <= found.busy <= 1.0


def test_a_glance_does_not_wait_for_what_others_do(monkeypatch):
    monkeypatch.setattr(conditions.psutil, "cpu_percent", lambda *_: pytest.fail("it waits"))
    found = conditions.glance()
    assert (found.busy, found.cores >= 1) == (None, True)


def test_a_gpu_is_read_where_its_library_is(monkeypatch):
    closed = []
    fake = SimpleNamespace(
        NVMLError=RuntimeError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: closed.append(True),
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda at: at,
        nvmlDeviceGetName=lambda device: "GPU",
        nvmlDeviceGetClockInfo=lambda device, kind: 1500,
        nvmlDeviceGetPowerUsage=lambda device: 70_500,
        nvmlDeviceGetTemperature=lambda device, kind: 41,
        nvmlDeviceGetMemoryInfo=lambda device: SimpleNamespace(used=2**30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert conditions.read().gpus == (conditions.Gpu("GPU", 1500, 70.5, 41, 2**30),)
    assert closed == [True]


def test_memory_on_a_device_is_that_of_this_process_alone(monkeypatch):
    processes = {0: [(os.getpid(), 3), (1, 100)], 1: [(1, 100)], 2: [(os.getpid(), 4)]}

    def handle(at):
        if at == 3:
            raise RuntimeError
        return at

    fake = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 4,  # the last is lost
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetComputeRunningProcesses=lambda device: [
            SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in processes[device]
        ],
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert conditions.own_device_bytes() == 7
    del processes[0][0], processes[2][0]
    assert conditions.own_device_bytes() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert conditions.own_device_bytes() is None


def test_what_a_gpu_does_not_tell_is_none(monkeypatch):
    def refuse(*_):
        raise RuntimeError

    kinds = dict.fromkeys(("ClockInfo", "PowerUsage", "Temperature", "MemoryInfo"), refuse)
    fake = SimpleNamespace(
        NVMLError=RuntimeError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda at: at,
        nvmlDeviceGetName=lambda device: "GPU",
        **{f"nvmlDeviceGet{kind}": ask for kind, ask in kinds.items()},
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert conditions.read().gpus == (conditions.Gpu("GPU", None, None, None, None),)


def test_a_system_that_does_not_tell_which_cores_are_allowed_has_all_of_them(monkeypatch):
    monkeypatch.setattr(conditions.psutil, "Process", SimpleNamespace)
    assert conditions.read().cores == os.cpu_count()


def test_a_gpu_without_a_driver_is_none(monkeypatch):
    def init():
        raise RuntimeError

    monkeypatch.setitem(
        sys.modules, "pynvml", SimpleNamespace(NVMLError=RuntimeError, nvmlInit=init)
    )
    assert conditions.read().gpus == ()


# The batch where none is asked for


def reading(*dims):
    """A model that reads ``x`` of these dimensions, and a mask of no fixed size."""
    net = Net(0)
    return gs.import_onnx(net.build(net("Add", net.x(*dims), net.input("mask", "any", WIDTH))))


@pytest.mark.parametrize(
    ("dims", "sizes", "batch"),
    [
        (("batch", WIDTH), {}, 1),
        ((8, WIDTH), {}, 8),
        (("batch", WIDTH), {"x": (4, WIDTH)}, 4),
        (("batch", WIDTH), {"mask": (3, WIDTH)}, 3),
        ((8, WIDTH), {"y": (4, WIDTH)}, 8),
    ],
)
def test_the_batch_is_that_of_the_model_or_of_the_sizes(dims, sizes, batch):
    graph = reading(*dims)
    assert Stopwatch.of(graph, sizes).batch == batch
    assert Stopwatch.of(graph, sizes).sizes == sizes
    assert Stopwatch.of(graph, sizes, 2).batch == 2


def test_what_an_engine_reads_says_its_batch(tmp_path):
    net = Net(0)
    onnx.save(net.build(net("Relu", net.x(8, WIDTH))), tmp_path / "eight.onnx")
    target, engine = open_target("ort-cpu"), tmp_path / "engine"
    engine.mkdir()
    target.build(tmp_path / "eight.onnx", engine, "fp32")
    for model in (tmp_path / "eight.onnx", engine):
        assert Stopwatch.of(Lane(model, target).reads()).batch == 8


def test_the_machine_is_looked_at_before_engines_are_given_back(clock):
    seen = []

    class Engine(AbacusEngine):
        def close(self):
            seen.append("closed")

    class Kept(Abacus):
        def load(self, build):
            made = super().load(build)
            return Engine(made.session, made.clock, made.cost_ns)

    watch = Stopwatch(warmup=0, runs=3)
    watch.race([Lane(example.MODEL, Kept(clock))], on_end=lambda: seen.append(clock.runs))
    assert seen == [3, "closed"]


# What is said


def raced(*times):
    """A race of engines with such a median, 95th and 5th percentile."""
    latencies = tuple(Latency(middle, high, 10, low) for middle, high, low in times)
    speedups = tuple(Speedup(times[0][0] / middle, 0.9, 2.1) for middle, _, _ in times)
    return Race(latencies, speedups, 5, (True, False)[: len(times)])


CALMLY = ((4.0, 4.5, 4.0), (2.0, 2.25, 2.0))
SETUP = timetable.Setup(2, {"runtime": "1.0"})


def document(before=CALM, times=CALMLY, targets=("ort-cpu", "ort-cpu"), races=1):
    labels = [
        timetable.label(model, target, "fp32", 8)
        for model, target in zip(("dense", "cut"), targets, strict=True)
    ]
    after = replace(CALM, clock_mhz=2000.0)
    return timetable.race_json(
        *([labels] * races, [raced(*times)] * races),
        setups=(SETUP, SETUP),
        before=before,
        after=after,
    )


def printed(found):
    console = Console(width=200, force_terminal=False)
    with console.capture() as shown:
        console.print(timetable.race_table(found))
    return shown.get()


def test_throughput_is_samples_over_time():
    assert [run["samples_per_s"] for run in document()["runs"]] == [2000.0, 4000.0]


def test_the_first_engine_is_what_the_others_are_held_against():
    """By its target too: one model on two targets would read as held against itself."""
    (speedup,) = document(targets=("ort-cpu", "openvino"))["speedups"]
    assert (speedup["model"], speedup["over"], speedup["ratio"]) == ("cut", "dense", 2.0)
    assert (speedup["target"], speedup["over_target"]) == ("openvino", "ort-cpu")
    assert speedup["over_precision"] == "fp32"


def test_a_run_says_what_it_ran_with_and_whether_it_had_settled():
    first, second = document()["runs"]
    assert (first["warmup"], first["settled"], second["settled"]) == (5, True, False)
    assert (first["threads"], first["versions"]) == (2, {"runtime": "1.0"})


def test_the_machine_is_told_before_and_after():
    found = document()
    assert (found["conditions"]["clock_mhz"], found["conditions_after"]["clock_mhz"]) == (
        None,
        2000.0,
    )


def test_every_race_is_marked_and_begins_with_its_measure():
    """Whatever the number of engines in the others: the last race here is of one."""
    found = document(races=2)
    alone = document(times=CALMLY, races=1)
    found["runs"].append(alone["runs"][0] | {"race": 2})
    assert [run["race"] for run in found["runs"]] == [0, 0, 1, 1, 2]
    assert [entry["race"] for entry in found["speedups"]] == [0, 1]
    lines = [line for line in printed(found).splitlines() if " ms " in line]
    assert ["2.00x" in line for line in lines] == [False, True, False, True, False]


def test_calm_times_have_no_warning():
    assert document()["warnings"] == []


def test_a_machine_that_others_keep_busy_is_mentioned():
    (warning,) = document(replace(CALM, busy=0.4))["warnings"]
    assert "40% of the processor" in warning
    assert document(replace(CALM, busy=None))["warnings"] == []


@pytest.mark.parametrize(("noisy", "name"), [(0, "dense"), (1, "cut")])
def test_times_that_spread_are_mentioned_with_the_engine(noisy, name):
    """The second engine makes a ratio as doubtful as the first."""
    times = list(CALMLY)
    middle = times[noisy][0]
    times[noisy] = (middle, 1.25 * middle, 0.75 * middle)
    (warning,) = document(times=times)["warnings"]
    assert f"times of {name} on ort-cpu in fp32 at batch 8 spread over 50%" in warning
