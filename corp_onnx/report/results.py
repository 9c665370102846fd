"""Records as JSON documents (a contract: other programs read them) and as tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from corp_onnx.allocation.deadline import DeadlineOutcome
from corp_onnx.blocks import Attention, Block, Catalog, Mlp, axes_of
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.data.batching import samples_in
from corp_onnx.pipeline import Pruned
from corp_onnx.report.advice import advice, uncounted
from corp_onnx.report.page import Json, table_of
from corp_onnx.report.typed import typed_json, typed_lines
from corp_onnx.solve.folds import OutputFold
from corp_onnx.verify.checks import Check
from corp_onnx.verify.comparison import Comparison

ONE_SHOT = "solved in one shot: every block from statistics of the dense model"


def catalog_json(catalog: Catalog, notes: Sequence[str] = ()) -> Json:
    """What ``inspect --json`` prints."""
    return {
        "blocks": [
            _block_json(block) | {"macs": catalog.macs_by_block[block.id]}
            for block in catalog.blocks
        ],
        "refusals": [asdict(refusal) for refusal in catalog.refusals],
        "shapes": {name: list(shape) for name, shape in catalog.sizes.items()},
        "macs": catalog.macs,
        "params": catalog.params,
        "macs_prunable": catalog.macs_prunable,
        "notes": [*notes, *uncounted(catalog.uncounted)],
    }


def catalog_table(catalog: Catalog, notes: Sequence[str] = ()) -> RenderableType:
    """What ``inspect`` prints."""
    table = table_of(
        "block", "MACs", "width", "heads", "head width", "value width", "prunable", "refused"
    )
    for block in catalog.blocks:
        entry = _block_json(block)
        table.add_row(
            entry["id"],
            f"{catalog.macs_by_block[block.id] / max(catalog.macs, 1):.1%}",
            *(str(entry[key] or "") for key in ("width", "heads", "head_width", "value_width")),
            " ".join(entry["prunable"]) or "-",
            "; ".join(f"{axis}: {reason}" for axis, reason in entry["refused"].items()),
        )
    parts: list[RenderableType] = [table]
    if catalog.refusals:
        refused = table_of("not in a block", "operator", "reason")
        for refusal in catalog.refusals:
            refused.add_row(refusal.node, refusal.op, refusal.reason)
        parts.append(refused)
    share = catalog.macs_prunable / catalog.macs if catalog.macs else 0.0
    sizes = ", ".join(f"{name} {list(shape)}" for name, shape in catalog.sizes.items())
    parts.append(
        Text(
            f"{catalog.macs / 1e9:.3f} G MACs at {sizes}, {share:.0%} of them in blocks "
            f"that can be cut; {catalog.params / 1e6:.2f} M parameters"
        )
    )
    return Group(*parts, *map(Text, [*notes, *uncounted(catalog.uncounted)]))


def statistics_json(statistics: Statistics, output: str) -> Json:
    """What ``calibrate --json`` and ``merge --json`` print."""
    return {
        "samples": statistics.samples,
        "crops": math.ceil(statistics.crops),
        "source": statistics.source,
        "sha256": statistics.sha256,
        "tokens": {name: moments.count for name, moments in statistics.sites.items()},
        "held_out": sum(map(samples_in, statistics.held_out)),
        "output": output,
    }


def statistics_text(document: Mapping[str, Any]) -> RenderableType:
    """What ``calibrate`` and ``merge`` print."""
    tokens, crops = document["tokens"].values(), document["crops"]
    each = f", {crops} crops of every picture" if crops > 1 else ""
    return Text(
        f"{document['samples']} samples of {document['source']}{each}: {min(tokens)} tokens or "
        f"more at each of {len(tokens)} sites; {document['held_out']} samples held out\n"
        f"written to {document['output']}"
    )


def pruned_json(result: Pruned, output: str) -> Json:
    """What ``prune --json`` prints."""
    cuts: dict[str, Json] = {}
    for cut in result.plan.cuts:
        evidence = result.solved.solution.of(cut.block, cut.axis).evidence
        cuts.setdefault(cut.block, {})[cut.axis] = {
            "from": cut.width,
            "to": cut.to,
            "unexplained": evidence.unexplained,
            "condition": evidence.condition,
            "error": evidence.error,
            "unseen": evidence.unseen,
        }
    outputs = {
        fold.block: {"error": fold.evidence.error, "unseen": fold.evidence.unseen}
        for fold in result.solved.solution.folds
        if isinstance(fold, OutputFold)
    }
    return {
        "method": result.solved.solution.method,
        "one_shot": not result.solved.solution.in_sequence,
        "blocks": [
            {"id": block, "cuts": entry, "output": outputs.get(block)}
            for block, entry in cuts.items()
        ],
        "uncut": [
            {"block": block.id, "axis": axis, "reason": reason}
            for block in result.catalog.blocks
            for axis, reason in block.refused.items()
        ],
        "macs": {"dense": result.surgery.dense.total, "pruned": result.surgery.pruned.total},
        "params": {"dense": result.surgery.dense.params, "pruned": result.surgery.pruned.params},
        "samples": result.solved.samples,
        "crops": math.ceil(result.solved.crops),
        "source": result.solved.source,
        "seconds": dict(result.seconds),
        "checks": [asdict(check) for check in result.verification.checks],
        "held_out": comparison_json(result.verification.comparison),
        "precision": result.typed and typed_json(result.typed, result.typed_checks),
        "passed": result.passed,
        "notes": _notes(result),
        "advice": list(advice(result.solved.solution, result.solved.samples)),
        "output": output,
    } | ({} if result.deadline is None else {"latency": latency_json(result.deadline)})


def _notes(result: Pruned) -> list[str]:
    return [*result.surgery.model.notes, *uncounted(result.surgery.dense.uncounted)]


def latency_json(outcome: DeadlineOutcome) -> Json:
    """How a deadline was kept."""
    deadline = outcome.schedule.deadline
    dense, cut = outcome.race.latencies
    return {
        "target": deadline.target.name,
        "batch": deadline.stopwatch.batch,
        "asked": {"limit": deadline.limit, "unit": "ms" if deadline.in_ms else "share of dense"},
        "dense_ms": dense.median_ms,
        "pruned_ms": cut.median_ms,
        "share": outcome.share,
        "speedup": asdict(outcome.race.speedups[1]),
        "tries": [asdict(tried) for tried in outcome.schedule.tries],
    }


def pruned_table(result: Pruned, output: str) -> RenderableType:
    """What ``prune`` prints."""
    before, after = result.surgery.dense, result.surgery.pruned
    spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    typed = [
        replace(check, name=f"{check.name}, {result.typed.request.name}")
        for check in result.typed_checks
        if result.typed
    ]
    return Group(
        _folds_table(result),
        checks_table((*result.verification.checks, *typed)),
        Text(
            f"{_change('MACs', before.total, after.total, 1e9, 'G')}; "
            f"{_change('parameters', before.params, after.params, 1e6, 'M')}"
        ),
        Text(f"held-out relative error {result.verification.comparison.relative_error:.4g}"),
        *([] if result.solved.solution.in_sequence else [Text(ONE_SHOT)]),
        *map(Text, typed_lines(result.typed) if result.typed else ()),
        Text(spent),
        *map(Text, _notes(result)),
        *map(Text, advice(result.solved.solution, result.solved.samples)),
        Text(f"written to {output}"),
    )


def _folds_table(result: Pruned) -> Table:
    """Every cut, and every output projection that was only fitted."""
    table = table_of("block", "axis", "from", "to", "unexplained", "error", "unseen", "condition")
    widths: dict[tuple[str, str], tuple[int, int]] = {
        (cut.block, cut.axis): (cut.width, cut.to) for cut in result.plan.cuts
    }
    for fold in result.solved.solution.folds:
        found = fold.evidence
        errors = [f"{each:.4f}" for each in (found.error, found.unseen) if each is not None]
        if fold.axis is None:
            table.add_row(fold.block, "output", "", "", "", *errors)
            continue
        cut = map(str, widths[fold.block, fold.axis])
        shown = (*errors, "")[:2]
        condition = f"{found.condition:.1e}"
        table.add_row(fold.block, fold.axis, *cut, f"{found.unexplained:.3f}", *shown, condition)
    return table


def comparison_json(comparison: Comparison) -> Json:
    """The comparison part of ``verify --json``."""
    document: Json = {
        "relative_error": comparison.relative_error,
        "relative_errors": dict(comparison.relative_errors),
        "cosine": comparison.cosine,
        "top1_agreement": comparison.top1_agreement,
        "output": comparison.output,
        "samples": comparison.samples,
    }
    if comparison.top1 is not None:
        document["top1"] = dict(comparison.top1)
    return document


def comparison_table(document: Mapping[str, Any]) -> RenderableType:
    """What ``verify`` prints."""
    table = table_of("", "value")
    table.add_row("samples", str(document["samples"]))
    table.add_row("relative error, all outputs compared", f"{document['relative_error']:.4g}")
    for name, error in document["relative_errors"].items():
        table.add_row(f"relative error of {name}", f"{error:.4g}")
    table.add_row(f"cosine of {document['output']}", f"{document['cosine']:.5f}")
    table.add_row(f"top-1 agreement of {document['output']}", f"{document['top1_agreement']:.4f}")
    for name, value in document.get("top1", {}).items():
        table.add_row(f"top-1 {name}", f"{value:.4f}")
    for key, scale, unit in (("macs", 1e9, "G"), ("params", 1e6, "M")):
        pair = document[key]
        table.add_row(key, _change("", pair["dense"], pair["pruned"], scale, unit))
    checks = [Check(**check) for check in document["checks"]]
    return Group(table, checks_table(checks)) if checks else table


def checks_table(checks: Iterable[Check]) -> Table:
    """Checks with what was found."""
    table = table_of("check", "", "found")
    for check in checks:
        table.add_row(check.name, "passed" if check.passed else "FAILED", check.found)
    return table


def _block_json(block: Block) -> Json:
    entry: Json = {
        "id": block.id,
        "kind": "mlp" if isinstance(block, Mlp) else "attention",
        "width": block.width,
        "heads": None,
        "kv_heads": None,
        "head_width": None,
        "value_width": None,
        "prunable": list(axes_of(block)),
        "refused": dict(block.refused),
    }
    if isinstance(block, Attention):
        entry |= {
            "heads": block.heads,
            "kv_heads": block.kv_heads,
            "head_width": block.head_width,
            "value_width": block.value_width,
        }
    return entry


def _change(what: str, before: int, after: int, scale: float, unit: str) -> str:
    share = after / before if before else 1.0
    return f"{what} {before / scale:.3f} → {after / scale:.3f} {unit} ({share:.0%})".strip()
