"""Closed forms: which channels to keep, and how they stand in for the others."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Float64, Int
from threadpoolctl import threadpool_limits

from corp_onnx.blocks import Attention, Catalog, Mlp
from corp_onnx.blocks.linear import bias_of, weight_of
from corp_onnx.blocks.records import Route, leader_of
from corp_onnx.errors import DataError, PlanError
from corp_onnx.graph import Model
from corp_onnx.moments import Moments
from corp_onnx.plan import Cut, Plan
from corp_onnx.solve.affine import recover_mlp
from corp_onnx.solve.bilinear import pooled, recover_query_key
from corp_onnx.solve.folds import Evidence, Fold, MlpFold, QueryKeyFold, Solution
from corp_onnx.solve.ranking import channel_energy, column_norms, highest, row_norms, score
from corp_onnx.statistics import Statistics

Method = Literal["corp", "mean", "none"]
METHODS: tuple[Method, ...] = ("corp", "mean", "none")

DEFAULT_RIDGE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """How a plan is solved.

    Attributes:
        method: The paper's repair, removed channels replaced by their mean, or no repair.
        ranking: What decides which channels stay.
        ridge: Regularisation, relative to the mean variance of a layer.
        kept: Channels to keep instead of ranking, by block and axis: ``[k]`` for an MLP,
            ``[g, r]`` for query-key.
    """

    method: Method = "corp"
    ranking: str = "energy"
    ridge: float = DEFAULT_RIDGE
    kept: Mapping[tuple[str, str], Int[np.ndarray, "..."]] = field(default_factory=dict)


def solve(
    model: Model, catalog: Catalog, plan: Plan, statistics: Statistics, recipe: Recipe
) -> Solution:
    """New weights for every cut of a plan, from the statistics of the dense model.

    Raises:
        DataError: If the statistics are of another model.
        PlanError: If the ridge is negative or not finite, or the ranking unknown.
        IllConditioned: If a system cannot be solved.
    """
    if statistics.sha256 != model.fingerprint.sha256:
        raise DataError(
            f"the statistics ({statistics.source}) were taken of another model; calibrate this one"
        )
    if not 0 <= recipe.ridge < np.inf:
        raise PlanError(f"--ridge {recipe.ridge:g} is no regularisation; it must be 0 or more")
    solver = _Solver({node.name: node for node in model.graph.nodes}, model, statistics, recipe)
    blocks = {block.id: block for block in catalog.blocks}
    with ThreadPoolExecutor(os.cpu_count()) as pool, threadpool_limits(1, user_api="blas"):
        cuts = [cut for cut in plan.cuts if cut.block == leader_of(blocks[cut.block])]
        found = pool.map(lambda cut: solver.fold(blocks[cut.block], cut), cuts)
        folds = {(cut.block, cut.axis): fold for cut, fold in zip(cuts, found, strict=True)}
    return Solution(
        recipe.method,
        tuple(
            replace(folds[leader_of(blocks[cut.block]), cut.axis], block=cut.block)
            for cut in plan.cuts
        ),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Solver:
    """The model's weights and statistics at hand."""

    nodes: Mapping[str, gs.Node]
    model: Model
    statistics: Statistics
    recipe: Recipe

    def fold(self, block: Attention | Mlp, cut: Cut) -> Fold:
        """The fold of one cut."""
        if isinstance(block, Mlp):
            return self._mlp(block, cut)
        if cut.axis == "qk":
            return self._query_key(block, cut)
        raise PlanError(f"{cut.block}: no method here cuts the axis {cut.axis!r}")

    def _mlp(self, block: Mlp, cut: Cut) -> MlpFold:
        moments = self._site(block, "hidden")
        opset = self.model.fingerprint.opset
        nodes = dict(self.nodes)
        weight, bias = weight_of(nodes, block.down, opset), bias_of(nodes, block.down, opset)
        kept = self.recipe.kept.get((block.id, "mlp"))
        if kept is None:
            norms = [row_norms(weight)]
            for source in block.sources:
                columns = column_norms(weight_of(nodes, source.linear, opset))
                norms.append(columns[source.channels])
            kept = highest(score(self.recipe.ranking, channel_energy(moments), norms), cut.to)
        found = recover_mlp(
            moments, kept, weight, bias, repair=self.recipe.method, ridge=self.recipe.ridge
        )
        evidence = Evidence(found.unexplained, found.condition, found.error)
        return MlpFold(block.id, kept, found.weight, found.bias, evidence)

    def _query_key(self, block: Attention, cut: Cut) -> QueryKeyFold:
        assert block.query is not None, f"{block.id} offers its queries"
        assert block.key is not None, f"{block.id} offers its keys"
        kept = self.recipe.kept.get((block.id, "qk"))
        if kept is None:
            groups = len(block.key.channels)
            squares = pooled(self._head_norms(block.query) ** 2, block.key_heads, groups)
            norms = [np.sqrt(squares), self._head_norms(block.key)]
            energy = self._energy(block)
            kept = highest(score(self.recipe.ranking, energy, norms), cut.to)
        maps = recover_query_key(
            self._site(block, "query"),
            self._site(block, "key"),
            kept,
            key_heads=block.key_heads,
            repair=self.recipe.method,
            ridge=self.recipe.ridge,
        )
        evidence = Evidence(maps.unexplained, maps.condition, maps.error)
        return QueryKeyFold(block.id, maps.query, maps.key, evidence)

    def _head_norms(self, route: Route) -> Float64[np.ndarray, "h e"]:
        """Norm of the weights behind every coordinate of every head, as it enters the product."""
        weight = weight_of(dict(self.nodes), route.linear, self.model.fingerprint.opset)
        norms: np.ndarray = column_norms(weight)[route.channels] * np.abs(route.gain)
        return norms

    def _energy(self, block: Attention) -> Float64[np.ndarray, "g e"]:
        """The query-key energy, over all blocks of the same weights."""
        names = block.twins or (block.id,)
        tokens = [self.statistics.tokens[name] for name in names]
        energies = [self.statistics.energies[name] for name in names]
        mean: np.ndarray = np.average(energies, axis=0, weights=tokens)
        return mean

    def _site(self, block: Attention | Mlp, role: str) -> Moments:
        """What was seen at a block, and at all others of the same weights."""
        parts = []
        for name in (f"{twin}.{role}" for twin in block.twins or (block.id,)):
            if name not in self.statistics.sites:
                raise DataError(
                    f"the statistics ({self.statistics.source}) hold nothing of {name}; calibrate "
                    "again"
                )
            parts.append(self.statistics.sites[name])
        return reduce(operator.add, parts)
