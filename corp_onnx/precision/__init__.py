"""A float32 model as one whose types say fp16, bf16 or int8, checked against itself."""

from corp_onnx.precision.convert import in_precision, require_convertible, stored_type
from corp_onnx.precision.records import LIMITS, STORED, Draft, Exempt, Request, Typed, WeightOnly

__all__ = [
    "LIMITS",
    "STORED",
    "Draft",
    "Exempt",
    "Request",
    "Typed",
    "WeightOnly",
    "in_precision",
    "require_convertible",
    "stored_type",
]
