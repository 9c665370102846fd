"""A model run plainly on a few samples: ``python -m benchmarks.plain MODEL DATA SAMPLES``."""

from __future__ import annotations

import sys
from pathlib import Path

from corp_onnx.calibration.calibrate import BATCH_SIZE
from corp_onnx.commands import Source
from corp_onnx.session import open_session


def run(model: Path, data: str, samples: int) -> None:
    """Read the samples, run the model, drop what it says."""
    session = open_session(model)
    for batch in Source(data, samples, 0, False).open(model, session).batches(BATCH_SIZE):
        session.run(batch)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
