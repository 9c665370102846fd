"""Is a model in another precision still the model that it was made from?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from corp_onnx.blocks import find_blocks
from corp_onnx.data.batching import Batch
from corp_onnx.errors import VerificationError
from corp_onnx.graph.model import Model, is_large
from corp_onnx.precision.records import FORMATS, Draft, Request, Typed
from corp_onnx.precision.rounded import rounding
from corp_onnx.session import Runtime, Session, open_session
from corp_onnx.verify.comparison import Comparison, compare, with_masks

BEFORE = "before"
"""Name of the comparison with the model that was converted."""

REMEDIES: Mapping[str, str] = {
    "fp16": "bf16 has the range of fp32",
    "bf16": "fp16 rounds eight times finer",
    "int8": "calibrate on more samples, or store only the weights so (--weight-only int8)",
    "weight-only int8": "stay with fp16",
    "weight-only int4": "--weight-only int8 rounds sixteen times finer",
}
"""What else can be tried, by what was asked for."""


def checked(
    before: Model,
    draft: Draft,
    request: Request,
    held_out: Sequence[Batch],
    *,
    others: Mapping[str, Model],
    runtime: Runtime | None = None,
) -> Typed:
    """The typed model with its distance from others on inputs that it knows nothing of.

    Raises:
        VerificationError: If it is not valid, its outputs are not finite, or one of them is
            farther from the model it was made from than the precision allows.
    """
    _require_valid(draft.model)
    session, computed = _as_it_computes(draft, request, runtime)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
        against = {
            name: _compared(model, session, held_out, runtime)
            for name, model in {BEFORE: before, **others}.items()
        }
    _require_close(against[BEFORE], request, computed)
    return Typed(request, draft, against, (size_bytes(before), size_bytes(draft.model)), computed)


def _compared(
    model: Model, session: Session, held_out: Sequence[Batch], runtime: Runtime | None
) -> Comparison:
    shown, padding = with_masks(model, find_blocks(model).blocks)
    return compare(open_session(shown, runtime), session, held_out, padding=padding)


def size_bytes(model: Model) -> int:
    """What nodes and weights take up in a file."""
    graph = model.proto().graph
    return sum(part.ByteSize() for part in (*graph.initializer, *graph.node))


def _as_it_computes(draft: Draft, request: Request, runtime: Runtime | None) -> tuple[Session, str]:
    """A session that rounds as the types say, and how it does so; the model itself must load."""
    form = FORMATS.get(request.precision)
    if form is None:
        return open_session(draft.model, runtime), "as it is, by ONNX Runtime"
    if request.precision == "fp16":
        open_session(draft.model, runtime)  # it has to load; on a CPU it does not for bfloat16
    return (
        open_session(rounding(draft.model, form), runtime),
        f"in float32, weights and every result of a {form.name} node rounded to {form.name}",
    )


def _require_valid(model: Model) -> None:
    """Hold the types of every node against its operator's definition."""
    proto = model.proto()
    try:
        if not is_large(proto):
            onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise VerificationError(
            f"the typed model is not valid ONNX: {str(error).splitlines()[0]}; this is a defect: "
            "please report it with the model's operators"
        ) from error


def _require_close(comparison: Comparison, request: Request, computed: str) -> None:
    errors = comparison.relative_errors
    worst = max(errors, key=lambda name: (not np.isfinite(errors[name]), errors[name]))
    if not np.isfinite(errors[worst]):
        raise VerificationError(
            f"output {worst!r} in {request.name} holds NaN or infinity on held-out inputs; "
            f"calibrate on inputs more like these, or: {REMEDIES[request.name]}"
        )
    if not errors[worst] <= request.most_error:
        raise VerificationError(
            f"output {worst!r} in {request.name} has a relative error of {errors[worst]:.2e} on "
            f"{comparison.samples} held-out inputs (limit {request.most_error:g}; computed "
            f"{computed}); {REMEDIES[request.name]}"
        )
