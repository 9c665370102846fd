"""Every check by itself: structure, promises, repair, the user's limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from corp_onnx.blocks import Catalog, width_of
from corp_onnx.errors import PlanError
from corp_onnx.graph.facts import element_type
from corp_onnx.graph.model import Model, is_large
from corp_onnx.plan import Plan
from corp_onnx.solve.folds import Solution
from corp_onnx.verify.comparison import Comparison

PROMISE_FACTOR = 1.5
"""How much larger a block's measured error may be than the predicted one."""

ROUNDING_ERROR = {"float16": 2.0**-20, "bfloat16": 2.0**-14}
LEAST_ROUNDING_ERROR = 1e-9
"""Relative error of an output that two ways of computing the same function may differ by: the
square of the unit of a narrow type, where a model has weights of one."""

NEGLIGIBLE_ERROR = 1e-4
"""Relative error of a block below which a promise is kept whatever was predicted."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: whether it holds, and what was found."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True, slots=True)
class Verification:
    """Every check and the comparison on held-out samples."""

    checks: tuple[Check, ...]
    comparison: Comparison

    @property
    def passed(self) -> bool:
        """Whether all checks hold."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits that the user sets on held-out samples."""

    max_error: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        if self.max_error is not None and not self.max_error >= 0:
            raise PlanError(f"--max-error {self.max_error:g} is no limit; it must be 0 or more")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise PlanError(
                f"--min-agreement {self.min_agreement:g} is no share of samples; it must be "
                "between 0 and 1"
            )


def check_structure(plan: Plan, pruned: Model, dense: Model, found: Catalog) -> Check:
    """Whether the model is valid ONNX, keeps its interface, and every width is as planned.

    What the checker says of the dense model too, such as of an operator that an optimiser wrote
    into an opset without it, counts for nothing.
    """
    interface = [
        [(tensor.name, tensor.dtype) for tensor in (*model.graph.inputs, *model.graph.outputs)]
        for model in (dense, pruned)
    ]
    if interface[0] != interface[1]:
        return Check("structure", False, f"the interface changed from {interface[0]}")
    complaint = _complaint(pruned)
    if complaint is not None and complaint != _complaint(dense):
        return Check("structure", False, f"not valid ONNX: {complaint}")
    blocks = {block.id: block for block in found.blocks}
    wrong = [
        f"{cut.block} {cut.axis}"
        for cut in plan.cuts
        if cut.block not in blocks or width_of(blocks[cut.block], cut.axis) != cut.to
    ]
    if wrong:
        return Check("structure", False, f"other widths than planned: {', '.join(wrong)}")
    valid = "valid" if complaint is None else f"no less valid than before ({complaint})"
    return Check("structure", True, f"{valid}, same interface, {len(plan.cuts)} widths as planned")


def _complaint(model: Model) -> str | None:
    """What the checker of ONNX says first of a model, if anything; of one too large, nothing."""
    proto = model.proto()
    try:
        if not is_large(proto):
            onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error).splitlines()[0]
    return None


def check_promises(solution: Solution, measured: Mapping[tuple[str, str | None], float]) -> Check:
    """Whether every measured error is within 1.5 times what solving predicted."""
    broken = []
    worst = 0.0
    known = 0
    for fold in solution.folds:
        axis, predicted = fold.axis, fold.evidence.error
        found = measured.get((fold.block, axis))
        known += found is not None
        if found is None or found <= NEGLIGIBLE_ERROR:
            continue
        ratio = _over(found, predicted)
        worst = max(worst, ratio)
        if not ratio <= PROMISE_FACTOR:  # also when it is not a number
            where = f"{fold.block} {axis}" if axis else fold.block
            broken.append(f"{where} measured {found:.2e}, predicted {predicted:.2e}")
    if broken:
        return Check("promises", False, "; ".join(broken))
    return Check(
        "promises",
        True,
        f"measured at most {worst:.2f} times predicted, in {known} of {len(solution.folds)} folds",
    )


def _over(found: float, predicted: float) -> float:
    """How many times what was predicted; once where both are infinite."""
    if found == predicted:
        return 1.0
    return found / predicted if predicted > 0 else np.inf


def rounding_error(model: Model) -> float:
    """What a change that changes nothing may make of a model's output, by the types it stores."""
    return max(ROUNDING_ERROR.get(name, LEAST_ROUNDING_ERROR) for name in types_in(model))


def types_in(model: Model) -> frozenset[str]:
    """The names of all element types that are known of its tensors."""
    return frozenset(str(element_type(tensor)) for tensor in model.graph.tensors().values())


def check_repair(
    repaired: Comparison, unrepaired: Comparison, rounding: float = LEAST_ROUNDING_ERROR
) -> Check:
    """Whether repairing helped, or at least did no harm beyond rounding, on held-out samples."""
    found = f"{repaired.relative_error:.3e} against {unrepaired.relative_error:.3e} without repair"
    limit = max(unrepaired.relative_error, rounding)
    return Check("repair", repaired.relative_error <= limit, found)


def check_gates(
    comparison: Comparison, *, max_error: float | None, min_agreement: float | None
) -> tuple[Check, ...]:
    """The user's own limits."""
    checks = []
    if max_error is not None:
        found = f"{comparison.relative_error:.3e}, at most {max_error:g} wanted"
        checks.append(Check("max-error", comparison.relative_error <= max_error, found))
    if min_agreement is not None:
        found = f"{comparison.top1_agreement:.3f}, at least {min_agreement:g} wanted"
        checks.append(Check("min-agreement", comparison.top1_agreement >= min_agreement, found))
    return tuple(checks)
