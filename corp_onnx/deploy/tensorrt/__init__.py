"""TensorRT as a target: engines built in a process of their own, run and timed on a GPU."""

from corp_onnx.deploy.tensorrt.engine import LayerTime, TensorRTEngine, write_layer_times
from corp_onnx.deploy.tensorrt.options import Options, Verbosity
from corp_onnx.deploy.tensorrt.target import TensorRT

__all__ = [
    "LayerTime",
    "Options",
    "TensorRT",
    "TensorRTEngine",
    "Verbosity",
    "write_layer_times",
]
