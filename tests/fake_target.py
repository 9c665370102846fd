"""A target on which time is what its rules say: no machine, no noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from corp_onnx.deploy.records import Build
from corp_onnx.latency import race
from corp_onnx.session import Session, open_session


@dataclass
class Clock:
    """Time that only passes when an engine runs."""

    now_ns: int = 0
    runs: int = 0

    def install(self, monkeypatch):
        monkeypatch.setattr(race, "perf_counter_ns", lambda: self.now_ns)
        return self


@dataclass(frozen=True)
class Abacus:
    """Takes a nanosecond for every weight of a matrix product, sides rounded up to a multiple."""

    clock: Clock = field(default_factory=Clock, repr=False, compare=False)
    tile: int = 1
    fixed_ns: int = 0
    name: str = "abacus"

    def versions(self):
        return {"abacus": "1"}

    def require(self, precision):
        pass

    def sized(self, sizes):
        return self

    def rounds_by_itself(self, precision):
        return False

    def build(self, model, folder, precision):
        return Build(self.name, precision, Path(model), 0.0, 1, self.versions(), {})

    def load(self, build):
        matrices = [
            tensor.dims
            for tensor in onnx.load(build.path).graph.initializer
            if len(tensor.dims) == 2
        ]
        sides = [-(-np.array(dims) // self.tile) * self.tile for dims in matrices]
        cost = self.fixed_ns + int(sum(rows * columns for rows, columns in sides))
        return AbacusEngine(open_session(build.path), self.clock, cost)


@dataclass(frozen=True)
class AbacusEngine:
    session: Session
    clock: Clock
    cost_ns: int
    device_ms: float | None = None

    @property
    def inputs(self):
        return self.session.inputs

    @property
    def outputs(self):
        return self.session.outputs

    def run(self, feeds):
        self.clock.now_ns += self.cost_ns
        self.clock.runs += 1
        return {}

    def operator_times(self, feeds, *, runs=1):
        return {"MatMul": self.cost_ns / 1e6}

    def close(self):
        pass
