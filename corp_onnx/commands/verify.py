"""`verify`: how far two models are apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from corp_onnx.blocks import find_blocks
from corp_onnx.commands.records import Answer, Progress, Source
from corp_onnx.data.labels import read_labels
from corp_onnx.errors import QuantisedModel
from corp_onnx.graph.macs import Counts, count
from corp_onnx.graph.model import Model, described, load
from corp_onnx.graph.shapes import usual_facts
from corp_onnx.report.results import comparison_json, comparison_table
from corp_onnx.session import Runtime, open_session
from corp_onnx.verify.checks import Gates, check_gates
from corp_onnx.verify.comparison import NO_PADDING, comparable, compare, with_masks


@dataclass(frozen=True, slots=True)
class Verify:
    """How far two models are apart on the same inputs."""

    dense: Path
    pruned: Path
    source: Source
    labels: Path | None
    output: str | None
    gates: Gates
    runtime: Runtime

    def __call__(self, progress: Progress) -> Answer:
        """Run both and compare."""
        models = [_readable(path) for path in (self.dense, self.pruned)]
        dense, pruned = map(self._shown, models)
        padding = NO_PADDING
        if isinstance(dense, Model):
            dense, padding = with_masks(dense, find_blocks(dense).blocks)
        data = self.source.open(self.dense, open_session(models[0], self.runtime))
        labels = None if self.labels is None else read_labels(self.labels, data.filling())
        comparison = compare(
            open_session(dense, self.runtime),
            open_session(pruned, self.runtime),
            data.batches(8),
            padding=padding,
            output=self.output,
            labels=labels,
        )
        counts = [_counts(model) for model in models]
        checks = check_gates(comparison, **asdict(self.gates))
        document = comparison_json(comparison) | {
            "macs": {"dense": counts[0].total, "pruned": counts[1].total},
            "params": {"dense": counts[0].params, "pruned": counts[1].params},
            "checks": [asdict(check) for check in checks],
            "passed": all(check.passed for check in checks),
        }
        return Answer(document, comparison_table(document), 0 if document["passed"] else 1)

    def _shown(self, model: Model | Path) -> Model | Path:
        """With the one output that counts, if it is a model that can be opened there."""
        return comparable(model, self.output) if isinstance(model, Model) else model


def _readable(path: Path) -> Model | Path:
    """A model; the file itself of a quantised one, which can be run as it is."""
    try:
        return load(path)
    except QuantisedModel:
        return path


def _counts(model: Model | Path) -> Counts:
    graph = model.graph if isinstance(model, Model) else described(model)
    return count(graph, usual_facts(graph))
