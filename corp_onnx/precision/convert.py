"""From a model and some inputs to the same model in the precision asked for, with evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.data.batching import Batch
from corp_onnx.errors import DataError, PlanError, QuantisedModel
from corp_onnx.graph.canonical.quantised import QUANTISED_FAMILIES, QUANTISED_OPS
from corp_onnx.graph.facts import element_type
from corp_onnx.graph.model import Model
from corp_onnx.precision.check import checked
from corp_onnx.precision.halves import halved
from corp_onnx.precision.integers import in_integers
from corp_onnx.precision.records import STORED, Draft, Request, Typed
from corp_onnx.precision.stored import with_stored_weights
from corp_onnx.session import Runtime

FIRST_BF16 = 13
"""The first opset in which operators take bfloat16: products and sums, others later."""

NONE: Mapping[str, Model] = MappingProxyType({})


def in_precision(
    model: Model,
    request: Request,
    seen: Sequence[Batch],
    held_out: Sequence[Batch],
    *,
    others: Mapping[str, Model] = NONE,
    runtime: Runtime | None = None,
) -> Typed:
    """The model in another precision, held against itself in float32.

    Args:
        model: In float32; it is not changed.
        request: The precision.
        seen: Inputs that ranges are taken from. Without any, 16 bits are decided by weights alone.
        held_out: Inputs to check on.
        others: Further models to compare with, by name.
        runtime: How models are run.

    Raises:
        QuantisedModel: If weights are whole numbers already.
        PlanError: If nothing is asked for, the model is of 16 bits already or its opset does not
            have the type, or int8 has no inputs or no layers.
        DataError: If there are no inputs to check on.
        VerificationError: If the result is farther from the model than the precision allows.
    """
    if request.wants_nothing:
        raise PlanError("the model is in fp32 as it is; ask for another precision")
    require_convertible(model, request)
    if not held_out:
        raise DataError("there are no held-out inputs to check the precision on; give some")
    draft = _drafted(model, request, seen, runtime)
    return checked(model, draft, request, held_out, others=others, runtime=runtime)


def require_convertible(model: Model, request: Request) -> None:
    """See whether a model can be brought into a precision, before any work is done for it.

    Raises:
        QuantisedModel: If weights are whole numbers already.
        PlanError: If the model is of 16 bits already, or its opset does not have the type.
    """
    if request.wants_nothing:
        return
    opset = model.fingerprint.opset
    if request.precision == "bf16" and opset < FIRST_BF16:
        raise PlanError(
            f"the model is of opset {opset}, whose operators do not take bfloat16; {FIRST_BF16} is "
            "the first that has it: convert the model with onnx.version_converter.convert_version"
        )
    found = sorted({node.op for node in model.graph.nodes if _rounds(node)})
    if found:
        raise QuantisedModel(
            f"the model is quantised already (it holds {', '.join(found)}), so it stays in that "
            f"precision; take the floating-point model for {request.name}"
        )
    stored = stored_type(model)
    if stored != np.float32:
        raise PlanError(
            f"the weights of the model are {stored.name}"
            + (
                ", which is what is asked for: leave --precision out"
                if request.precision == STORED.get(stored.name)
                else f"; take the float32 model for {request.name}"
            )
        )


def stored_type(model: Model) -> np.dtype:
    """The floating-point type that most weights have; float32 if there are none."""
    counts: dict[np.dtype, int] = {np.dtype(np.float32): 0}
    for tensor in model.graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            dtype = element_type(tensor)
            assert dtype is not None, f"{tensor.name} has values"
            if dtype.kind == "f" or dtype.name == "bfloat16":
                counts[dtype] = counts.get(dtype, 0) + int(np.prod(tensor.shape))
    return max(counts, key=counts.__getitem__)


def _drafted(
    model: Model, request: Request, seen: Sequence[Batch], runtime: Runtime | None
) -> Draft:
    if request.weight_only is not None:
        return with_stored_weights(model, request.weight_only)
    if request.precision == "int8":
        return in_integers(model, seen, runtime, symmetric=request.symmetric)
    return halved(model, request, seen, runtime)


def _rounds(node: gs.Node) -> bool:
    quantised = QUANTISED_OPS | {"MatMulNBits", "GatherBlockQuantized"}
    return node.op in quantised or node.op.startswith(QUANTISED_FAMILIES)
