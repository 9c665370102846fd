"""The whole story on one screen: from a model and some inputs to a smaller model with evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path

from corp_onnx.allocation.budget import Budget
from corp_onnx.allocation.deadline import Deadline
from corp_onnx.blocks import Axis
from corp_onnx.data.dataset import Dataset
from corp_onnx.files import require_writable
from corp_onnx.graph.model import Model, files_of, save
from corp_onnx.plan import DEFAULT_SHARES, uniform, warn_of_uncut
from corp_onnx.work import Knowledge, Pruned, Settings, Work

__all__ = ["Pruned", "Settings", "prune", "sweep"]


def prune(
    path: Path,
    output: Path,
    knowledge: Knowledge,
    *,
    shares_removed: Mapping[Axis, float] = DEFAULT_SHARES,
    budget: Budget | Deadline | None = None,
    settings: Settings | None = None,
) -> Pruned:
    """Cut a model and write the result to ``output``.

    Args:
        path: The dense ONNX file.
        output: Where the smaller one goes; it appears whole or not at all.
        knowledge: Opens calibration data for the model, or the file of earlier statistics.
        shares_removed: By axis, the share of its width to remove, the same in every block.
        budget: What may stay of the whole, or how long it may take, instead of shares: widths
            are then chosen by block.
        settings: How models are cut.

    Raises:
        CorpError: Whatever is wrong with the model, the data or the request.
    """
    statistics = [knowledge] if isinstance(knowledge, Path) else []
    require_writable(output, chain(files_of(path), statistics))
    work = Work.begun(path, settings or Settings())
    if budget is None:
        align = work.settings.align
        uniform(work.catalog, shares_removed, align=align)  # fails before data are read, if it must
        work = work.informed(knowledge)
        plan = uniform(work.catalog, shares_removed, align=align)
        warn_of_uncut(plan, shares_removed, align=align)
        result = work.cut(plan)
    elif isinstance(budget, Budget):
        work = work.informed(knowledge).calibrated()
        result = work.cut(work.within(budget, work.probed()))
        result = result.held_to(budget.check(result.surgery))
    else:
        budget.require(work.model.graph, work.settings.request.precision)
        result = work.informed(knowledge).calibrated().in_time(path, budget)
    result = work.typed(result)
    with work.clock.stage("save"):
        save(result.model, output)
    return result


def sweep(
    path: Path,
    outputs: Mapping[Path, Budget],
    knowledge: Callable[[Model], Dataset],
    *,
    settings: Settings | None = None,
) -> Mapping[Path, Pruned]:
    """Cut a model to several budgets, from one calibration, and write all results.

    Returns:
        By file. A budget that cannot be kept is missing, and a warning says why.

    Raises:
        CorpError: As `prune`; of budgets only if none can be kept.
    """
    for output in outputs:
        require_writable(output, files_of(path))
    work = Work.begun(path, settings or Settings()).informed(knowledge).calibrated()
    results = {}
    for output, plan in work.plans(outputs).items():
        result = work.cut(plan)
        result = work.typed(result.held_to(outputs[output].check(result.surgery)))
        save(result.model, output)
        results[output] = result
    return results
