"""An engine from an ONNX file: what the builder is told, in its order.

This runs in a process of its own, which a fault of the builder may take with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from corp_onnx.deploy.shape_ranges import fitted
from corp_onnx.deploy.tensorrt.bindings import (
    major,
    new_logger,
    started,
    told,
    trt,
    version,
    versions,
)
from corp_onnx.deploy.tensorrt.options import ENGINE, LAYERS, Options
from corp_onnx.errors import GraphError, PlanError

Say = Callable[[str], None]


def construct(model: Path, folder: Path, options: Options, say: Say) -> Mapping[str, str]:
    """Build an engine into a folder, its layers beside it; returns versions by name.

    Raises:
        BackendUnavailable: If TensorRT or a GPU is missing.
        GraphError: If TensorRT cannot take the model.
        PlanError: If the options do not fit the model.
    """
    options.check()
    here, errors = versions(), list[str]()
    logger = new_logger(errors, say)
    builder = _builder(logger, options, errors)
    network = builder.create_network(_creation_flags())
    _parse(trt.OnnxParser(network, logger), model, errors)
    config = builder.create_builder_config()
    _configure(config, options)
    cache = _attach_cache(config, options.timing_cache, say)
    _add_profile(builder, config, network, options)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise GraphError(f"TensorRT cannot build {model}: {told(errors)}")
    (folder / ENGINE).write_bytes(plan)
    _keep_cache(cache, options.timing_cache)
    (folder / LAYERS).write_text(_layers(plan, logger, options, errors))
    return here


def _builder(logger: trt.ILogger, options: Options, errors: Sequence[str]) -> trt.Builder:
    builder = started(lambda: trt.Builder(logger), errors)
    if options.threads:
        builder.max_threads = options.threads
    return builder


def _creation_flags() -> int:
    """Types are those of the model: to be asked for in 10, always so since 11."""
    if major() >= 11:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse(parser: trt.OnnxParser, model: Path, errors: Sequence[str]) -> None:
    """Read the file where it lies, for weights beside it are found from there."""
    parsed = parser.parse_from_file(str(model))
    found = [_described(parser.get_error(index)) for index in range(parser.num_errors)]
    if found or not parsed:
        said = "\n  ".join(found) or told(errors)
        raise GraphError(f"TensorRT {version()} cannot read {model}:\n  {said}")


def _described(error: trt.ParserError) -> str:
    if error.node() < 0:
        return error.desc()
    name = error.node_name() or f"number {error.node()}"
    return f"node {name} ({error.node_operator()}): {error.desc()}"


def _configure(config: trt.IBuilderConfig, options: Options) -> None:
    verbosity = trt.ProfilingVerbosity
    config.profiling_verbosity = {
        "none": verbosity.NONE,
        "names": verbosity.LAYER_NAMES_ONLY,
        "detailed": verbosity.DETAILED,
    }[options.verbosity]
    config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)


def _attach_cache(
    config: trt.IBuilderConfig, path: Path | None, say: Say
) -> trt.ITimingCache | None:
    """Times of kernels from an earlier build, or an empty record of them; it must outlive it."""
    if path is None:
        return None
    known = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if known is not None and config.set_timing_cache(known, False):
        return known
    say(f"[WARNING] {path} has times of another GPU or version; it is begun anew")
    fresh = config.create_timing_cache(b"")
    if fresh is None or not config.set_timing_cache(fresh, False):
        raise GraphError("TensorRT takes no timing cache; build without one")
    return fresh


def _keep_cache(cache: trt.ITimingCache | None, path: Path | None) -> None:
    """Whole or not at all: another build may read it meanwhile."""
    if cache is None or path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(cache.serialize())
    partial.replace(path)


def _add_profile(
    builder: trt.Builder,
    config: trt.IBuilderConfig,
    network: trt.INetworkDefinition,
    options: Options,
) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for tensor in inputs:
        if tensor.is_shape_tensor:
            raise GraphError(
                f"the values of input {tensor.name} decide sizes in the model; make it a constant"
            )
    dims = {tensor.name: tuple(tensor.shape) for tensor in inputs}
    varying = {
        name: tuple(None if size < 0 else size for size in shape) for name, shape in dims.items()
    }
    ranges = fitted(options.shapes, varying)
    if not any(None in shape for shape in varying.values()):
        return
    profile = builder.create_optimization_profile()
    try:
        for name, given in ranges.items():
            profile.set_shape(
                name, trt.Dims(given.smallest), trt.Dims(given.likeliest), trt.Dims(given.largest)
            )
    except ValueError as error:
        raise PlanError(
            f"TensorRT does not take the shapes {options.document()['shapes']}"
        ) from error
    if config.add_optimization_profile(profile) < 0:
        raise PlanError(f"TensorRT does not take the shapes {options.document()['shapes']}")


def _layers(
    plan: trt.IHostMemory, logger: trt.ILogger, options: Options, errors: Sequence[str]
) -> str:
    """What the engine consists of, as JSON in TensorRT's own form."""
    runtime = started(lambda: trt.Runtime(logger), errors)
    runtime.engine_host_code_allowed = options.version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise GraphError(f"TensorRT cannot load what it built: {told(errors)}")
    inspector = engine.create_engine_inspector()
    return inspector.get_engine_information(trt.LayerInformationFormat.JSON)
