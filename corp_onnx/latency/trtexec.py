"""Times that `trtexec` measured elsewhere, as on a Jetson where nothing else is installed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from corp_onnx.errors import DataError

LATENCY, COMPUTE, STARTED = "latencyMs", "computeMs", "startComputeMs"
"""Keys of one inference: all of it with its copies, its kernels alone, and when these began."""


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """Times of the inferences of one engine, in milliseconds, in their order.

    Attributes:
        latency_ms: From host to host: copies of inputs, kernels, copies of outputs.
        device_ms: The kernels alone.
    """

    latency_ms: Float64[np.ndarray, " n"]
    device_ms: Float64[np.ndarray, " n"]


def read_times(path: Path, *, after_ms: float = 0.0) -> Times:
    """What ``trtexec --exportTimes=FILE`` wrote: a list with one object for every inference.

    `trtexec` of TensorRT 10 and later leaves its warm-up out of the file.

    Args:
        path: The file.
        after_ms: Inferences that began earlier do not count: the warm-up, where it is in the file.

    Raises:
        DataError: If it is another file, or holds no inference that counts.
    """
    rows = [row for row in _rows(path) if row[STARTED] >= after_ms]
    if not rows:
        raise DataError(f"{path} holds no inference after {after_ms:g} ms; let trtexec run longer")
    latency, compute = (np.array([row[key] for row in rows]) for key in (LATENCY, COMPUTE))
    for found in (latency, compute):
        if not (np.isfinite(found) & (found > 0)).all():
            raise DataError(f"{path} holds times that are no numbers above 0; measure again")
    latency.flags.writeable = compute.flags.writeable = False
    return Times(latency, compute)


def _rows(path: Path) -> list[dict[str, float]]:
    try:
        document = json.loads(path.read_text())
        return [_row(entry) for entry in document]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} is not what `trtexec --exportTimes=FILE` writes, a list of inferences with "
            f"{LATENCY} and {COMPUTE}: {error!r}"
        ) from error


def _row(entry: Any) -> dict[str, float]:  # noqa: ANN401 (anything may be in a file)
    return {key: float(entry[key]) for key in (LATENCY, COMPUTE, STARTED)}
