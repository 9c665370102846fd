"""One input of a model, or what a source of samples offers for one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Name, dtype and shape of an input.

    The first axis of ``shape`` counts samples; None is a dynamic axis.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def of_its_width(self, array: Shaped[np.ndarray, "b ..."]) -> Shaped[np.ndarray, "b ..."]:
        """Floating-point numbers as wide as the input has them; all else as it is."""
        floats = array.dtype.kind == self.dtype.kind == "f"
        return array.astype(self.dtype, copy=False) if floats else array
