"""How far two models are apart on the same inputs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import numpy as np
from jaxtyping import Float64

from corp_onnx.blocks import Block
from corp_onnx.blocks.padding import Padding, padding_of
from corp_onnx.calibration.masks import seen_rows
from corp_onnx.data.batching import Batch, samples_in
from corp_onnx.errors import DataError, PlanError, VerificationError
from corp_onnx.graph.extracts import exposed
from corp_onnx.graph.facts import element_type
from corp_onnx.graph.model import Model
from corp_onnx.session import Session

Paddings = Mapping[str, Padding]
"""What is padding, by output."""

NO_PADDING: Paddings = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far the outputs of two models are apart on the same inputs.

    ``relative_error`` is ``Σ‖y - ŷ‖² / Σ‖y‖²``, per output and over all of them; ``cosine`` the
    mean cosine between the output vectors of the compared output; ``top1_agreement`` how often
    their largest entry is the same; ``top1`` accuracy, where labels were given. Rows that are
    padding, where the model says which are, do not count.
    """

    samples: int
    output: str
    relative_error: float
    relative_errors: Mapping[str, float]
    cosine: float
    top1_agreement: float
    top1: Mapping[str, float] | None = None


class Reference(Protocol):
    """What others are compared with."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what it gives."""

    def run(self, feeds: Batch, /) -> dict[str, np.ndarray]:
        """All of it, for one batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Remembered:
    """A model that is run once on every batch, however often that comes again."""

    session: Session
    _found: dict[int, tuple[Batch, dict[str, np.ndarray]]] = field(default_factory=dict)
    """With the batches themselves, so that no other can take the identity of one."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Those of the model."""
        return self.session.outputs

    def run(self, feeds: Batch, /) -> dict[str, np.ndarray]:
        """What the model gave for this very batch."""
        if id(feeds) not in self._found:
            self._found[id(feeds)] = feeds, self.session.run(feeds)
        return self._found[id(feeds)][1]


def with_masks(model: Model, blocks: Sequence[Block]) -> tuple[Model, Paddings]:
    """A model that shows, beside its outputs, what of these is padding."""
    padding = padding_of(model.graph, blocks)
    outputs = [tensor.name for tensor in model.graph.outputs]
    masks = [each.mask.tensor for each in padding.values()]
    return exposed(model, list(dict.fromkeys([*outputs, *masks]))), padding


def require_judged(model: Model) -> None:
    """Fail before the work where no output tells how far a smaller model is from this one.

    Raises:
        PlanError: If all outputs are whole numbers, such as the classes that are chosen.
    """
    types = [str(element_type(tensor)) for tensor in model.graph.outputs]
    if not any("float" in kind or kind == "None" for kind in types):
        names = ", ".join(tensor.name for tensor in model.graph.outputs)
        raise PlanError(
            f"none of the outputs {names} holds floating-point numbers, by which a smaller model "
            "is judged: export the model with its logits among the outputs"
        )


def compare(
    dense: Reference,
    pruned: Session,
    batches: Iterable[Batch],
    *,
    padding: Paddings = NO_PADDING,
    output: str | None = None,
    labels: Sequence[int] | None = None,
) -> Comparison:
    """Run both models on the same batches and compare their floating-point outputs.

    Args:
        dense: The reference.
        pruned: The model to judge.
        batches: Inputs.
        padding: Which rows of outputs do not count; what says so is among what the reference gives.
        output: The output that cosine, agreement and accuracy are of, and the only one that the
            overall error counts; by default all count, and the first one is taken.
        labels: The class of every sample, in order.

    Raises:
        DataError: If there are no samples, or the dense model's outputs are not finite.
        PlanError: If the models have no floating-point output of that name in common.
    """
    (comparison,) = compare_each(
        dense, [pruned], batches, padding=padding, output=output, labels=labels
    )
    return comparison


def compare_each(
    dense: Reference,
    candidates: Sequence[Session],
    batches: Iterable[Batch],
    *,
    padding: Paddings = NO_PADDING,
    output: str | None = None,
    labels: Sequence[int] | None = None,
) -> tuple[Comparison, ...]:
    """What `compare` says of every candidate; the dense model runs once."""
    names = [_compared(dense, pruned, output) for pruned in candidates]
    sums = [{name: _OutputSum() for name in common} for common in names]
    samples = 0
    for batch in batches:
        before = dense.run(batch)
        for pruned, common, totals in zip(candidates, names, sums, strict=True):
            for name, after in pruned.run(batch, common).items():
                hidden = _hidden(padding.get(name), name, before)
                totals[name].add(name, before[name], after, hidden)
        samples += samples_in(batch)
    if not samples:
        raise DataError("the data holds no samples to compare on")
    return tuple(_comparison(totals, samples, output, labels) for totals in sums)


def _comparison(
    sums: Mapping[str, _OutputSum],
    samples: int,
    output: str | None,
    labels: Sequence[int] | None,
) -> Comparison:
    """Sums over all batches as a record."""
    floating = {name: total for name, total in sums.items() if total.rows}
    if not floating:
        raise PlanError(f"none of the outputs {', '.join(sums)} holds floating-point numbers")
    main = output or next(iter(floating))
    lost = sum(total.lost for total in floating.values())
    energy = sum(total.energy for total in floating.values())
    return Comparison(
        samples,
        main,
        _ratio(lost, energy),
        {name: _ratio(total.lost, total.energy) for name, total in floating.items()},
        floating[main].cosine / floating[main].rows,
        floating[main].agreed / floating[main].rows,
        None if labels is None else floating[main].accuracy(labels),
    )


def comparable(model: Model, output: str | None) -> Model:
    """The model with one tensor, which may be internal, as its only output.

    Raises:
        PlanError: If there is no tensor of that name.
    """
    if output is None:
        return model
    tensors = model.graph.tensors()
    if output not in tensors:
        close = difflib.get_close_matches(output, tensors, n=3)
        hint = f"; close to it are {', '.join(close)}" if close else ""
        raise PlanError(f"the model has no tensor {output!r}{hint}")
    return exposed(model, [output])


@dataclass(slots=True)
class _OutputSum:
    """Sums over the batches of one output."""

    lost: float = 0.0
    energy: float = 0.0
    rows: int = 0
    cosine: float = 0.0
    agreed: int = 0
    chosen: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(
        self, name: str, before: np.ndarray, after: np.ndarray, hidden: np.ndarray | None
    ) -> None:
        """Add one batch, but for rows or numbers that are hidden; whole numbers do not count."""
        if before.dtype.kind != "f" and before.dtype.name != "bfloat16":
            return
        if before.shape != after.shape:
            raise VerificationError(
                f"output {name!r} has shape {before.shape} in the dense model and {after.shape} in "
                "the other"
            )
        width = before.shape[-1] if before.ndim else 1
        y, z = (array.reshape(-1, width).astype(np.float64) for array in (before, after))
        ranked = y, z
        if hidden is not None and hidden.size == len(y):
            y, z = ranked = y[~hidden], z[~hidden]
        elif hidden is not None:
            places = hidden.reshape(y.shape)
            ranked = np.where(places, -np.inf, y), np.where(places, -np.inf, z)
            y, z = np.where(places, 0.0, y), np.where(places, 0.0, z)
        if not np.isfinite(y).all():
            raise DataError(f"output {name!r} of the dense model holds NaN or infinity")
        self.lost += float(np.square(y - z).sum())
        self.energy += float(np.square(y).sum())
        self.rows += len(y)
        self.cosine += float(_cosines(y, z).sum())
        best = ranked[0].argmax(axis=1), ranked[1].argmax(axis=1)
        self.agreed += int((best[0] == best[1]).sum())
        self.chosen.append(best)

    def accuracy(self, labels: Sequence[int]) -> dict[str, float]:
        """Share of samples whose largest entry is at the label, before and after."""
        truth = np.asarray(labels)
        if len(truth) != self.rows:
            raise DataError(
                f"there are {len(truth)} labels for {self.rows} output vectors; give one label per "
                "sample, and name an output with one vector per sample (--output)"
            )
        dense, pruned = (np.concatenate(part) for part in zip(*self.chosen, strict=True))
        return {"dense": float((dense == truth).mean()), "pruned": float((pruned == truth).mean())}


def _hidden(padding: Padding | None, name: str, tensors: Batch) -> np.ndarray | None:
    """Which rows of an output, or which of its numbers, are padding; None where nothing is."""
    if padding is None:
        return None
    tokens = tensors[name][..., None] if padding.by_number else tensors[name]
    hidden = np.ones(int(np.prod(tokens.shape[:-1])), bool)
    hidden[seen_rows(padding.mask, tokens, tensors)] = False
    return hidden if hidden.any() else None


def _compared(dense: Reference, pruned: Session, output: str | None) -> list[str]:
    common = [name for name in dense.outputs if name in pruned.outputs]
    if output is not None:
        common = [name for name in common if name == output]
    if not common:
        raise PlanError(
            f"the models have no output {output or 'name'!r} in common: {', '.join(dense.outputs)} "
            f"and {', '.join(pruned.outputs)}"
        )
    return common


def _cosines(y: Float64[np.ndarray, "n d"], z: Float64[np.ndarray, "n d"]) -> np.ndarray:
    """Row by row; 1 where both are zero, 0 where one of them is."""
    norms = np.linalg.norm(y, axis=1), np.linalg.norm(z, axis=1)
    product, equal = norms[0] * norms[1], norms[0] == norms[1]
    cosines: np.ndarray = equal.astype(float)
    np.divide((y * z).sum(axis=1), product, out=cosines, where=product != 0)
    return cosines


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("inf" if part else 0)
