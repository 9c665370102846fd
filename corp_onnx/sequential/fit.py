"""The way along a model: each segment run dense, its blocks fitted, then run as they were cut."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from corp_onnx.blocks import Catalog
from corp_onnx.calibration.calibrate import gather
from corp_onnx.calibration.scarcity import require_enough
from corp_onnx.data.batching import Batch, samples_in
from corp_onnx.graph.model import Model
from corp_onnx.plan import Plan
from corp_onnx.sequential.emphasis import Emphasis, emphasised
from corp_onnx.sequential.fitter import Fitter, Folds
from corp_onnx.sequential.line import Line
from corp_onnx.sequential.segments import Segment
from corp_onnx.sequential.tape import Tape
from corp_onnx.session import Runtime
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import Fold, Solution


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """The folds of every cut, and those of cutting alike without repair."""

    solution: Solution
    bare: Solution
    emphases: Mapping[str, Emphasis]
    """By block, tokens that counted more than others."""


def fit_in_sequence(
    model: Model,
    catalog: Catalog,
    plan: Plan,
    parts: Sequence[Iterable[Batch]],
    recipe: Recipe,
    *,
    runtime: Runtime | None = None,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda samples: None,
    on_block: Callable[[str], None] = lambda block: None,
) -> Fitted:
    r"""Cut a model block by block, and refit every block to what the dense model has behind it.

    The model is cut open at the streams behind its blocks. Of every segment the dense part runs
    once, for the stream ``X`` behind the block. The pruned part runs on what the segments before
    it, as they were cut, have made of the same samples: once for what there is to fit, and once
    more as it was cut, for the next. Its stream is ``x + g y``, with the branch ``y = f W + b``; so
    the target of ``g y`` is ``X - x``, in which this block can undo what earlier ones got wrong, as
    far as `refit` finds that to hold on other samples.

    Blocks that share their weights with others are solved from the dense model alone, once for
    all of them.

    Source: ours; docs/adr/0008-in-sequence-against-the-dense-stream.md.

    Args:
        model: The dense model.
        catalog: Its blocks.
        plan: How wide every axis will be.
        parts: Batches of disjoint sets of samples; how much to refit is decided by how a fit to
            the others does on each. With one part nothing is refitted.
        recipe: Method and ridge.
        runtime: How models are run.
        seed: Decides which tokens count, where there are more than `fitter.TOKENS_PER_CHANNEL`.
        on_batch: Called after every batch that was read with its number of samples.
        on_block: Called with the id of every block that is done.

    Raises:
        CorpError: As `calibrate`, `solve` and `operate`.
    """
    with tempfile.TemporaryDirectory(prefix="corp_onnx.") as folder:
        dense, pruned = Tape(Path(folder) / "dense"), Tape(Path(folder) / "pruned")
        of_part: list[int] = []
        samples = 0
        for part, batches in enumerate(parts):
            for batch in batches:
                dense.write(len(of_part), batch)
                pruned.write(len(of_part), batch)
                of_part.append(part)
                size = samples_in(batch)
                samples += size
                on_batch(size)
        line = Line(model, catalog, recipe, runtime, dense, pruned, tuple(of_part), samples, seed)
        given = _solve_shared(line, plan)
        folds, bare = [], []
        segments = line.segments(plan)
        emphases = _emphases(line, segments)
        for segment in segments:
            found, unrepaired = _fit(line, segment, plan, given, emphases)
            folds += found
            bare += unrepaired
            for stream in segment.streams:
                on_block(stream.block)
    fitted = any(fold.block not in given for fold in folds)
    return Fitted(
        Solution(recipe.method, tuple(folds), in_sequence=fitted),
        Solution("none", tuple(bare)),
        emphases,
    )


def _emphases(line: Line, segments: Sequence[Segment]) -> Mapping[str, Emphasis]:
    """Tokens that count more, as two batches show that are far apart."""
    streams = [stream for segment in segments for stream in segment.streams]
    some = dict.fromkeys((0, len(line.of_part) - 1))
    last = line.block(streams[-1].block) if streams else None
    return emphasised(
        *(line.model, streams, [line.dense.read(batch) for batch in some], line.samples),
        padding=last.padding if last else None,
        runtime=line.runtime,
        seed=line.seed,
    )


def _solve_shared(line: Line, plan: Plan) -> Mapping[str, Folds]:
    """Folds of all blocks that share their weights with others, from the dense model."""
    blocks = tuple(block for block in line.catalog.blocks if block.twins)
    cuts = tuple(cut for cut in plan.cuts if cut.block in {block.id for block in blocks})
    if not cuts:
        return {}
    catalog = replace(line.catalog, blocks=blocks)
    batches = (line.dense.read(batch) for batch in range(len(line.of_part)))
    statistics = gather(
        line.model, catalog, batches, runtime=line.runtime, device=line.recipe.device
    )
    require_enough(statistics)
    found, bare = (
        solve(line.model, line.catalog, Plan(cuts), statistics, recipe)
        for recipe in (line.recipe, line.recipe.bare)
    )
    return {
        block.id: (
            [fold for fold in found.folds if fold.block == block.id],
            [fold for fold in bare.folds if fold.block == block.id],
        )
        for block in blocks
    }


def _fit(
    line: Line,
    segment: Segment,
    plan: Plan,
    given: Mapping[str, Folds],
    emphases: Mapping[str, Emphasis],
) -> Folds:
    """The folds of the blocks of a segment; afterwards both tapes are behind it."""
    part = line.part(segment)
    line.advance(line.dense, part, also=tuple(stream.tensor for stream in segment.streams))
    folds: list[Fold] = []
    bare: list[Fold] = []
    for stream in segment.streams:
        cuts = {cut.axis: cut for cut in plan.cuts if cut.block == stream.block}
        block, emphasis = line.block(stream.block), emphases.get(stream.block)
        fitter = Fitter(line, part, stream, block, folds, emphasis)
        found, unrepaired = given.get(stream.block) or fitter.fit(cuts)
        folds = [*folds, *found]
        bare += unrepaired
    if segment.outputs:
        line.advance(line.pruned, line.cut(part, folds))
    line.dense.forget(segment.later)
    line.pruned.forget(segment.later)
    return folds, bare
