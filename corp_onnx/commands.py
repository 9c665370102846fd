"""Every command as a record of its arguments; calling it does the work and gives the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from corp_onnx import graph, present
from corp_onnx.blocks import Axis, find_blocks
from corp_onnx.calibrate import calibrate
from corp_onnx.data import Dataset, open_data
from corp_onnx.errors import PlanError
from corp_onnx.export import export
from corp_onnx.graph import Model
from corp_onnx.labels import read_labels
from corp_onnx.latency import race, timing_inputs
from corp_onnx.macs import Counts, count
from corp_onnx.pipeline import Gates, prune
from corp_onnx.plan import DEFAULT_SHARES
from corp_onnx.preprocessing import Preprocessing
from corp_onnx.session import Runtime, Session, open_session
from corp_onnx.shapes import usual_facts, usual_sequence
from corp_onnx.sizes import Sizes, input_sizes
from corp_onnx.solve import Recipe
from corp_onnx.statistics import Statistics, merged
from corp_onnx.verify import check_gates, comparable, compare

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command gives back: a JSON document, the same for people, and an exit status."""

    document: dict[str, Any]
    table: RenderableType
    status: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """Where inputs come from and how many are taken."""

    data: str
    samples: int | None = None
    seed: int = 0
    allow_random: bool = False

    def open(self, model_path: Path, session: Session) -> Dataset:
        """The samples, fitted to a model's inputs, preprocessed as the file beside it says."""
        return open_data(
            self.data,
            session.inputs,
            preprocessing=Preprocessing.beside(model_path),
            samples=self.samples,
            seed=self.seed,
            allow_random=self.allow_random,
        )


@dataclass(frozen=True, slots=True)
class Inspect:
    """Blocks, refusals, and where the MACs are."""

    model: Path
    sizes: Sizes

    def __call__(self, progress: Progress) -> Answer:
        """Look; nothing is run."""
        catalog = find_blocks(graph.load(self.model), self.sizes)
        return Answer(present.catalog_json(catalog), present.catalog_table(catalog))


@dataclass(frozen=True, slots=True)
class Calibrate:
    """Statistics, once, for every later question."""

    model: Path
    output: Path
    source: Source
    shard: tuple[int, int]
    sizes: Sizes
    runtime: Runtime

    def __call__(self, progress: Progress) -> Answer:
        """Run the model on the shard's samples and write what was found."""
        graph.require_writable(self.output)
        model = graph.load(self.model)
        catalog = find_blocks(model, self.sizes)
        data = self.source.open(self.model, open_session(self.model, self.runtime))
        index, parts = self.shard
        order = np.random.default_rng(self.source.seed).permutation(data.samples)
        shard = data if parts == 1 else data.take(np.sort(order[index::parts]))
        statistics = calibrate(
            model,
            catalog,
            shard,
            runtime=self.runtime,
            seed=self.source.seed,
            on_batch=progress,
        )
        statistics.save(self.output)
        return _statistics_answer(statistics, self.output)


@dataclass(frozen=True, slots=True)
class Merge:
    """Statistics of several runs together."""

    files: tuple[Path, ...]
    output: Path

    def __call__(self, progress: Progress) -> Answer:
        """Add them up."""
        graph.require_writable(self.output)
        statistics = merged(Statistics.load(path) for path in self.files)
        statistics.save(self.output)
        return _statistics_answer(statistics, self.output)


@dataclass(frozen=True, slots=True)
class Prune:
    """The main job: a smaller model, with evidence."""

    model: Path
    output: Path
    source: Source | None
    stats: Path | None
    shares_removed: dict[Axis, float]
    align: int
    recipe: Recipe
    gates: Gates
    sizes: Sizes
    runtime: Runtime

    def __call__(self, progress: Progress) -> Answer:
        """Cut, repair, verify, write."""
        knowledge: Callable[[Model], Dataset] | Path
        source = self.source
        if self.stats is not None:
            knowledge = self.stats
        elif source is not None:

            def knowledge(model: Model) -> Dataset:
                return source.open(self.model, open_session(self.model, self.runtime))
        else:
            raise PlanError(
                "prune needs --data (inputs to calibrate on) or --stats (a file of them)"
            )
        result = prune(
            self.model,
            self.output,
            knowledge,
            shares_removed=self.shares_removed or DEFAULT_SHARES,
            align=self.align,
            recipe=self.recipe,
            gates=self.gates,
            sizes=self.sizes,
            runtime=self.runtime,
            seed=0 if source is None else source.seed,
            on_batch=progress,
        )
        sidecar = Preprocessing.beside(self.model)
        if sidecar is not None:
            sidecar.save_beside(self.output)
        elif self.output != self.model:
            Preprocessing.path_beside(self.output).unlink(missing_ok=True)  # of another model
        return Answer(
            present.pruned_json(result, str(self.output)),
            present.pruned_table(result, str(self.output)),
            0 if result.verification.passed else 1,
        )


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
        models = [graph.load(path) for path in (self.dense, self.pruned)]
        sessions = [open_session(comparable(model, self.output), self.runtime) for model in models]
        data = self.source.open(self.dense, open_session(self.dense, self.runtime))
        labels = None if self.labels is None else read_labels(self.labels, data)
        comparison = compare(
            sessions[0], sessions[1], data.batches(8), output=self.output, labels=labels
        )
        counts = [_counts(model) for model in models]
        checks = check_gates(comparison, **asdict(self.gates))
        document = present.comparison_json(comparison) | {
            "macs": {"dense": counts[0].total, "pruned": counts[1].total},
            "params": {"dense": counts[0].params, "pruned": counts[1].params},
            "checks": [asdict(check) for check in checks],
            "passed": all(check.passed for check in checks),
        }
        return Answer(document, present.comparison_table(document), 0 if document["passed"] else 1)


@dataclass(frozen=True, slots=True)
class Bench:
    """Latency of several models, measured turn by turn."""

    models: tuple[Path, ...]
    batch: int
    warmup: int
    runs: int
    sizes: Sizes
    seed: int
    runtime: Runtime

    def __call__(self, progress: Progress) -> Answer:
        """Open all, run them in turn."""
        models = [graph.load(path) for path in self.models]
        known = {tensor.name for model in models for tensor in model.graph.inputs}
        if not self.sizes.keys() <= known:
            unknown = ", ".join(sorted(self.sizes.keys() - known))
            raise PlanError(
                f"--shapes names {unknown}, but the inputs are {', '.join(sorted(known))}"
            )
        engines = [
            _engine(path, model, self) for path, model in zip(self.models, models, strict=True)
        ]
        result = race(engines, warmup=self.warmup, runs=self.runs, seed=self.seed)
        document = present.race_json(
            result,
            [str(path) for path in self.models],
            target="ort-cpu",
            precision="fp32",
            batch=self.batch,
        )
        return Answer(document, present.race_table(document))


@dataclass(frozen=True, slots=True)
class Export:
    """An ONNX file from a timm or transformers model, or from a script."""

    source: str
    output: Path
    checkpoint: Path | None
    random_weights: bool
    exporter: str
    opset: int | None

    def __call__(self, progress: Progress) -> Answer:
        """Export, check parity, write the preprocessing beside it."""
        record = export(
            self.source,
            self.output,
            checkpoint=self.checkpoint,
            random_weights=self.random_weights,
            exporter=self.exporter,
            opset=self.opset,
        )
        document = {key: _plain(value) for key, value in asdict(record).items()}
        lines = "\n".join(f"{key}: {value}" for key, value in document.items())
        return Answer(document, Text(lines))


def _engine(path: Path, model: Model, bench: Bench) -> Callable[[], object]:
    """One inference of a model on inputs made for timing."""
    known = {tensor.name for tensor in model.graph.inputs}
    given = {name: shape for name, shape in bench.sizes.items() if name in known}
    sizes = input_sizes(
        model.graph, batch=bench.batch, sequence=usual_sequence(model.graph), given=given
    )
    session = open_session(path, replace(bench.runtime, spinning=False))
    feeds = timing_inputs(session.inputs, sizes, seed=bench.seed)
    return lambda: session.run(feeds)


def _counts(model: Model) -> Counts:
    return count(model.graph, usual_facts(model.graph))


def _statistics_answer(statistics: Statistics, output: Path) -> Answer:
    document = present.statistics_json(statistics, str(output))
    return Answer(document, present.statistics_text(document))


def _plain(value: Any) -> Any:  # noqa: ANN401 (whatever a record holds)
    return str(value) if isinstance(value, Path) else value
