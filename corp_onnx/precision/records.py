"""What precision is asked for, and what is known of a model that was brought into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx

from corp_onnx.deploy.records import PRECISIONS, Precision
from corp_onnx.errors import PlanError
from corp_onnx.graph.model import Model
from corp_onnx.verify.comparison import Comparison

WeightOnly = Literal["int8", "int4"]

STORED: Mapping[str, Precision] = {"float16": "fp16", "bfloat16": "bf16"}
"""What a model is in, by the type of its weights."""

LIMITS: Mapping[str, float] = {
    "fp16": 1e-3,
    "bf16": 1e-2,
    "int8": 1e-1,
    "weight-only int8": 1e-2,
    "weight-only int4": 2e-1,
}
"""Relative error ``‖y - ŷ‖² / ‖y‖²`` of an output above which a result is refused."""


@dataclass(frozen=True, slots=True)
class Format:
    """A floating-point type of 16 bits.

    Attributes:
        name: As people write it.
        code: ONNX's number for it.
        dtype: NumPy's.
        largest: The largest finite number.
    """

    name: str
    code: int
    dtype: np.dtype
    largest: float


FORMATS: Mapping[str, Format] = {
    "fp16": Format("float16", onnx.TensorProto.FLOAT16, np.dtype(np.float16), 65504.0),
    "bf16": Format(
        "bfloat16", onnx.TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16), 2.0**128 - 2.0**120
    ),
}


@dataclass(frozen=True, slots=True)
class Request:
    """A precision, and how it is meant.

    Attributes:
        precision: Of the numbers that are computed with; ``fp32`` asks for nothing.
        weight_only: Bits of stored weights, where everything is still computed in float32.
        keep_io_types: Whether inputs and outputs stay what they are, with casts behind and before
            them.
        symmetric: Whether whole-number activations have zero in the middle, as TensorRT wants it;
            without, they are more exact, and faster on ONNX Runtime.
        limit: Relative error of an output above which the result is refused; None takes that of
            the precision.

    Raises:
        PlanError: If they contradict each other.
    """

    precision: Precision = "fp32"
    weight_only: WeightOnly | None = None
    keep_io_types: bool = True
    symmetric: bool = False
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise PlanError(f"{self.precision!r} is none of {', '.join(PRECISIONS)}")
        if not self.keep_io_types and self.precision not in FORMATS:
            raise PlanError(
                f"--narrow-io gives inputs and outputs the 16 bits of the model, and {self.name} "
                "has none; it goes with --precision fp16 or bf16"
            )
        if self.weight_only is not None and self.precision != "fp32":
            raise PlanError(
                f"weights of {self.weight_only} alone leave all else in fp32, so they do not go "
                f"with precision {self.precision}; ask for one of the two"
            )
        if self.weight_only is not None and self.symmetric:
            raise PlanError(
                "weights alone of few bits are an operator of ONNX Runtime that TensorRT does not "
                "have; ask for --precision int8 or fp16"
            )

    @property
    def name(self) -> str:
        """What is asked for, in words."""
        return self.precision if self.weight_only is None else f"weight-only {self.weight_only}"

    @property
    def wants_nothing(self) -> bool:
        """Whether the model may stay as it is."""
        return self.name == "fp32"

    @property
    def most_error(self) -> float:
        """Relative error above which a result is refused."""
        return LIMITS[self.name] if self.limit is None else self.limit


@dataclass(frozen=True, slots=True)
class Exempt:
    """A node that is computed in float32 still, or a layer that is not quantised, and why."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A model whose types were changed, before anybody has looked at what it computes.

    Attributes:
        model: The typed model.
        kept: What was left in float32.
        quantised: Layers with weights of whole numbers.
        fused: Norms that were written out and are one operator now.
        samples: Inputs that ranges were taken from; 0 where only weights were looked at.
        notes: What a user should know.
    """

    model: Model
    kept: tuple[Exempt, ...] = ()
    quantised: int = 0
    fused: int = 0
    samples: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Typed:
    """A model in another precision, with evidence.

    Attributes:
        request: What was asked for.
        draft: The model, and what was done to it.
        against: By name, how far it is from each model that it was compared with.
        size_bytes: Of the model before and after, as they are written.
        computed: How it was run to be compared.
    """

    request: Request
    draft: Draft
    against: Mapping[str, Comparison]
    size_bytes: tuple[int, int]
    computed: str

    @property
    def model(self) -> Model:
        """The typed model."""
        return self.draft.model
