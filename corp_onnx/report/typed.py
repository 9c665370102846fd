"""What was done to the types of a model, as JSON and as lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from corp_onnx.precision import Typed
from corp_onnx.precision.check import BEFORE
from corp_onnx.verify.checks import Check
from corp_onnx.work import DENSE

MOST_REASONS = 6
"""Lines on what stayed in float32; the JSON document has all of it."""


def typed_json(typed: Typed, checks: Sequence[Check]) -> dict[str, Any]:
    """The ``precision`` section of ``prune --json``."""
    before = typed.against[BEFORE]
    return {
        "asked": typed.request.precision,
        "weight_only": typed.request.weight_only,
        "limit": typed.request.most_error,
        "error": before.relative_error,
        "errors": dict(before.relative_errors),
        "top1_agreement": before.top1_agreement,
        "error_against_dense": typed.against[DENSE].relative_error,
        "top1_agreement_with_dense": typed.against[DENSE].top1_agreement,
        "samples": before.samples,
        "computed": typed.computed,
        "calibrated_on": typed.draft.samples,
        "bytes": dict(zip(("before", "after"), typed.size_bytes, strict=True)),
        "fused_norms": typed.draft.fused,
        "quantised_layers": typed.draft.quantised,
        "kept": [asdict(kept) for kept in typed.draft.kept],
        "checks": [asdict(check) for check in checks],
        "notes": list(typed.draft.notes),
    }


def typed_lines(typed: Typed) -> list[str]:
    """The same in words, at the end of what ``prune`` prints."""
    before, after = typed.size_bytes
    against = typed.against
    changed = f"{before / 1e6:.2f} → {after / 1e6:.2f} MB ({after / before:.0%})"
    done = f", {typed.draft.quantised} layers quantised" if typed.draft.quantised else ""
    fused = f", {typed.draft.fused} written-out norms fused" if typed.draft.fused else ""
    return [
        f"{typed.request.name}: {changed}{done}{fused}",
        f"relative error {against[BEFORE].relative_error:.3g} from the pruned model in fp32 "
        f"(limit {typed.request.most_error:g}), {against[DENSE].relative_error:.4g} from the dense",
        f"computed {typed.computed}",
        *_reasons(typed),
        *typed.draft.notes,
    ]


def _reasons(typed: Typed) -> list[str]:
    """What stayed in float32, by operator and reason, the commonest first."""
    counts = Counter((kept.op, kept.reason) for kept in typed.draft.kept).most_common()
    lines = [f"in fp32: {count} {op}: {reason}" for (op, reason), count in counts[:MOST_REASONS]]
    left = sum(count for _, count in counts[MOST_REASONS:])
    return [*lines, f"in fp32: {left} more nodes (--json names all)"] if left else lines
