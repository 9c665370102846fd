"""One block at work: what flows through it, behind the blocks that are cut, and its folds."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from corp_onnx.blocks import Attention, Axis, Block, Mlp
from corp_onnx.blocks.records import linears_of
from corp_onnx.calibration.calibrate import summed
from corp_onnx.calibration.masks import seen_rows
from corp_onnx.calibration.moments import Collector, Moments
from corp_onnx.calibration.scarcity import require_enough
from corp_onnx.calibration.sites import Site, Thinning, precision_of
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.data.batching import Batch
from corp_onnx.errors import DataError
from corp_onnx.plan import Cut
from corp_onnx.sequential.emphasis import Emphasis
from corp_onnx.sequential.line import Line, Part
from corp_onnx.sequential.streams import Stream
from corp_onnx.solve import Recipe
from corp_onnx.solve.folds import Fold
from corp_onnx.solve.joint import Joint, merged
from corp_onnx.solve.narrow import narrow_mlp, narrow_output
from corp_onnx.solve.solver import Solver
from corp_onnx.solve.values import Heads, narrow_values

log = logging.getLogger(__name__)

TOKENS_PER_CHANNEL, POSITIONS_PER_CHANNEL = 48, 192
"""Of more tokens only so many, for every channel that the last layer of a block reads, count.

Positions of a map are more alike than tokens, and the few at its border differ from all others: as
few of them as of tokens, and a fit misses these.
"""

SEQUENCE_NDIM = 3
"""Axes of samples, tokens and channels; a map has more."""

Folds = tuple[list[Fold], list[Fold]]
"""Repaired, and cut alike without repair."""


@dataclass(frozen=True, slots=True, eq=False)
class Fitter:
    """One block at work: reads what flows through it, and solves its cuts."""

    line: Line
    part: Part
    stream: Stream
    block: Block
    before: Sequence[Fold]
    """Of blocks of the same segment that come before it."""
    emphasis: Emphasis | None = None
    """Tokens that count more than others."""

    def fit(self, cuts: Mapping[Axis, Cut]) -> Folds:
        """All folds of the block."""
        if isinstance(self.block, Mlp):
            return self._mlp(self.block, cuts["mlp"])
        return self._attention(self.block, cuts)

    def _mlp(self, block: Mlp, cut: Cut) -> Folds:
        joints = self._joints((), block.hidden)
        statistics = self._statistics({"hidden": merged(joints).features})
        solver = self._solver(statistics)
        kept = solver.channels(block, cut.to, merged(joints).features)
        branch = solver.branch(block.id, block.down, self.stream.gain)
        recipe = self.line.recipe
        fold = narrow_mlp(
            joints, branch, cut.to, ridges=recipe.ridges, kept=kept, device=recipe.device
        )
        return [fold], [self._solver(statistics, self.line.recipe.bare).fold(block, cut)]

    def _attention(self, block: Attention, cuts: Mapping[Axis, Cut]) -> Folds:
        """Queries and keys first: what is mixed then follows the narrower logits."""
        folds: list[Fold] = []
        bare: list[Fold] = []
        if "qk" in cuts:
            statistics = self._query_key(block)
            folds.append(self._solver(statistics).fold(block, cuts["qk"]))
            bare.append(self._solver(statistics, self.line.recipe.bare).fold(block, cuts["qk"]))
        if block.output is None:
            return folds, bare
        line, linear = self.line, block.output.linear
        joints = self._joints(folds, linear.input)
        features = merged(joints).features
        if "vo" not in cuts and features.count < features.width:
            log.warning(
                "%s is not refitted: %d tokens are fewer than its %d channels",
                *(block.id, features.count, features.width),
            )
            return folds, bare
        statistics = self._statistics({"context": features})
        solver = self._solver(statistics)
        branch = solver.branch(block.id, linear, self.stream.gain)
        if "vo" not in cuts:
            return [*folds, narrow_output(joints, branch, device=line.recipe.device)], bare
        bare.append(self._solver(statistics, self.line.recipe.bare).fold(block, cuts["vo"]))
        if not line.recipe.truncate:
            return [*folds, solver.fold(block, cuts["vo"])], bare
        heads, width = Heads.of(block.output), cuts["vo"].to
        fold = narrow_values(
            joints, branch, heads, width, ridges=line.recipe.ridges, device=line.recipe.device
        )
        return [*folds, fold], bare

    def _query_key(self, block: Attention) -> Statistics:
        """What queries and keys are, behind the blocks that are cut."""
        site = Site(block, ("qk",), device=self.line.recipe.device)
        part = self.line.cut(self.part, self._before_alone(block))
        for _, tensors in self.line.run(self.line.pruned, part, site.tensors()):
            site.add(tensors)
        return self._enough(summed([site], self.line.samples, "", self._sha256))

    def _before_alone(self, block: Attention) -> list[Fold]:
        """Folds that leave the layers of queries and keys whole: others are beside them."""
        own = set(linears_of(block))
        blocks = {other.id: other for other in self.line.catalog.blocks}
        return [fold for fold in self.before if own.isdisjoint(linears_of(blocks[fold.block]))]

    def _joints(self, folds: Sequence[Fold], features: str) -> list[Joint]:
        """What the last layer reads, with what it should add to the stream, by part of samples."""
        stream, line, linear = self.stream, self.line, self.stream.linear
        assert linear is not None, "a block whose last layer is known"
        width, parts = linear.width_in + linear.width_out, range(max(line.of_part) + 1)
        precision = precision_of(self.block)
        every, read = (
            [Collector((width,), line.recipe.device, precision) for _ in parts] for _ in range(2)
        )
        mask = [self.block.padding.tensor] if self.block.padding else []
        wanted = (features, linear.output, stream.tensor, *mask)
        part = line.cut(self.part, [*self.before, *folds])
        with self._named(features), np.errstate(over="ignore", invalid="ignore"):
            for batch, tensors in line.run(line.pruned, part, wanted):
                x = np.moveaxis(tensors[features], linear.axis, -1)
                (dense,) = line.dense.read(batch, [stream.tensor]).values()
                seen, of_part = self._seen(x, tensors), line.of_part[batch]
                rows = self._enough_of(seen, x, batch)
                every[of_part].add(self._features_and_target(x, dense, tensors, rows))
                if self.emphasis is not None:
                    rows = self.emphasis.rows(stream.last(dense).shape[:-1], seen)
                    read[of_part].add(self._features_and_target(x, dense, tensors, rows))
            return [self._joint(*sums) for sums in zip(every, read, strict=True)]

    def _features_and_target(
        self, x: np.ndarray, dense: np.ndarray, tensors: Batch, rows: np.ndarray
    ) -> np.ndarray:
        """``[f, t]`` of some tokens."""
        stream, linear = self.stream, self.stream.linear
        assert linear is not None, "a block whose last layer is known"
        features = x.reshape(-1, x.shape[-1])
        some = rows if len(rows) < len(features) else slice(None)  # a view
        before = stream.vectors(dense)[some] - stream.vectors(tensors[stream.tensor])[some]
        target = before + stream.gain * stream.vectors(tensors[linear.output])[some]
        return np.concatenate([features[some], target], axis=1, dtype=np.float32)

    def _joint(self, every: Collector, read: Collector) -> Joint:
        """Of all tokens, those that are read with more weight."""
        linear, few = self.stream.linear, read.moments()
        assert linear is not None, "a block whose last layer is known"
        whole = Joint.of(every.moments(), linear.width_in)
        if self.emphasis is None or few.count == 0:
            return whole
        return whole.mixed(Joint.of(few, linear.width_in), self.emphasis.share)

    @contextmanager
    def _named(self, features: str) -> Iterator[None]:
        """Say of an error where it was found."""
        try:
            yield
        except DataError as error:
            raise DataError(f"at {features} of {self.block.id}: {error}") from error

    def _seen(self, tokens: np.ndarray, tensors: Batch) -> np.ndarray:
        """Which tokens are no padding."""
        numbers = np.arange(int(np.prod(tokens.shape[:-1])))
        seen: np.ndarray = numbers[seen_rows(self.block.padding, tokens, tensors)]
        return seen

    def _enough_of(self, seen: np.ndarray, tokens: np.ndarray, batch: int) -> np.ndarray:
        """Of many only so many as are needed."""
        wanted = POSITIONS_PER_CHANNEL if tokens.ndim > SEQUENCE_NDIM else TOKENS_PER_CHANNEL
        enough = wanted * tokens.shape[-1] / len(self.line.of_part)
        step = max(1, int(len(seen) // enough))
        return Thinning.drawn(step, self.line.seed, batch).of(seen)

    def _statistics(self, sites: Mapping[str, Moments]) -> Statistics:
        named = {f"{self.block.id}.{role}": moments for role, moments in sites.items()}
        return self._enough(Statistics(named, {}, {}, self.line.samples, "", self._sha256))

    def _enough(self, statistics: Statistics) -> Statistics:
        require_enough(statistics)
        return statistics

    def _solver(self, statistics: Statistics, recipe: Recipe | None = None) -> Solver:
        return Solver.of(self.line.model, statistics, recipe or self.line.recipe)

    @property
    def _sha256(self) -> str:
        return self.line.model.fingerprint.sha256
