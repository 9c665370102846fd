"""From logits to probabilities: masks, biases of relative positions, Softmax."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from tests.random_operands import LONGEST, Operands
from tests.random_writing import Named


class Logits(Operands):
    """What is done to logits."""

    def _masked(self, logits: Named) -> Named:
        net, part = self.net, self.part
        if part.capped:
            small = net("Tanh", net("Div", logits.tensor, 3.0))
            logits = Named(net("Mul", small, 3.0), logits.axes)
        if part.bias != "none":
            bias = self._fitted(self._relative(), logits.axes)
            logits = Named(net("Add", logits.tensor, bias.tensor), logits.axes)
        if part.mask == "added":
            mask = self._fitted(self._given("added"), logits.axes)
            return Named(net("Add", logits.tensor, mask.tensor), logits.axes)
        if part.mask in {"keeps", "drops"}:
            mask = self._fitted(self._given(part.mask), logits.axes)
            options = (logits.tensor, net.const(-1e4))
            options = options if part.mask == "keeps" else options[::-1]
            return Named(net("Where", mask.tensor, *options), logits.axes)
        if part.mask == "computed":
            mask = self._fitted(self._given("seen"), logits.axes)
            gap = net("Mul", net("Sub", 1.0, net("Cast", mask.tensor, to=TensorProto.FLOAT)), -1e4)
            return Named(net("Add", gap, logits.tensor), logits.axes)
        if part.mask == "causal":
            later = self._fitted(self._places("Greater", "ut"), logits.axes)
            return Named(net("Where", later.tensor, net.const(-1e4), logits.tensor), logits.axes)
        return logits

    def _places(self, op: str, letters: str) -> Named:
        """The places of two tokens, compared."""
        net = self.net
        places = [
            net("Range", np.int64(0), net("Squeeze", net.size(letter), [0]), np.int64(1))
            for letter in letters
        ]
        columns = [
            net("Unsqueeze", y, [1 - "tu".index(letter)])
            for letter, y in zip(letters, places, strict=True)
        ]
        return Named(net(op, *columns), ("t", "u"))

    def _given(self, kind: str) -> Named:
        """A mask ``[b, u]`` that is an input."""
        tokens = "others" if self.part.cross else "tokens"
        name = f"{kind}_of_{tokens}"
        dtype = {"added": np.float32, "seen": np.int64}.get(kind, np.bool_)
        if all(value.name != name for value in self.net.inputs):
            self.net.input(name, *self.given, dtype=dtype)
        return Named(name, ("b", "u"))

    def _relative(self) -> Named:
        """A bias of every head and pair of tokens."""
        net, heads = self.net, self.part.heads
        count = net.static(heads)
        if self.part.bias == "constant":
            rows = self._rows(net.random(LONGEST, LONGEST, count, gain=1.0), "t", "u", heads)
            return Named(net("Slice", rows.tensor, [0], net.size("u"), [1]), rows.axes)
        pairs = self._places("Sub", "tu").tensor
        table = net.random(2 * LONGEST, count, gain=1.0)
        return Named(
            net("Gather", table, net("Add", pairs, np.int64(LONGEST)), axis=0), ("t", "u", heads)
        )

    def _softmax(self, logits: Named) -> Named:
        net, part = self.net, self.part
        axis, rank = logits.axis("u"), len(logits.axes)
        axis = axis if part.softmax in {"positive", "float"} else axis - rank
        if part.softmax in {"whole", "positive"}:
            return Named(net("Softmax", logits.tensor, axis=axis), logits.axes)
        given = logits.tensor
        if part.softmax == "shifted":
            given = net("Sub", given, net("ReduceMax", given, [axis], keepdims=1))
        powers = net("Exp", given)
        return Named(net("Div", powers, net("ReduceSum", powers, [axis], keepdims=1)), logits.axes)
