"""OpenVINO on the processor as a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np

from corp_onnx.deploy.records import PROFILED_RUNS, Build, Precision, options_of
from corp_onnx.errors import BackendUnavailable, DataError, GraphError, PlanError
from corp_onnx.files import require_writable
from corp_onnx.graph.inputs import InputSpec
from corp_onnx.graph.sizes import Sizes

DEVICE = "CPU"
ENGINE = "model.xml"

CAPABILITY: Mapping[Precision, str] = {
    "fp32": "FP32",
    "fp16": "FP16",
    "bf16": "BF16",
    "int8": "INT8",
}
"""What a device must say of itself."""

COMPUTED: Mapping[Precision, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}
"""What is computed in between; left alone, OpenVINO computes fp32 models in bf16 where it can."""


@dataclass(frozen=True, slots=True)
class OpenVino:
    """OpenVINO on the processor: builds its intermediate representation.

    Attributes:
        threads: Of one inference; 0 takes all cores.
    """

    threads: int = 0
    name: str = "openvino"

    @property
    def inference_threads(self) -> int:
        """As asked for."""
        return self.threads

    def versions(self) -> Mapping[str, str]:
        """Of OpenVINO."""
        return {"openvino": str(_openvino().get_version())}

    def rounds_by_itself(self, precision: Precision) -> bool:
        """To bf16, which it then computes in; other types are those of the file."""
        return precision == "bf16"

    def require(self, precision: Precision) -> None:
        """See whether OpenVINO is installed and this processor has these types."""
        able = _openvino().Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        if CAPABILITY[precision] not in able:
            has = ", ".join(name for name, capability in CAPABILITY.items() if capability in able)
            raise PlanError(f"OpenVINO has no {precision} on this processor; it has {has}")

    def sized(self, sizes: Sizes) -> OpenVino:
        """As it is: an engine takes all sizes."""
        return self

    def build(self, model: Path, folder: Path, precision: Precision) -> Build:
        """Translate the model and write the translation, weights in the types that they have."""
        self.require(precision)
        openvino = _openvino()
        path = folder / ENGINE
        require_writable(path)
        start = perf_counter()
        try:
            translated = openvino.Core().read_model(model)
        except RuntimeError as error:
            raise GraphError(f"OpenVINO cannot read {model}: {str(error).strip()}") from error
        openvino.save_model(translated, path, compress_to_fp16=False)
        seconds = perf_counter() - start
        size = sum(file.stat().st_size for file in (path, path.with_suffix(".bin")))
        versions, options = self.versions(), options_of(self)
        build = Build(self.name, precision, path, seconds, size, versions, options)
        build.write()
        return build

    def load(self, build: Build) -> OpenVinoEngine:
        """Compile it for this processor, to answer one request as soon as possible."""
        core = _openvino().Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": COMPUTED[build.precision],
        }
        if self.threads:
            settings["INFERENCE_NUM_THREADS"] = str(self.threads)
        try:
            model = core.read_model(build.path)
            compiled = core.compile_model(model, DEVICE, settings)
        except RuntimeError as error:
            raise GraphError(
                f"OpenVINO cannot load {build.path}: {str(error).strip()}; build it again if "
                "another version made it"
            ) from error
        profiled = partial(core.compile_model, model, DEVICE, settings | {"PERF_COUNT": "YES"})
        return OpenVinoEngine(compiled, compiled.create_infer_request(), profiled)


@dataclass(frozen=True, slots=True, eq=False)
class OpenVinoEngine:
    """A compiled model and its one request."""

    compiled: Any
    request: Any
    profiled: Callable[[], Any]
    """Compiles the model once more, to time its operators."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """As the compiled model has them."""
        return tuple(
            InputSpec(
                _name(tensor),
                tensor.element_type.to_dtype(),
                tuple(dim.get_length() if dim.is_static else None for dim in tensor.partial_shape),
            )
            for tensor in self.compiled.inputs
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        """As the compiled model has them."""
        return tuple(map(_name, self.compiled.outputs))

    @property
    def device_ms(self) -> float | None:
        """Of the last request, without the copies from and to Python."""
        return float(self.request.latency)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference."""
        taken = self._taken(feeds)
        try:
            results = self.request.infer(taken)
        except RuntimeError as error:
            raise DataError(f"{_cannot_run(taken)}: {str(error).strip()}") from error
        return {_name(port): results[port] for port in self.compiled.outputs}

    def operator_times(
        self, feeds: Mapping[str, np.ndarray], *, runs: int = PROFILED_RUNS
    ) -> Mapping[str, float]:
        """By type of node of the compiled model."""
        request = self.profiled().create_infer_request()
        times: dict[str, float] = {}
        for _ in range(runs):
            request.infer(self._taken(feeds))
            for node in request.get_profiling_info():
                spent_ms = node.real_time.total_seconds() * 1000 / runs
                times[node.node_type] = times.get(node.node_type, 0.0) + spent_ms
        return times

    def _taken(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        missing = [spec.name for spec in self.inputs if spec.name not in feeds]
        if missing:
            raise DataError(f"the model also reads {', '.join(missing)}; got {', '.join(feeds)}")
        taken = {spec.name: feeds[spec.name] for spec in self.inputs}
        for spec in self.inputs:
            shape = taken[spec.name].shape
            fits = len(shape) == len(spec.shape) and all(
                declared in {None, size} for declared, size in zip(spec.shape, shape, strict=True)
            )
            if not fits:
                raise DataError(f"{_cannot_run(taken)}: {spec.name} is of shape {spec.shape}")
        return taken

    def close(self) -> None:
        """Nothing: the request goes with its last reference."""


def _name(port: Any) -> str:  # noqa: ANN401 (OpenVINO ships no types)
    """As the ONNX file has it: a tensor that is moved about before may bring other names along."""
    name = str(port.node.friendly_name).removesuffix("/sink_port_0")
    return name if name in port.names else str(port.any_name)


def _cannot_run(feeds: Mapping[str, np.ndarray]) -> str:
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
    return f"OpenVINO cannot run the model on inputs of shape {shapes}"


def _openvino() -> ModuleType:
    """The openvino module, or an error that says how to get it."""
    try:
        import openvino
    except ImportError as error:
        raise BackendUnavailable(
            "the target openvino needs OpenVINO; install it with "
            "`pip install 'corp_onnx[openvino]'`"
        ) from error
    return openvino  # type: ignore[no-any-return]
