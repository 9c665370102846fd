"""`bench`: latency of several models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from corp_onnx import graph, present
from corp_onnx.commands.records import Answer, Progress
from corp_onnx.errors import PlanError
from corp_onnx.graph import Model
from corp_onnx.latency import race, timing_inputs
from corp_onnx.session import Runtime, open_session
from corp_onnx.shapes import usual_sequence
from corp_onnx.sizes import Sizes, input_sizes


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
