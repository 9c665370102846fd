"""Attention written in a random way."""

from __future__ import annotations

from tests.random_choices import ROLES
from tests.random_logits import Logits
from tests.random_projections import Projections
from tests.random_writing import Axes, Layer, Named, entered, left, linear, linear_by_axes


class AttentionWriter(Projections, Logits):
    """Writes one attention into a graph."""

    def write(self, x: str) -> str:
        """The tensor ``[b, t, d]`` behind the output projection of an attention to ``x``."""
        own = self._entry(Named(x, ("b", "t", "d")), "entry")
        other = self._entry(Named("other", ("b", "u", "d")), "entry") if self.part.cross else own
        query, key, value = self._operands(own, other)
        self.query = query
        if self.part.operator == "none":
            logits = self._masked(self._scaled(self._logits(query, key), "logits"))
            weights = self._passed(self._softmax(self._passed(logits, "logits")), "probabilities")
            mixed = self._mixed(weights, value)
        else:
            mixed = self._attended(query, key, value)
        return self._output(self._gated(self._passed(mixed, "mixed"), x))

    def _attended(self, query: Named, key: Named, value: Named) -> Named:
        """By the operator of opset 23, which shares heads by itself."""
        net, part, heads = self.net, self.part, self.part.heads
        attrs = {"scale": 0.3} if any(scale.place == "logits" for scale in part.scales) else {}
        attrs |= {"softcap": 3.0} if part.capped else {}
        mask = [] if part.mask == "none" else [self._whole_mask()]
        given = [query, key, value]
        if part.operator == "four":
            made = net("Attention", *(y.tensor for y in given), *mask, **attrs)
            return Named(made, ("b", heads, "t", "v"))
        flat = []
        for y in given:
            outer, lead, token, letter = y.axes
            turned = net.turned(y, (outer, token, lead, letter))
            flat.append(net.reshaped(turned, (outer, token, lead + letter), part.targets))
        attrs |= {"q_num_heads": net.static(heads), "kv_num_heads": part.groups}
        made = net("Attention", *(y.tensor for y in flat), *mask, **attrs)
        return net.reshaped(Named(made, ("b", "t", heads + "v")), ("b", "t", heads, "v"), "zeros")

    def _whole_mask(self) -> str:
        """A mask for every pair of tokens."""
        net, kind = self.net, "added" if self.part.mask == "added" else "keeps"
        mask = net.placed(self._given(kind), ("b", "h", "t", "u"))
        sizes = net("Concat", net.size("b"), [1], net.size("t"), net.size("u"), axis=0)
        return net("Expand", mask.tensor, sizes)

    def _entry(self, x: Named, place: str) -> Named:
        batch, tokens, channels = x.axes
        axes = (tokens, batch, channels) if self.part.tokens_first else x.axes
        return self._passed(self.net.turned(x, axes), place)

    def _operands(self, own: Named, other: Named) -> tuple[Named, Named, Named]:
        part = self.part
        if part.packing == "qkv":
            made = self._packed(own, ROLES)
        elif part.packing == "kv":
            made = [self._alone(own, "query"), *self._packed(other, ROLES[1:])]
        else:
            made = [self._alone(own if role == "query" else other, role) for role in ROLES]
        made[1:] = [y.renamed(t="u") for y in made[1:]]
        made = [self._operand(y, role) for y, role in zip(made, ROLES, strict=True)]
        if part.seen == "cache":
            self.outputs += made[1:]
        if part.seen == "query":
            self.outputs.append(self._summed(made[0]))
        return made[0], made[1], made[2]

    def _logits(self, query: Named, key: Named) -> Named:
        net, part = self.net, self.part
        rows, columns = ("u", "t") if part.keys_left else ("t", "u")
        if part.einsum and part.form != "five":
            left, right = (key, query) if part.keys_left else (query, key)
            equation = (
                f"{self._sum(left)},{self._sum(right)}->{self._sum_of((*self.lead, rows, columns))}"
            )
            return Named(
                net("Einsum", left.tensor, right.tensor, equation=equation),
                (*self.lead, rows, columns),
            )
        first, second = (key, query) if part.keys_left else (query, key)
        lead = second.axes[:-2]
        if part.key_turned == "chain" and len(lead) == 2:
            axes = (lead[0], columns, lead[1], "e")
            second = net.turned(net.turned(second, axes), (*lead, "e", columns))
        else:
            second = net.turned(second, (*lead, "e", columns))
        return Named(net("MatMul", first.tensor, second.tensor), (*self.lead, rows, columns))

    def _sum(self, y: Named) -> str:
        return self._sum_of(y.axes)

    def _sum_of(self, axes: Axes) -> str:
        """One letter for every axis."""
        return "".join(
            {"b" + self.part.heads: "z", self.part.heads: "h"}.get(group, group) for group in axes
        )

    def _mixed(self, weights: Named, value: Named) -> Named:
        net, part = self.net, self.part
        if part.einsum and part.form != "five":
            axes = (*self.lead, "t", "v")
            equation = f"{self._sum(weights)},{self._sum(value)}->{self._sum_of(axes)}"
            return Named(net("Einsum", weights.tensor, value.tensor, equation=equation), axes)
        if part.keys_left:
            lead = value.axes[:-2]
            turned = net.turned(value, (*lead, "v", "u"))
            return Named(net("MatMul", turned.tensor, weights.tensor), (*self.lead, "v", "t"))
        return Named(net("MatMul", weights.tensor, value.tensor), (*self.lead, "t", "v"))

    def _gated(self, mixed: Named, x: str) -> Named:
        net, part, heads = self.net, self.part, self.part.heads
        if part.gate == "none":
            return mixed
        if part.gate == "constant":
            gate = Named(net.const(net.random(net.static(heads), gain=1.0)), (heads,))
        else:
            columns = heads if part.gate == "head" else heads + "v"
            y = linear(net, Named(x, ("b", "t", "d")), Layer(), columns)
            gate = Named(net("Sigmoid", y.tensor), y.axes)
            if part.gate == "channel":
                gate = net.reshaped(gate, ("b", "t", heads, "v"), "zeros")
        gate = self._fitted(gate, mixed.axes)
        return Named(net("Mul", mixed.tensor, gate.tensor), mixed.axes)

    def _output(self, mixed: Named) -> str:
        net, part, heads = self.net, self.part, self.part.heads
        outer = ("t", "b") if part.tokens_first else ("b", "t")
        if part.summed:
            y = self._by_heads(mixed)
            y = linear_by_axes(net, y, part.output, ("d",), (heads, "v"))
            return self._finished(net.turned(y, ("b", "t", "d")))
        if part.early and part.form == "flat" and part.tokens_first and not part.head_major:
            y = net.turned(mixed, ("t", "b" + heads, "v"))
            y = net.reshaped(y, ("t", "b", heads + "v"), part.targets)
        else:
            y = self._by_heads(mixed)
            inner = ("v", heads) if part.head_major else (heads, "v")
            y = net.turned(y, (*outer, *inner))
            y = net.reshaped(y, (*outer, "".join(inner)), part.targets)
        y = self._passed(y, "merged")
        columns = y.axes[-1]
        y = linear(net, entered(net, y, part.output.kind, "computed"), part.output, "d", columns)
        y = left(net, y, (*outer, "d"), "computed")
        return self._finished(net.turned(y, ("b", "t", "d")))

    def _finished(self, y: Named) -> str:
        net, part = self.net, self.part
        return net("Mul", y.tensor, net.random(net.sizes["d"])) if part.layer_scale else y.tensor

    def _by_heads(self, mixed: Named) -> Named:
        """Mixed values with samples and heads on axes of their own."""
        net, part, heads = self.net, self.part, self.part.heads
        last = mixed.axes[-2:]
        if part.form == "single":
            return Named(net("Unsqueeze", mixed.tensor, [1]), ("b", heads, *last))
        if part.form == "flat":
            return net.reshaped(mixed, ("b", heads, *last), part.targets)
        if part.form == "five":
            return net.reshaped(mixed, ("b", heads, *last), part.targets)
        return mixed
