"""An engine that is a session of ONNX Runtime, whoever runs the graph."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from corp_onnx.deploy.records import PROFILED_RUNS
from corp_onnx.graph.inputs import InputSpec
from corp_onnx.session import Session


class SessionEngine:
    """A session of ONNX Runtime, whose last run on a device it remembers the time of.

    Args:
        session: That runs.
        profiled: Opens one more, which writes a profile that begins with this path; None where
            what was compiled is one node to ONNX Runtime.
        device: Where inputs and outputs are put, as ONNX Runtime names it; None for the host.

    Attributes:
        device_ms: Of the last run, with inputs and outputs on the device; None on the host.
    """

    def __init__(
        self,
        session: Session,
        profiled: Callable[[Path], Session] | None = None,
        device: str | None = None,
    ) -> None:
        self.session, self.profiled, self.device = session, profiled, device
        self.device_ms: float | None = None

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """As the session has them."""
        return self.session.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """As the session has them."""
        return self.session.outputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference."""
        if self.device is None:
            return self.session.run(feeds)
        outputs, self.device_ms = self.session.run_on(self.device, feeds)
        return outputs

    def operator_times(
        self, feeds: Mapping[str, np.ndarray], *, runs: int = PROFILED_RUNS
    ) -> Mapping[str, float]:
        """By type of operator, in a session of their own."""
        if self.profiled is None:
            return {}
        with tempfile.TemporaryDirectory(prefix="corp_onnx.") as folder:
            session = self.profiled(Path(folder) / "profile")
            for _ in range(runs):
                session.run(feeds)
            events = json.loads(session.profile().read_text(encoding="utf-8"))
        times: dict[str, float] = {}
        for event in events:
            if event.get("name", "").endswith("_kernel_time"):
                op = event["args"]["op_name"]
                times[op] = times.get(op, 0.0) + event["dur"] / 1000 / runs
        return times

    def close(self) -> None:
        """Nothing: the session goes with its last reference."""
