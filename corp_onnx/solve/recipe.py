"""How a plan is solved: method, ranking, regularisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Int

from corp_onnx.device import HOST, Device
from corp_onnx.errors import PlanError
from corp_onnx.solve.affine import Repair
from corp_onnx.solve.ranking import RANKINGS

Method = Literal["best", "corp", "mean", "none"]
METHODS: tuple[Method, ...] = ("best", "corp", "mean", "none")

DEFAULT_RIDGE = 1e-3

RIDGES: tuple[float, ...] = (DEFAULT_RIDGE, 1e-2, 1e-1, 3e-1)
"""Of these each layer takes its own, by samples held out, unless one is asked for."""

ELIMINATION = "elimination"
"""The ranking of ``best``: channels go one by one, the one that repair replaces best first."""


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """How a plan is solved.

    Attributes:
        method: ``best``; the paper's repair; removed channels replaced by their mean; or none.
        ranking: What decides which MLP channels stay, and which coordinates where a method selects
            these; None for what the method has by default.
        ridge: Regularisation, relative to the mean variance of a layer; None lets every layer
            that is fitted in sequence choose its own.
        refit: Whether ``best`` goes block by block and fits each to the dense stream, where there
            are data to run.
        truncate: Whether ``best`` truncates queries, keys and values, rather than select.
        kept: Channels to keep instead of ranking, by block and axis: ``[k]`` for an MLP,
            ``[g, r]`` for query-key.
        device: Where it is computed, and where what is fitted in sequence is summed.
    """

    method: Method = "best"
    ranking: str | None = None
    ridge: float | None = None
    refit: bool = True
    truncate: bool = True
    kept: Mapping[tuple[str, str], Int[np.ndarray, "..."]] = field(default_factory=dict)
    device: Device = HOST

    def __post_init__(self) -> None:
        if self.ridge is not None and not 0 <= self.ridge < np.inf:
            raise PlanError(f"--ridge {self.ridge:g} is no regularisation; it must be 0 or more")
        if self.ranking not in {None, ELIMINATION, *RANKINGS}:
            raise PlanError(
                f"no ranking is called {self.ranking!r}; choose one of {', '.join(RANKINGS)}, "
                f"{ELIMINATION}"
            )
        if self.ranking == ELIMINATION and self.method != "best":
            raise PlanError(
                f"--ranking {ELIMINATION} belongs to --method best; {self.method} selects by "
                "energy or energy-norm"
            )

    @property
    def ridges(self) -> tuple[float, ...]:
        """Those to choose from by samples held out; the first where there are none."""
        return RIDGES if self.ridge is None else (self.ridge,)

    @property
    def repair(self) -> Repair:
        """How what is selected is repaired."""
        return "corp" if self.method == "best" else self.method

    @property
    def bare(self) -> Recipe:
        """The same cuts without repair."""
        return Recipe("none", device=self.device)

    @property
    def selection(self) -> str:
        """The ranking by which coordinates are selected."""
        return "energy" if self.ranking in {None, ELIMINATION} else str(self.ranking)

    @property
    def goes_in_sequence(self) -> bool:
        """Whether blocks are fitted one behind the other, which takes data to run."""
        return self.method == "best" and self.refit

    @property
    def eliminates(self) -> bool:
        """Whether MLP channels are eliminated one by one."""
        return self.method == "best" and self.ranking in {None, ELIMINATION}
