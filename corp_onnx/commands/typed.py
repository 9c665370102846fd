"""Models in the types of a precision, for verbs that make them run somewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from corp_onnx.commands.records import Source
from corp_onnx.deploy.records import Precision, Target
from corp_onnx.deploy.targets import BY_ITSELF, SYMMETRIC
from corp_onnx.errors import PlanError, QuantisedModel
from corp_onnx.graph import Model, load
from corp_onnx.latency import timing_inputs
from corp_onnx.precision import Request, in_precision, stored_type
from corp_onnx.session import open_session
from corp_onnx.shapes import usual_sequence
from corp_onnx.sizes import Sizes, input_sizes
from corp_onnx.statistics import Batch

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
    """

    source: Source | None
    only_timed: bool = False
    sizes: Sizes = field(default_factory=dict)

    def typed(self, model: Path, target: Target, precision: Precision) -> Model | Path:
        """The model to build; as it is where nothing is to be done.

        That is so for engines that are built, for models that are in 16 bits or quantised already,
        and where the target rounds by itself.

        Raises:
            CorpError: As `in_precision`, and `open_data`.
            PlanError: If there are no inputs, and the result is for more than timing.
        """
        if precision == "fp32" or model.is_dir() or precision in BY_ITSELF.get(target.name, ()):
            return model
        try:
            wide = load(model)
        except QuantisedModel:
            return model
        if stored_type(wide) != np.float32:
            return model
        if self.source is None and not self.only_timed:
            raise PlanError(
                f"{model} is in float32; {precision} takes inputs for its ranges and to check the "
                "result on: give --data"
            )
        seen, held_out = self._batches(model, wide)
        limit = None if self.source else float("inf")
        request = Request(precision, symmetric=target.name in SYMMETRIC, limit=limit)
        return in_precision(wide, request, seen, held_out).model

    def _batches(self, path: Path, model: Model) -> tuple[Sequence[Batch], Sequence[Batch]]:
        session = open_session(model)
        if self.source is None:
            sequence = usual_sequence(model.graph, self.sizes)
            sizes = input_sizes(model.graph, sequence=sequence, given=self.sizes)
            drawn = [timing_inputs(session.inputs, sizes, seed=seed) for seed in (0, 1)]
            return drawn[:1], drawn[1:]
        data = self.source.open(path, session)
        chosen = np.random.default_rng(self.source.seed).permutation(data.samples)
        batches = list(data.take(chosen[: 2 * BATCH * BATCHES]).batches(BATCH))
        return batches[::2], batches[1::2]
