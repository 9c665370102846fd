"""`prune`: a smaller model, with evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from corp_onnx import present
from corp_onnx.blocks import Axis
from corp_onnx.commands.records import Answer, Progress, Source
from corp_onnx.data import Dataset
from corp_onnx.errors import PlanError
from corp_onnx.graph import Model
from corp_onnx.pipeline import Gates, prune
from corp_onnx.plan import DEFAULT_SHARES
from corp_onnx.preprocessing import Preprocessing
from corp_onnx.session import Runtime, open_session
from corp_onnx.sizes import Sizes
from corp_onnx.solve import Recipe


@dataclass(frozen=True, slots=True)
class Prune:
    """The main job: a smaller model, with evidence."""

    model: Path
    output: Path
    source: Source | None
    crops: int
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
            crops=self.crops,
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
