"""TensorRT without a GPU, in both major versions, that holds its callers to the rules.

What the documentation calls an error is what the real one makes of it: None, False, an exception
and a message in the log. What it calls undefined is a `Violation`. Engines compute with ONNX
Runtime, on the memory of the fake CUDA.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import signal
import sys
import weakref
from functools import cache
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError

from tests.fake_cuda import Violation

UNSUPPORTED = "Unsupported"
"""Nodes of this type are not known to the parser."""

CRASH = "FAKE_TENSORRT_CRASH"
"""Environment variable: the number of a signal that ends the process amid building."""

ONNX_TYPES = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.DOUBLE: "FP8",  # any type that NumPy lacks
}


def cuda():
    """The fake device."""
    return sys.modules["cuda.bindings.runtime"].fake


def require(condition, rule):
    if not condition:
        raise Violation(rule)


def typed(value, kind):
    """What pybind11 does with an argument of another type."""
    if not isinstance(value, kind):
        raise TypeError(f"incompatible function arguments: {value!r} is no {kind}")
    return value


def enum(name, **values):
    """A class of constants, as pybind11 makes them."""

    class Enum:
        def __init__(self, value):
            self.value = value

        def __int__(self):
            return self.value

        @property
        def name(self):
            return next(key for key, value in values.items() if value == self.value)

        def __eq__(self, other):
            return type(self) is type(other) and self.value == other.value

        def __hash__(self):
            return self.value

    Enum.__name__ = name
    for key, value in values.items():
        setattr(Enum, key, Enum(value))
    return Enum


class Closed:
    """No attributes but those that are known."""

    known: tuple[str, ...] = ()

    def __setattr__(self, name, value):
        if name[0] != "_" and name not in self.known:
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        object.__setattr__(self, name, value)


class Dims:
    """A sequence, but no tuple."""

    def __init__(self, shape):
        self.shape = list(map(int, shape))

    def __len__(self):
        return len(self.shape)

    def __getitem__(self, arg0):
        return self.shape[arg0]


class IHostMemory(bytes):
    """A buffer, which before Python 3.12 only bytes are."""

    @property
    def nbytes(self):
        return len(self)


class ILogger:
    Severity = enum("Severity", INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

    def __init__(self):
        self._made = True

    def log(self, severity, msg):
        raise NotImplementedError


for each in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
    setattr(ILogger, each, getattr(ILogger.Severity, each))


class IProfiler:
    def __init__(self):
        self._made = True

    def report_layer_time(self, layer_name, ms):
        raise NotImplementedError


class Logged:
    """Something that speaks through a logger, which must be alive when it does."""

    def _listen(self, logger):
        typed(logger, ILogger)
        if not getattr(logger, "_made", False):
            raise TypeError("ILogger.__init__() must be called when overriding __init__")
        self._logger = weakref.ref(logger)

    def _say(self, severity, message):
        logger = self._logger()
        require(logger is not None, "a logger must outlive what logs to it")
        logger.log(severity, message)


DataType = enum(
    "DataType", FLOAT=0, HALF=1, INT8=2, INT32=3, BOOL=4, UINT8=5, FP8=6, BF16=7, INT64=8
)
ProfilingVerbosity = enum("ProfilingVerbosity", LAYER_NAMES_ONLY=0, NONE=1, DETAILED=2)
LOUDNESS = {"NONE": 0, "LAYER_NAMES_ONLY": 1, "DETAILED": 2}
MemoryPoolType = enum("MemoryPoolType", WORKSPACE=0)
LayerInformationFormat = enum("LayerInformationFormat", ONELINE=0, JSON=1)
TensorIOMode = enum("TensorIOMode", NONE=0, INPUT=1, OUTPUT=2)


class ITensor(Closed):
    known = ("name", "shape")

    def __init__(self, value):
        self.name = value.name
        self.shape = Dims(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)
        self._shapes = value.name.startswith("sizes")

    @property
    def is_shape_tensor(self):
        return self._shapes


class INetworkDefinition:
    def __init__(self):
        self._model = None

    @property
    def num_inputs(self):
        return len(self._model.graph.input)

    def get_input(self, index):
        return ITensor(self._model.graph.input[index])


class IOptimizationProfile:
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        shapes = [[typed(size, int) for size in shape] for shape in (min, opt, max)]
        if len(set(map(len, shapes))) > 1 or not shapes[0] <= shapes[1] <= shapes[2]:
            raise ValueError("inconsistent dimensions")
        self._shapes[typed(input, str)] = shapes


class ITimingCache:
    def __init__(self, data):
        self._data = data

    def serialize(self):
        return IHostMemory(json.dumps(self._data).encode())


class ParserError:
    def __init__(self, node, name, operator, desc):
        self._said = node, name, operator, desc

    def node(self):
        return self._said[0]

    def node_name(self):
        return self._said[1]

    def node_operator(self):
        return self._said[2]

    def desc(self):
        return self._said[3]


class OnnxParser(Logged):
    def __init__(self, network, logger):
        self._network = typed(network, INetworkDefinition)
        self._listen(logger)
        self._errors = []

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]

    def parse_from_file(self, model):
        typed(model, str)
        try:
            proto = onnx.load(model)  # with weights from beside the file
        except (DecodeError, OSError) as error:
            self._say(ILogger.ERROR, f"no ONNX model: {error}")
            return False
        self._errors = [
            ParserError(place, node.name, node.op_type, f"no importer for {node.op_type}")
            for place, node in enumerate(proto.graph.node)
            if node.op_type == UNSUPPORTED
        ]
        self._network._model = proto
        return not self._errors


class EngineInspector:
    def __init__(self, plan):
        self._plan = plan

    def get_engine_information(self, format):
        typed(format, LayerInformationFormat)
        tensors = "Bindings" if self._plan["version"].startswith("10.") else "I/O Tensors"
        return json.dumps({"Layers": self._plan["layers"], tensors: list(self._plan["inputs"])})


class IExecutionContext(Logged, Closed):
    known = ("profiler", "nvtx_verbosity")

    def __init__(self, engine):
        self._engine, self._plan, self._logger = engine, engine._plan, engine._logger
        self._shapes, self._addresses, self._ready = {}, {}, False
        fixed = {n: s for n, (s, _) in self._plan["inputs"].items() if min(s, default=0) >= 0}
        self._shapes.update({name: tuple(shape) for name, shape in fixed.items()})

    def __setattr__(self, name, value):
        if name == "profiler":
            typed(value, IProfiler)
            require(getattr(value, "_made", False), "IProfiler.__init__ was not called")
            value = weakref.ref(value)
        if name == "nvtx_verbosity":
            built = LOUDNESS[self._plan["verbosity"]]
            require(LOUDNESS[value.name] <= built, "verbosity may not be raised")
        super().__setattr__(name, value)

    def set_input_shape(self, name, shape):
        typed(shape, (tuple, list, Dims))
        if name not in self._plan["inputs"]:
            self._say(ILogger.ERROR, f"no input {name}")
            return False
        low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        shape = tuple(shape)
        inside = len(shape) == len(low) and all(
            least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
        )
        if not inside:
            self._say(ILogger.ERROR, f"{name} {shape} is outside the profile")
            return False
        self._ready = self._ready and self._shapes.get(name) == shape
        self._shapes[name] = shape
        return True

    def infer_shapes(self):
        return [name for name in self._plan["inputs"] if name not in self._shapes]

    def get_tensor_shape(self, name):
        if name in self._plan["inputs"]:
            return Dims(self._shapes.get(name, self._plan["inputs"][name][0]))
        require(not self.infer_shapes(), "sizes of outputs follow from those of all inputs")
        if "unknown" in name:
            return Dims([-1])
        zeros = {
            name: np.zeros(self._shapes[name], numpy_type(kind))
            for name, (_, kind) in self._plan["inputs"].items()
        }
        return Dims(self._engine._compute(zeros)[name].shape)

    def set_tensor_address(self, name, memory):
        self._addresses[name] = typed(memory, int)
        return True

    def execute_async_v3(self, stream_handle):
        require(typed(stream_handle, int) != 0, "the default stream is not to be used")
        require(not self.infer_shapes(), "set_input_shape before execute_async_v3")
        stream = cuda().stream(stream_handle)
        inputs = {name: self._memory(name, kind) for name, (_, kind) in self._tensors("inputs")}
        outputs = {name: self._memory(name, kind) for name, (_, kind) in self._tensors("outputs")}
        capturing = stream.captured is not None
        require(not capturing or self._ready, "run once with these shapes before a capture")
        stream.add(lambda: self._work(inputs, outputs))
        watching = getattr(self, "profiler", None)
        if watching is not None:
            require(not capturing, "a profiler waits, which a capture forbids")
            profiler = watching()
            require(profiler is not None, "a profiler must outlive its context")
            cuda().cudaStreamSynchronize(stream)
            for layer in self._plan["layers"]:
                profiler.report_layer_time(layer, 0.25)
        self._ready = True
        return True

    def _tensors(self, side):
        return self._plan[side].items()

    def _memory(self, name, kind):
        require(self._addresses.get(name), f"set_tensor_address of {name} before execute_async_v3")
        shape = tuple(self.get_tensor_shape(name))
        dtype = numpy_type(kind)
        size = int(np.prod(shape)) * dtype.itemsize
        cuda().room(self._addresses[name], size)
        return self._addresses[name], shape, dtype, size

    def _work(self, inputs, outputs):
        read = {}
        for name, (address, shape, dtype, size) in inputs.items():
            cuda().room(address, size)
            read[name] = np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)
        results = self._engine._compute(read)
        for name, (address, _, dtype, size) in outputs.items():
            cuda().room(address, size)
            ctypes.memmove(address, np.ascontiguousarray(results[name], dtype).tobytes(), size)


def numpy_type(kind):
    return {
        "FLOAT": np.dtype(np.float32),
        "HALF": np.dtype(np.float16),
        "INT64": np.dtype(np.int64),
        "INT32": np.dtype(np.int32),
        "BOOL": np.dtype(np.bool_),
    }[kind]


class ICudaEngine:
    def __init__(self, plan, logger):
        self._plan, self._logger = plan, logger
        self._session = None

    def _compute(self, feeds):
        if self._session is None:
            model = base64.b64decode(self._plan["model"])
            self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        names = list(self._plan["outputs"])
        return dict(zip(names, self._session.run(names, feeds), strict=True))

    @property
    def num_io_tensors(self):
        return len(self._plan["inputs"]) + len(self._plan["outputs"])

    def get_tensor_name(self, index):
        return [*self._plan["inputs"], *self._plan["outputs"]][index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self._plan["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return getattr(DataType, (self._plan["inputs"] | self._plan["outputs"])[name][1])

    def get_tensor_shape(self, name):
        return Dims((self._plan["inputs"] | self._plan["outputs"])[name][0])

    def get_tensor_profile_shape(self, name, profile_index):
        require(profile_index == 0, "there is one profile")
        fixed = [self._plan["inputs"][name][0]] * 3
        return [Dims(shape) for shape in self._plan["shapes"].get(name, fixed)]

    def create_engine_inspector(self):
        return EngineInspector(self._plan)

    def create_execution_context(self):
        return IExecutionContext(self)


def start(self):
    """What pybind11 makes of a null pointer, where CUDA and TensorRT do not fit."""
    if not cuda().devices:
        self._say(ILogger.ERROR, "CUDA initialization failure with error: 100")
        raise TypeError("pybind11::init(): factory function returned nullptr")


class Runtime(Logged, Closed):
    known = ("engine_host_code_allowed",)
    version = ""

    def __init__(self, logger):
        self._listen(logger)
        start(self)
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            self._say(ILogger.ERROR, "Magic tag does not match")
            return None
        if "VERSION_COMPATIBLE" in plan["flags"]:
            if not self.engine_host_code_allowed:
                self._say(ILogger.ERROR, "the engine has host code, which is not allowed")
                return None
        elif plan["version"] != self.version:
            self._say(ILogger.ERROR, "Version tag does not match")
            return None
        if plan["capability"] != list(cuda().capability):
            self._say(ILogger.ERROR, "The engine plan file is generated on an incompatible device")
            return None
        return ICudaEngine(plan, self._logger)


class IBuilderConfig(Logged, Closed):
    known = ("builder_optimization_level", "profiling_verbosity")

    def __init__(self, logger, flags, version):
        self._logger, self._flags, self._version = logger, flags, version
        self._set, self._profiles, self._cache = {"TF32"}, [], None
        self.builder_optimization_level = 3
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY

    def __setattr__(self, name, value):
        if name == "profiling_verbosity":
            typed(value, ProfilingVerbosity)
        if name == "builder_optimization_level":
            require(0 <= typed(value, int) <= 5, "levels go from 0 to 5")
        super().__setattr__(name, value)

    def set_flag(self, flag):
        self._set.add(typed(flag, self._flags).name)

    def clear_flag(self, flag):
        self._set.discard(typed(flag, self._flags).name)

    def set_memory_pool_limit(self, pool, pool_size):
        typed(pool, MemoryPoolType), typed(pool_size, int)
        self._workspace = pool_size

    def create_timing_cache(self, serialized_timing_cache):
        data = bytes(serialized_timing_cache)
        here = {"version": self._version, "capability": list(cuda().capability), "times": 0}
        return ITimingCache(json.loads(data) if data else here)

    def set_timing_cache(self, cache, ignore_mismatch):
        typed(cache, ITimingCache), typed(ignore_mismatch, bool)
        here = self._version, list(cuda().capability)
        if (cache._data["version"], cache._data["capability"]) != here and not ignore_mismatch:
            self._say(ILogger.ERROR, "the timing cache is of another device")
            return False
        self._cache = weakref.ref(cache)
        return True

    def get_timing_cache(self):
        return self._cache and self._cache()

    def add_optimization_profile(self, profile):
        self._profiles.append(typed(profile, IOptimizationProfile))
        return len(self._profiles) - 1 if profile._shapes else -1


class Builder(Logged, Closed):
    known = ("max_threads",)
    version = ""
    flags: type
    creation: type

    def __init__(self, logger):
        self._listen(logger)
        start(self)

    def create_network(self, flags=0):
        typed(flags, int)
        if self.version.startswith("10."):
            rule = "the network would not be strongly typed"
            require(flags == 1 << int(self.creation.STRONGLY_TYPED), rule)
        else:
            require(flags == 0, "STRONGLY_TYPED is deprecated in 11, where it always is so")
        return INetworkDefinition()

    def create_builder_config(self):
        return IBuilderConfig(self._logger, self.flags, self.version)

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        typed(network, INetworkDefinition), typed(config, IBuilderConfig)
        require(network._model is not None, "parse before building")
        if config._cache is not None:
            require(config._cache() is not None, "a timing cache must outlive the build")
            config._cache()._data["times"] += 1
        if CRASH in os.environ:
            self._say(ILogger.INFO, "timing tactic 0x1234 of layer MatMul_7")
            os.kill(os.getpid(), int(os.environ[CRASH]))
            signal.pause()
        graph = network._model.graph
        shapes = config._profiles[0]._shapes if config._profiles else {}
        for tensor in map(ITensor, graph.input):
            given = shapes.get(tensor.name)
            if given is None and -1 in tuple(tensor.shape):
                self._say(ILogger.ERROR, f"{tensor.name}: dynamic, but no optimization profile")
                return None
            if given is not None and any(
                fixed not in (-1, *sizes)
                for fixed, *sizes in zip(tensor.shape, *given, strict=True)
            ):
                self._say(ILogger.ERROR, f"{tensor.name}: profile does not fit")
                return None
        if any(node.op_type == "Unbuildable" for node in graph.node):
            self._say(ILogger.ERROR, "Could not find any implementation for node Unbuildable")
            return None
        return IHostMemory(json.dumps(_plan(self.version, network._model, config, shapes)).encode())


def _plan(version, model, config, shapes):
    """An engine, written out."""

    def specs(values):
        return {
            value.name: (
                tuple(ITensor(value).shape),
                ONNX_TYPES[value.type.tensor_type.elem_type],
            )
            for value in values
        }

    return {
        "version": version,
        "capability": cuda().capability,
        "flags": sorted(config._set),
        "level": config.builder_optimization_level,
        "verbosity": config.profiling_verbosity.name,
        "workspace": getattr(config, "_workspace", None),
        "shapes": shapes,
        "inputs": specs(model.graph.input),
        "outputs": specs(model.graph.output),
        "layers": [node.name for node in model.graph.node],
        "model": base64.b64encode(model.SerializeToString()).decode(),
    }


@cache
def fake_tensorrt(version):
    """The module of a version."""
    module = ModuleType("tensorrt")
    module.__version__ = version
    for name, value in globals().items():
        if isinstance(value, type) and value not in (Violation, Closed, Logged):
            setattr(module, name, value)
    flags = {"REFIT": 1, "TF32": 2, "VERSION_COMPATIBLE": 3}
    if version.startswith("10."):
        flags |= {"FP16": 0, "BF16": 4, "INT8": 5}
        creation = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}
    else:
        creation = {"STRONGLY_TYPED": 0}
    module.BuilderFlag = enum("BuilderFlag", **flags)
    module.NetworkDefinitionCreationFlag = enum("NetworkDefinitionCreationFlag", **creation)
    module.Builder = type(
        "Builder",
        (Builder,),
        {
            "version": version,
            "flags": module.BuilderFlag,
            "creation": module.NetworkDefinitionCreationFlag,
        },
    )
    module.Runtime = type("Runtime", (Runtime,), {"version": version})
    return module
