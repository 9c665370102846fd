"""`calibrate` and `merge`: statistics, once, for every later question."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from corp_onnx.blocks import find_blocks
from corp_onnx.calibration.calibrate import calibrate
from corp_onnx.calibration.resume import Partial
from corp_onnx.calibration.statistics import Statistics, merged
from corp_onnx.commands.records import Answer, Progress, Source
from corp_onnx.device import HOST, Device
from corp_onnx.files import require_writable
from corp_onnx.graph.model import files_of, load
from corp_onnx.graph.sizes import Sizes
from corp_onnx.report.results import statistics_json, statistics_text
from corp_onnx.session import Runtime, open_session


@dataclass(frozen=True, slots=True)
class Calibrate:
    """Statistics, once, for every later question."""

    model: Path
    output: Path
    source: Source
    crops: int | None
    shard: tuple[int, int]
    resume: bool
    sizes: Sizes
    rotary: bool
    runtime: Runtime
    device: Device = HOST

    def __call__(self, progress: Progress) -> Answer:
        """Run the model on the shard's samples and write what was found."""
        require_writable(self.output, chain(self.source.files(), files_of(self.model)))
        model = load(self.model)
        catalog = find_blocks(model, self.sizes, rotary=self.rotary)
        data = self.source.open(self.model, open_session(model, self.runtime))
        index, parts = self.shard
        order = np.random.default_rng(self.source.seed).permutation(data.samples)
        shard = data if parts == 1 else data.take(np.sort(order[index::parts]))
        partial = self._partial() if self.resume else None
        statistics = calibrate(
            model,
            catalog,
            shard,
            runtime=self.runtime,
            seed=self.source.seed,
            crops=self.crops,
            partial=partial,
            device=self.device,
            on_batch=progress,
        )
        statistics.save(self.output)
        if partial is not None:
            partial.remove()
        return _statistics_answer(statistics, self.output)

    def _partial(self) -> Partial:
        """Where a calibration for this very request is kept while it is unfinished."""
        source = self.source
        request = (
            f"--data {source.data} --samples {source.samples} --seed {source.seed} "
            f"--crops {self.crops or 'auto'} --shard {self.shard[0]}/{self.shard[1]}"
            f"{' --rotary' if self.rotary else ''}"
        )
        return Partial(self.output.with_name(f"{self.output.name}.partial"), request)


@dataclass(frozen=True, slots=True)
class Merge:
    """Statistics of several runs together."""

    files: tuple[Path, ...]
    output: Path

    def __call__(self, progress: Progress) -> Answer:
        """Add them up."""
        require_writable(self.output)
        statistics = merged(Statistics.load(path) for path in self.files)
        statistics.save(self.output)
        return _statistics_answer(statistics, self.output)


def _statistics_answer(statistics: Statistics, output: Path) -> Answer:
    document = statistics_json(statistics, str(output))
    return Answer(document, statistics_text(document))
