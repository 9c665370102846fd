"""Models in the types of a precision, for verbs that make them run somewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corp_onnx.commands.records import Source
from corp_onnx.data.batching import Batch
from corp_onnx.data.samples import drawn
from corp_onnx.deploy.records import Precision, Target
from corp_onnx.deploy.targets import SYMMETRIC
from corp_onnx.errors import PlanError, QuantisedModel
from corp_onnx.graph.model import Model, load
from corp_onnx.graph.shapes import usual_sequence
from corp_onnx.graph.sizes import Sizes, input_sizes
from corp_onnx.latency.race import timing_inputs
from corp_onnx.precision import STORED, Request, in_precision, stored_type
from corp_onnx.session import Runtime, open_session

BATCH, BATCHES = 8, 2
"""Of inputs for ranges, and as many to check the result on."""


@dataclass(frozen=True, slots=True)
class Typist:
    """Brings float32 models into the precision that a target is asked for.

    Attributes:
        source: Inputs to take ranges from and to check the result on.
        only_timed: Whether inputs may be drawn where there is no source. What is made from these
            is not checked.
        sizes: Dimensions of drawn inputs that are not to be guessed.
        runtime: How models are run for ranges and for the check.
    """

    source: Source | None
    only_timed: bool = False
    sizes: Sizes = field(default_factory=dict)
    runtime: Runtime | None = None

    def typed(self, model: Path, target: Target, precision: Precision) -> Model | Path:
        """The model to build; as it is where nothing is to be done.

        That is so for engines that are built, for models that have the types already, and where
        the target rounds by itself. Asked for fp32, a model keeps the types that it has.

        Raises:
            CorpError: As `in_precision`, and `open_data`.
            PlanError: If the model has other types than float32 and those asked for, or there are
                no inputs, and the result is for more than timing.
        """
        if precision == "fp32" or model.is_dir() or target.rounds_by_itself(precision):
            return model
        try:
            wide = load(model)
        except QuantisedModel:
            if precision == "int8":
                return model
            raise
        if STORED.get(stored_type(wide).name) == precision:
            return model
        if self.source is None and not self.only_timed:
            raise PlanError(
                f"{model} is in float32; {precision} takes inputs for its ranges and to check the "
                "result on: give --data"
            )
        seen, held_out = self._batches(model, wide)
        limit = None if self.source else float("inf")
        request = Request(precision, symmetric=target.name in SYMMETRIC, limit=limit)
        return in_precision(wide, request, seen, held_out, runtime=self.runtime).model

    def _batches(self, path: Path, model: Model) -> tuple[Sequence[Batch], Sequence[Batch]]:
        session = open_session(model, self.runtime)
        if self.source is None:
            known = {tensor.name for tensor in model.graph.inputs}  # others are another model's
            given = {name: shape for name, shape in self.sizes.items() if name in known}
            sequence = usual_sequence(model.graph, given)
            sizes = input_sizes(model.graph, sequence=sequence, given=given)
            made = [timing_inputs(session.inputs, sizes, seed=seed) for seed in (0, 1)]
            return made[:1], made[1:]
        data = self.source.open(path, session)
        some = drawn(data, 2 * max(BATCH * BATCHES, data.fixed_batch or 1), self.source.seed)
        seen, held_out = some.split(0.5, self.source.seed)
        return list(seen.batches(BATCH)), list(held_out.batches(BATCH))
