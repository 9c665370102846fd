"""One cut of one block, from what was seen of it: every method, every axis."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Float64, Int, Int64

from corp_onnx.blocks import Attention, Axis, Mlp
from corp_onnx.blocks.linear import bias_of, weight_of
from corp_onnx.blocks.records import Linear, Route
from corp_onnx.calibration.moments import Moments
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.device import Device
from corp_onnx.errors import DataError
from corp_onnx.graph.model import Model
from corp_onnx.plan import Cut
from corp_onnx.solve.affine import Recovered, covariance_of, recover_mlp
from corp_onnx.solve.bilinear import pooled, recover_query_key
from corp_onnx.solve.elimination import eliminate
from corp_onnx.solve.folds import Evidence, Fold, MlpFold, QueryKeyFold, ValueOutputFold
from corp_onnx.solve.joint import Joint
from corp_onnx.solve.narrow import (
    Branch,
    narrow_mlp,
    narrow_query_key,
    truncated_query_key,
)
from corp_onnx.solve.ranking import (
    channel_energy,
    column_norms,
    highest,
    row_norms,
    score,
)
from corp_onnx.solve.recipe import Recipe
from corp_onnx.solve.rotary import (
    curve_of,
    eliminated_pairs,
    pair_grams,
    positions_of,
    recover_pairs,
    whole_pairs,
)
from corp_onnx.solve.values import Heads, narrow_values, truncated_values


@dataclass(frozen=True, slots=True, eq=False)
class Solver:
    """A model's weights, and what was seen of it."""

    nodes: Mapping[str, gs.Node]
    opset: int
    statistics: Statistics
    recipe: Recipe

    @staticmethod
    def of(model: Model, statistics: Statistics, recipe: Recipe) -> Solver:
        """With the nodes of the model by name."""
        nodes = {node.name: node for node in model.graph.nodes}
        return Solver(nodes, model.fingerprint.opset, statistics, recipe)

    def fold(self, block: Attention | Mlp, cut: Cut) -> Fold:
        """The fold of one cut."""
        if isinstance(block, Mlp):
            return self._mlp(block, cut)
        return self._query_key(block, cut) if cut.axis == "qk" else self._value_output(block, cut)

    def curve(self, block: Attention | Mlp, axis: Axis) -> Float64[np.ndarray, " w1"]:
        """Relative error of one axis after keeping 0, 1, … all of its width, by `best`.

        Of an MLP's or an attention's output, or of the logits; alone, with dense inputs.
        """
        if isinstance(block, Mlp):
            covariance = covariance_of(self._site(block, "hidden"))
            weight = self._weight(block.down)
            found = eliminate(
                self._device.asarray(covariance),
                self._device.asarray(weight),
                ridge=self._ridge,
            )
            return np.concatenate([[1.0], found.curve()[::-1]])
        if axis == "qk" and block.rotation is not None:
            _, errors = eliminated_pairs(self._pair_grams(block), ridge=self._ridge)
            return curve_of(errors)
        if axis == "qk":
            query, key = self._site(block, "query"), self._site(block, "centred_key")
            return truncated_query_key(query, key, block.key_heads, 1, device=self._device).curve
        assert block.output is not None, f"{block.id} offers its values"
        linear = block.output.linear
        weight, bias = self._weight(linear), self._bias(linear)
        own = Joint.own(self._site(block, "context"), weight, bias, device=self._device)
        branch = Branch(block.id, weight, np.ones(len(bias)))
        return truncated_values(own, branch, Heads.of(block.output), 1).curve

    def channels(self, block: Mlp, width: int, moments: Moments) -> Int[np.ndarray, " k"] | None:
        """The MLP channels that stay; None leaves that to the elimination."""
        kept = self.recipe.kept.get((block.id, "mlp"))
        if kept is not None or self.recipe.eliminates:
            return kept
        norms = [
            row_norms(self._weight(block.down)),
            *(column_norms(self._weight(src.linear))[src.channels] for src in block.sources),
        ]
        return highest(score(self.recipe.selection, channel_energy(moments), norms), width)

    def branch(self, block: str, linear: Linear, gain: Float64[np.ndarray, " o"]) -> Branch:
        """The last layer of a block, for `narrow`."""
        return Branch(block, self._weight(linear), gain)

    def _mlp(self, block: Mlp, cut: Cut) -> MlpFold:
        moments = self._site(block, "hidden")
        weight, bias = self._weight(block.down), self._bias(block.down)
        kept = self.channels(block, cut.to, moments)
        if self.recipe.method == "best":
            branch = Branch(block.id, weight, np.ones(len(bias)))
            own = Joint.own(moments, weight, bias, device=self._device)
            return narrow_mlp(
                [own], branch, cut.to, ridges=[self._ridge], kept=kept, device=self._device
            )
        assert kept is not None, "only `best` eliminates"
        found = self._recovered(moments, kept, weight, bias)
        evidence = Evidence(found.unexplained, found.condition, found.error)
        return MlpFold(block.id, kept, found.weight, found.bias, evidence)

    def _query_key(self, block: Attention, cut: Cut) -> QueryKeyFold:
        assert block.query is not None, f"{block.id} offers its queries"
        assert block.key is not None, f"{block.id} offers its keys"
        if block.rotation is not None:
            return self._rotated(block, block.rotation.pairs, cut)
        query, kept = self._site(block, "query"), self.recipe.kept.get((block.id, "qk"))
        if kept is None and self.recipe.method == "best" and self.recipe.truncate:
            centred = self._site(block, "centred_key")
            return narrow_query_key(
                block.id, query, centred, block.key_heads, cut.to, device=self._device
            )
        if kept is None:
            kept = highest(self._scores(block, block.query, block.key), cut.to)
        maps = recover_query_key(
            query,
            self._site(block, "key"),
            kept,
            key_heads=block.key_heads,
            repair=self.recipe.repair,
            ridge=self._ridge,
            device=self._device,
        )
        evidence = Evidence(maps.unexplained, maps.condition, maps.error)
        return QueryKeyFold(block.id, maps.query, maps.key, evidence)

    def _rotated(self, block: Attention, pairs: Int64[np.ndarray, "p 2"], cut: Cut) -> QueryKeyFold:
        """Whole pairs, the same in all heads: other maps do not commute with their rotation."""
        grams, count = self._pair_grams(block), cut.to // 2
        chosen = self.recipe.kept.get((block.id, "qk"))
        if chosen is not None:
            kept = whole_pairs(chosen, pairs)
        elif self.recipe.method == "best":
            order, _ = eliminated_pairs(grams, ridge=self._ridge)
            kept = np.sort(order[len(order) - count :])
        else:
            assert block.query is not None, f"{block.id} offers its queries"
            assert block.key is not None, f"{block.id} offers its keys"
            scores = self._scores(block, block.query, block.key).sum(axis=0)
            kept = highest(scores[pairs].sum(axis=1), count)
        repair, ridge = self.recipe.repair, self._ridge
        maps = recover_pairs(grams, kept, pairs, block.key_heads, repair=repair, ridge=ridge)
        evidence = Evidence(maps.unexplained, maps.condition, maps.error)
        return QueryKeyFold(block.id, maps.query, maps.key, evidence, positions_of(pairs, kept))

    def _pair_grams(self, block: Attention) -> Float64[np.ndarray, "h f f"]:
        """Of the pairs of a rotated block; ``best`` leaves out what Softmax does not notice."""
        assert block.rotation is not None, f"{block.id} is rotated"
        key = self._site(block, "centred_key" if self.recipe.method == "best" else "key")
        return pair_grams(self._site(block, "query"), key, block.key_heads, block.rotation.pairs)

    def _scores(self, block: Attention, query: Route, key: Route) -> Float64[np.ndarray, "g e"]:
        """What query-key coordinates are ranked by."""
        squares = pooled(self._head_norms(query) ** 2, block.key_heads, len(key.channels))
        norms = [np.sqrt(squares), self._head_norms(key)]
        return score(self.recipe.selection, self._energy(block), norms)

    def _value_output(self, block: Attention, cut: Cut) -> ValueOutputFold:
        assert block.output is not None, f"{block.id} offers its values"
        heads, linear = Heads.of(block.output), block.output.linear
        moments = self._site(block, "context")
        weight, bias = self._weight(linear), self._bias(linear)
        if self.recipe.method == "best" and self.recipe.truncate:
            branch = Branch(block.id, weight, np.ones(len(bias)))
            own = Joint.own(moments, weight, bias, device=self._device)
            return narrow_values(
                [own], branch, heads, cut.to, ridges=[self._ridge], device=self._device
            )
        energy = pooled(channel_energy(moments)[heads.places], heads.value_heads, heads.groups)
        norms = pooled(row_norms(weight)[heads.places] ** 2, heads.value_heads, heads.groups)
        kept = highest(score(self.recipe.selection, energy, [np.sqrt(norms)]), cut.to)
        rows = np.take_along_axis(heads.places, kept[heads.value_heads], axis=1)
        found = self._recovered(moments, rows.ravel(), weight, bias)
        select = np.swapaxes(np.eye(heads.places.shape[1])[kept], -1, -2)
        evidence = Evidence(found.unexplained, found.condition, found.error)
        layer = found.weight.reshape(*rows.shape, -1)
        return ValueOutputFold(block.id, select, layer, found.bias, evidence)

    def _recovered(
        self,
        moments: Moments,
        kept: Int[np.ndarray, " k"],
        weight: Float64[np.ndarray, "d o"],
        bias: Float64[np.ndarray, " o"],
    ) -> Recovered:
        repair, ridge = self.recipe.repair, self._ridge
        return recover_mlp(
            moments, kept, weight, bias, repair=repair, ridge=ridge, device=self._device
        )

    @property
    def _ridge(self) -> float:
        return self.recipe.ridges[0]

    @property
    def _device(self) -> Device:
        return self.recipe.device

    def _weight(self, linear: Linear) -> Float64[np.ndarray, "i o"]:
        return weight_of(dict(self.nodes), linear, self.opset)

    def _bias(self, linear: Linear) -> Float64[np.ndarray, " o"]:
        return bias_of(dict(self.nodes), linear, self.opset)

    def _head_norms(self, route: Route) -> Float64[np.ndarray, "h e"]:
        """Norm of the weights behind every coordinate of every head, as it enters the product."""
        weight = self._weight(route.linear)
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
