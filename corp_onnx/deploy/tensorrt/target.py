"""TensorRT as a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import onnx

from corp_onnx.deploy.records import Build, Precision, declared_inputs, without_weights
from corp_onnx.deploy.shape_ranges import exactly, fitted
from corp_onnx.deploy.tensorrt.bindings import version, versions
from corp_onnx.deploy.tensorrt.building import build_apart
from corp_onnx.deploy.tensorrt.cuda import device
from corp_onnx.deploy.tensorrt.engine import TensorRTEngine
from corp_onnx.deploy.tensorrt.options import ENGINE, Options
from corp_onnx.errors import PlanError
from corp_onnx.graph.sizes import Sizes

CAPABILITY: Mapping[Precision, tuple[int, int]] = {"bf16": (8, 0)}
"""The first generation of GPUs that computes in a type, where not all do."""

QUANTISING = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True, slots=True)
class TensorRT(Options):
    """TensorRT 10 or 11 on the first GPU: builds an engine for that GPU and that version.

    Every network is strongly typed: TensorRT computes in the types that the ONNX file has, and
    chooses none itself. So ``int8`` is a model with QuantizeLinear and DequantizeLinear, for there
    is no calibrator, and ``fp16`` one whose tensors are float16.

    Attributes:
        cuda_graph: Whether the kernels of a run are launched at once, as one graph; inputs of the
            same shapes then take less of the processor's time. Not every model can.
    """

    cuda_graph: bool = False
    name: str = "tensorrt"

    @property
    def inference_threads(self) -> None:
        """None: a GPU computes, and `threads` are those of the builder."""

    def versions(self) -> Mapping[str, str]:
        """Of TensorRT, CUDA, the driver and the GPU."""
        return versions()

    def rounds_by_itself(self, precision: Precision) -> bool:
        """Never: it computes in the types that the file has."""
        return False

    def require(self, precision: Precision) -> None:
        """See whether TensorRT, CUDA and a GPU are here, and it computes in these types."""
        version()
        gpu = device()
        needed = CAPABILITY.get(precision, (0, 0))
        if gpu.capability < needed:
            raise PlanError(
                f"{gpu} does not compute in {precision}, which begins with compute capability "
                f"{needed[0]}.{needed[1]}; choose fp16"
            )

    def sized(self, sizes: Sizes) -> TensorRT:
        """For inputs of these sizes alone, unless it has ranges already."""
        return self if self.shapes else replace(self, shapes=exactly(sizes))

    def build(self, model: Path, folder: Path, precision: Precision) -> Build:
        """Make an engine in a process of its own; what it said and its layers lie beside it.

        That ranges fit what the file says of its inputs is seen before that process begins.
        """
        self.check()
        self.require(precision)
        proto = without_weights(model)
        if precision == "int8":
            _require_quantised(model, proto)
        fitted(self.shapes, declared_inputs(proto))
        start = perf_counter()
        made_by = build_apart(model, folder, self)
        seconds = perf_counter() - start
        path = folder / ENGINE
        build = Build(
            *(self.name, precision, path, seconds, path.stat().st_size),
            versions=made_by,
            options=self.document(),
        )
        build.write()
        return build

    def load(self, build: Build) -> TensorRTEngine:
        """Get an engine ready to run on the first GPU."""
        self.require(build.precision)
        return TensorRTEngine(build, cuda_graph=self.cuda_graph)


def _require_quantised(model: Path, proto: onnx.ModelProto) -> None:
    if not QUANTISING & {node.op_type for node in proto.graph.node}:
        raise PlanError(
            f"{model} has no QuantizeLinear or DequantizeLinear, so nothing in it is int8; "
            "TensorRT has no calibrator for models of fixed types: quantise the model first"
        )
