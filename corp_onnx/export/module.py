"""A torch module that takes tensors by position and returns tensors by position."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.errors import GraphError
from corp_onnx.export.backend import FAILURES, first_line, package

MASK = "attention_mask"
"""What an input is called that says which tokens count, ``[b, t]``: 1 does, 0 is padding."""


@dataclass(frozen=True, slots=True, eq=False)
class Sourced:
    """A torch module as its source gave it.

    Attributes:
        module: The module.
        examples: One tensor per input, by name, all with the same batch first.
        by_name: Whether it takes its inputs by name, not by position.
        recipe: How pictures become its input, where that is known.
    """

    module: Any
    examples: Mapping[str, Any]
    by_name: bool = False
    recipe: Preprocessing | None = None

    def __call__(self, *inputs: object) -> object:
        """What the module returns for its inputs in the order of the examples."""
        if self.by_name:
            return self.module(**dict(zip(self.examples, inputs, strict=True)))
        return self.module(*inputs)


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """A torch module in float32 and evaluation mode, ready to be traced.

    Attributes:
        module: Takes the inputs by position; returns a tensor, or a tuple of them.
        examples: One tensor per input, by name, all with the same batch first.
        outputs: Names of what it returns, in order.
        recipe: How pictures become its input, where that is known.
    """

    module: Any
    examples: Mapping[str, Any]
    outputs: tuple[str, ...]
    recipe: Preprocessing | None

    @property
    def batch(self) -> int:
        """The batch size of the examples."""
        return min(len(example) for example in self.examples.values())

    @property
    def lengths(self) -> dict[int, str]:
        """What the lengths of sequences are called: ``sequence``, and each that differs anew."""
        found = dict.fromkeys(len(e[0]) for e in self.examples.values() if is_tokens(e))
        return {
            length: f"sequence_{place}" if place > 1 else "sequence"
            for place, length in enumerate(found, start=1)
        }

    @property
    def is_variadic(self) -> bool:
        """Whether the module takes ``*inputs``: exporters then count them as one."""
        parameters = inspect.signature(self.module.forward).parameters.values()
        return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)

    def inputs(self, batch: int, *, is_reversed: bool = True) -> dict[str, Any]:
        """Unlike the examples: rows used again up to a batch, one token fewer.

        Reversed, other tokens are at every place, and padding is on the other side.
        """
        return {
            name: _varied(example, batch, is_reversed=is_reversed)
            for name, example in self.examples.items()
        }

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Output arrays by name.

        Raises:
            GraphError: If the module does not run on inputs of this batch and length.
        """
        try:
            with package("torch").no_grad():
                result = self.module(*inputs.values())
        except FAILURES as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise GraphError(
                f"the module cannot be run on inputs of another batch and length ({shapes}): "
                f"{first_line(error)}; inputs of whole numbers [b, t] must be free to get shorter"
            ) from error
        tensors = result if isinstance(result, tuple) else (result,)
        return {name: t.numpy() for name, t in zip(self.outputs, tensors, strict=True)}

    def counted(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Which rows ``[b, t]`` of an output say anything, by its name.

        Those of tokens that `MASK` hides do not. A causal model that is given padding first leaves
        them nothing to attend to; what then comes out is up to the kernel, and nobody reads it.
        """
        if MASK not in self.examples or not is_tokens(self.examples[MASK]):
            return {}
        longer, mask = self.run(self.examples), inputs[MASK].numpy().astype(bool)
        return {
            name: mask
            for name, value in self.run(inputs).items()
            if value.shape[:2] == mask.shape and longer[name].shape[:2] == self.examples[MASK].shape
        }


def is_tokens(example: Any) -> bool:  # noqa: ANN401 (a tensor)
    """Whether an input is a batch of sequences of whole numbers, ``[b, t]``."""
    return bool(example.ndim == 2 and not example.is_floating_point())


def positional(source: str, sourced: Sourced) -> Module:
    """A sourced module in the one form that is traced.

    Raises:
        GraphError: If it cannot be run on its examples, or returns no tensors.
    """
    torch = package("torch")
    sourced.module.float().eval()
    examples = {name: _example(tensor) for name, tensor in sourced.examples.items()}
    try:
        with torch.no_grad():
            result = sourced(*examples.values())
    except FAILURES as error:
        raise GraphError(
            f"the module of {source} cannot be run on its example inputs "
            f"({', '.join(examples)}): {first_line(error)}"
        ) from error
    tensors = _tensors(result)
    if not tensors:
        raise GraphError(f"the module of {source} returns {type(result).__name__}, not tensors")
    plain = isinstance(result, torch.Tensor) or (
        type(result) is tuple and len(tensors) == len(result)
    )
    module = sourced.module if plain and not sourced.by_name else _flat(sourced)
    return Module(module, examples, tuple(tensors), sourced.recipe)


def _example(given: Any) -> Any:  # noqa: ANN401 (tensors)
    """An example input in float32, with a batch that no exporter takes for a constant."""
    single = given.float() if given.is_floating_point() else given
    return single if len(single) > 1 else package("torch").cat([single, single])


def _varied(example: Any, batch: int, *, is_reversed: bool) -> Any:  # noqa: ANN401 (tensors)
    rows = package("torch").arange(batch) % len(example)
    shorter = example[:, : max(2, example.shape[1] - 1)] if is_tokens(example) else example
    return shorter[rows].flip(-1) if is_reversed else shorter[rows]


def _flat(sourced: Sourced) -> Any:  # noqa: ANN401 (a torch module)
    """Around a module: returns its tensors, and nothing else, as a tuple."""

    class Flat(package("torch").nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = sourced.module

        def forward(self, *inputs: object) -> tuple[Any, ...]:
            return tuple(_tensors(sourced(*inputs)).values())

    return Flat().eval()


def _tensors(result: object) -> dict[str, Any]:
    """The tensors that a module returned, by name; caches and the like are left out."""
    kind = package("torch").Tensor
    if isinstance(result, kind):
        return {"output": result}
    if isinstance(result, Mapping):
        return {str(name): value for name, value in result.items() if isinstance(value, kind)}
    if isinstance(result, tuple | list):
        return {f"output_{i}": value for i, value in enumerate(result) if isinstance(value, kind)}
    return {}
