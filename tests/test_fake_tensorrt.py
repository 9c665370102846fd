"""Each rule of the fakes catches a caller that breaks it, so what passes them keeps all."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from tests.builders import Net
from tests.fake_cuda import Violation
from tests.machines import ELEVEN, TEN, machine

__all__ = ["machine"]

SHAPES = [(1, 2, 10), (4, 9, 10), (8, 16, 10)]


class Right:
    """A caller that does everything as it should, step by step; twins get one step wrong."""

    version = ELEVEN

    def __init__(self, machine, folder):
        self.gpu = machine(self.version)
        import tensorrt

        self.trt, self.cuda, self.folder = tensorrt, self.gpu.module, folder

    def logger(self):
        trt = self.trt

        class Logger(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)
                self.lines = []

            def log(self, severity, msg):
                self.lines.append(msg)

        return Logger()

    def flags(self):
        if self.version == TEN:
            return 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return 0

    def parse(self, parser, path):
        return parser.parse_from_file(str(path))

    def configure(self, config):
        config.set_flag(self.trt.BuilderFlag.REFIT)
        config.profiling_verbosity = self.trt.ProfilingVerbosity.LAYER_NAMES_ONLY
        config.builder_optimization_level = 5
        config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, 1 << 20)

    def cache(self, config):
        cache = config.create_timing_cache(b"")
        assert config.set_timing_cache(cache, False)
        return cache

    def profile(self, builder, config):
        profile = builder.create_optimization_profile()
        profile.set_shape("x", *SHAPES)
        assert config.add_optimization_profile(profile) == 0

    def build(self):
        net = Net(0)
        path = self.folder / "model.onnx"
        onnx.save(net.build(net("Relu", net.x())), path)
        kept = self.logger()
        builder = self.trt.Builder(kept)
        network = builder.create_network(self.flags())
        self.parse(self.trt.OnnxParser(network, kept), path)
        config = builder.create_builder_config()
        self.configure(config)
        kept_too = self.cache(config)
        self.profile(builder, config)
        plan = builder.build_serialized_network(network, config)
        del kept_too
        return plan, kept.lines

    def shape(self, context):
        assert context.set_input_shape("x", (4, 9, 10))

    def memory(self, context, names):
        size = 4 * 9 * 10 * 4
        addresses = [self.cuda.cudaMalloc(size)[1] for _ in names]
        for name, address in zip(names, addresses, strict=True):
            context.set_tensor_address(name, address)
        return addresses

    def settle(self, context):
        context.nvtx_verbosity = self.trt.ProfilingVerbosity.NONE

    def stream(self):
        return self.cuda.cudaStreamCreate()[1]

    def wait(self, stream):
        self.cuda.cudaStreamSynchronize(stream)

    def execute(self, context, stream):
        assert context.execute_async_v3(int(stream))

    def run(self):
        plan, _ = self.build()
        kept = self.logger()
        engine = self.trt.Runtime(kept).deserialize_cuda_engine(plan)
        context = engine.create_execution_context()
        self.settle(context)
        names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
        self.shape(context)
        source, target = self.memory(context, names)
        stream = self.stream()
        x, y = np.linspace(-1, 1, 360, dtype=np.float32), np.zeros(360, np.float32)
        kinds = self.cuda.cudaMemcpyKind
        up, down = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self.cuda.cudaMemcpyAsync(source, x.ctypes.data, x.nbytes, up, stream)
        self.execute(context, stream)
        self.cuda.cudaMemcpyAsync(y.ctypes.data, target, y.nbytes, down, stream)
        self.wait(stream)
        return x, y


class RightInTen(Right):
    version = TEN


@pytest.mark.parametrize("caller", [Right, RightInTen])
def test_who_does_it_right_is_served(caller, machine, tmp_path):
    x, y = caller(machine, tmp_path).run()
    np.testing.assert_array_equal(y, np.maximum(x, 0))


# twins that get a type or a name wrong


class WeaklyTyped(RightInTen):
    def flags(self):
        return 0


class FlagNotShifted(RightInTen):
    def flags(self):
        return int(self.trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH) or 1


class FlagOfTenInEleven(Right):
    def flags(self):
        return 1 << 0


class NoBaseLogger(Right):
    def logger(self):
        class Logger(self.trt.ILogger):
            def __init__(self):
                pass

        return Logger()


class NoLogger(Right):
    def logger(self):
        return print


class ParsesAPath(Right):
    def parse(self, parser, path):
        return parser.parse_from_file(path)


class ForgetsToParse(Right):
    def parse(self, parser, path):
        return None


class HalfPrecisionFlag(Right):
    def configure(self, config):
        config.set_flag(self.trt.BuilderFlag.FP16)


class FlagByNumber(Right):
    def configure(self, config):
        config.set_flag(1)


class VerbosityByName(Right):
    def configure(self, config):
        config.profiling_verbosity = "detailed"


class LevelSix(Right):
    def configure(self, config):
        config.builder_optimization_level = 6


class WorkspaceOfOld(Right):
    def configure(self, config):
        config.max_workspace_size = 1 << 20


class ForgetsMismatch(Right):
    def cache(self, config):
        config.set_timing_cache(config.create_timing_cache(b""))


class DropsCache(Right):
    def cache(self, config):
        config.set_timing_cache(config.create_timing_cache(b""), False)


class FallingShapes(Right):
    def profile(self, builder, config):
        builder.create_optimization_profile().set_shape("x", *reversed(SHAPES))


class ShapesOfFloats(Right):
    def profile(self, builder, config):
        builder.create_optimization_profile().set_shape("x", *np.array(SHAPES, float))


class NoShapes(Right):
    def shape(self, context):
        pass


class NoMemoryForOutputs(Right):
    def memory(self, context, names):
        super().memory(context, names[:1])
        return 0, 0

    def execute(self, context, stream):
        self.gpu.streams[int(stream)].queue.clear()
        super().execute(context, stream)


class ArrayInsteadOfMemory(Right):
    def memory(self, context, names):
        addresses = super().memory(context, names)
        context.set_tensor_address(names[0], np.zeros(360, np.float32).ctypes.data)
        return addresses


class MemoryTooSmall(Right):
    def memory(self, context, names):
        addresses = super().memory(context, names)
        context.set_tensor_address(names[1], self.cuda.cudaMalloc(4)[1])
        return addresses


class RaisesVerbosity(Right):
    def settle(self, context):
        context.nvtx_verbosity = self.trt.ProfilingVerbosity.DETAILED


class DefaultStream(Right):
    def execute(self, context, stream):
        context.execute_async_v3(0)


class StreamObject(Right):
    def execute(self, context, stream):
        context.execute_async_v3(stream)


class CapturesAtOnce(Right):
    def execute(self, context, stream):
        mode = self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.cuda.cudaStreamBeginCapture(stream, mode)
        super().execute(context, stream)


class ProfilerWithoutBase(Right):
    def settle(self, context):
        class Profiler(self.trt.IProfiler):
            def __init__(self):
                pass

        context.profiler = Profiler()


class ProfilerThatIsDropped(Right):
    def settle(self, context):
        context.profiler = self.trt.IProfiler()


@pytest.mark.parametrize(
    ("twin", "error", "rule"),
    [
        (WeaklyTyped, Violation, "strongly typed"),
        (FlagNotShifted, Violation, "strongly typed"),
        (FlagOfTenInEleven, Violation, "deprecated in 11"),
        (NoBaseLogger, TypeError, "__init__"),
        (NoLogger, TypeError, "incompatible function arguments"),
        (ParsesAPath, TypeError, "incompatible function arguments"),
        (ForgetsToParse, Violation, "parse before building"),
        (HalfPrecisionFlag, AttributeError, "FP16"),
        (FlagByNumber, TypeError, "incompatible function arguments"),
        (VerbosityByName, TypeError, "incompatible function arguments"),
        (LevelSix, Violation, "levels"),
        (WorkspaceOfOld, AttributeError, "max_workspace_size"),
        (ForgetsMismatch, TypeError, "ignore_mismatch"),
        (DropsCache, Violation, "must outlive the build"),
        (FallingShapes, ValueError, "inconsistent"),
        (ShapesOfFloats, TypeError, "incompatible function arguments"),
        (NoShapes, Violation, "set_input_shape before"),
        (NoMemoryForOutputs, Violation, "no memory of the device"),
        (ArrayInsteadOfMemory, Violation, "no memory of the device"),
        (MemoryTooSmall, Violation, "in memory of 4"),
        (RaisesVerbosity, Violation, "may not be raised"),
        (DefaultStream, Violation, "default stream"),
        (StreamObject, TypeError, "incompatible function arguments"),
        (CapturesAtOnce, Violation, "once with these shapes"),
        (ProfilerWithoutBase, Violation, "IProfiler.__init__"),
        (ProfilerThatIsDropped, Violation, "must outlive its context"),
    ],
)
def test_who_gets_one_thing_wrong_is_caught(twin, error, rule, machine, tmp_path):
    with pytest.raises(error, match=rule):
        twin(machine, tmp_path).run()


def test_an_output_without_memory_is_caught(machine, tmp_path):
    caller = Right(machine, tmp_path)
    plan, _ = caller.build()
    kept = caller.logger()
    context = caller.trt.Runtime(kept).deserialize_cuda_engine(plan).create_execution_context()
    caller.shape(context)
    context.set_tensor_address("x", caller.cuda.cudaMalloc(1440)[1])
    with pytest.raises(Violation, match=r"set_tensor_address of Relu_0_0 before"):
        caller.execute(context, caller.stream())


def test_without_a_wait_there_is_no_result(machine, tmp_path):
    class DoesNotWait(Right):
        def wait(self, stream):
            pass

    _, y = DoesNotWait(machine, tmp_path).run()
    assert not y.any()


def test_without_a_profile_nothing_is_built(machine, tmp_path):
    class NoProfile(Right):
        def profile(self, builder, config):
            pass

    class EmptyProfile(Right):
        def profile(self, builder, config):
            assert config.add_optimization_profile(builder.create_optimization_profile()) == -1

    class OfAnotherInput(Right):
        def profile(self, builder, config):
            profile = builder.create_optimization_profile()
            profile.set_shape("y", *SHAPES)
            config.add_optimization_profile(profile)

    class OfAnotherWidth(Right):
        def profile(self, builder, config):
            profile = builder.create_optimization_profile()
            profile.set_shape("x", (1, 2, 11), (4, 9, 11), (8, 16, 11))
            config.add_optimization_profile(profile)

    for twin in (NoProfile, EmptyProfile, OfAnotherInput, OfAnotherWidth):
        plan, lines = twin(machine, tmp_path).build()
        assert plan is None
        assert "profile" in lines[-1]


def test_a_logger_that_is_gone_is_caught(machine, tmp_path):
    caller = Right(machine, tmp_path)
    runtime = caller.trt.Runtime(caller.logger())
    with pytest.raises(Violation, match="logger must outlive"):
        runtime.deserialize_cuda_engine(b"nothing")


def test_inputs_outside_the_profile_are_not_taken(machine, tmp_path):
    caller = Right(machine, tmp_path)
    plan, _ = caller.build()
    kept = caller.logger()
    context = caller.trt.Runtime(kept).deserialize_cuda_engine(plan).create_execution_context()
    assert not context.set_input_shape("x", (9, 9, 10))
    assert not context.set_input_shape("x", (9, 10))
    assert not context.set_input_shape("y", (4, 9, 10))
    assert context.infer_shapes() == ["x"]
    with pytest.raises(TypeError):
        context.set_input_shape("x", np.array([4, 9, 10]))


@pytest.mark.parametrize(("version", "key"), [(TEN, "Bindings"), (ELEVEN, "I/O Tensors")])
def test_layers_are_told_in_each_version_s_own_form(version, key, machine, tmp_path):
    caller = (RightInTen if version == TEN else Right)(machine, tmp_path)
    plan, _ = caller.build()
    kept = caller.logger()
    engine = caller.trt.Runtime(kept).deserialize_cuda_engine(plan)
    form = caller.trt.LayerInformationFormat.JSON
    assert key in json.loads(engine.create_engine_inspector().get_engine_information(form))


# CUDA


@pytest.fixture
def cuda(machine):
    return machine().module


def test_memory_is_given_back_once(cuda):
    _, address = cuda.cudaMalloc(8)
    cuda.cudaFree(address)
    with pytest.raises(Violation, match="twice"):
        cuda.cudaFree(address)
    with pytest.raises(Violation, match="no bytes"):
        cuda.cudaMalloc(0)


def test_copies_stay_within_memory(cuda):
    _, address = cuda.cudaMalloc(8)
    _, stream = cuda.cudaStreamCreate()
    array, kinds = np.zeros(4), cuda.cudaMemcpyKind
    with pytest.raises(Violation, match="32 bytes in memory of 8"):
        cuda.cudaMemcpyAsync(address, array.ctypes.data, 32, kinds.cudaMemcpyHostToDevice, stream)
    with pytest.raises(Violation, match="no memory of the device"):
        cuda.cudaMemcpyAsync(array.ctypes.data, 1, 8, kinds.cudaMemcpyDeviceToHost, stream)
    with pytest.raises(Violation, match="from host to device or back"):
        cuda.cudaMemcpyAsync(address, array.ctypes.data, 8, 1, stream)


def test_memory_that_is_gone_when_a_copy_is_done_is_caught(cuda):
    _, address = cuda.cudaMalloc(8)
    _, stream = cuda.cudaStreamCreate()
    array = np.zeros(1)
    kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
    cuda.cudaMemcpyAsync(address, array.ctypes.data, 8, kind, stream)
    cuda.cudaFree(address)
    with pytest.raises(Violation, match="no memory of the device"):
        cuda.cudaStreamSynchronize(stream)


def test_times_are_told_when_they_are_there(cuda):
    _, stream = cuda.cudaStreamCreate()
    (_, start), (_, end) = cuda.cudaEventCreate(), cuda.cudaEventCreate()
    cuda.cudaEventRecord(start, stream)
    cuda.cudaEventRecord(end, stream)
    with pytest.raises(Violation, match="synchronise first"):
        cuda.cudaEventElapsedTime(start, end)
    cuda.cudaStreamSynchronize(stream)
    assert cuda.cudaEventElapsedTime(start, end)[1] >= 0


def test_captures_are_begun_ended_and_not_waited_for(cuda):
    _, stream = cuda.cudaStreamCreate()
    with pytest.raises(Violation, match="nothing is captured"):
        cuda.cudaStreamEndCapture(stream)
    with pytest.raises(Violation, match="a mode is"):
        cuda.cudaStreamBeginCapture(stream, 1)
    cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode(1))
    with pytest.raises(Violation, match="cannot be waited for"):
        cuda.cudaStreamSynchronize(stream)
    _, graph = cuda.cudaStreamEndCapture(stream)
    _, launchable = cuda.cudaGraphInstantiate(graph, 0)
    cuda.cudaGraphExecDestroy(launchable)
    with pytest.raises(Violation, match="given back"):
        cuda.cudaGraphLaunch(launchable, stream)


def test_streams_and_attributes_are_what_they_should_be(cuda):
    with pytest.raises(Violation, match="no such stream"):
        cuda.cudaStreamSynchronize(7)
    with pytest.raises(Violation, match="a cudaDeviceAttr"):
        cuda.cudaDeviceGetAttribute(75, 0)
