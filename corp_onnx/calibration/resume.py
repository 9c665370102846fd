"""A long calibration that may be interrupted: what is summed so far, kept in a file beside."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from corp_onnx.calibration.statistics import Statistics
from corp_onnx.errors import DataError

SECONDS_BETWEEN_SAVES = 30.0


class Partial:
    """The unfinished statistics of one request, saved now and then."""

    __slots__ = ("_request", "_saved", "_seconds", "path")

    def __init__(self, path: Path, request: str, seconds: float = SECONDS_BETWEEN_SAVES) -> None:
        """Nothing is read or written yet.

        Args:
            path: Where the statistics are kept until the calibration is done.
            request: Data, seed and share of the data, in words: only a run that asks for the same
                goes on from the file.
            seconds: At least so many pass between two saves.
        """
        self.path = path
        self._request = request
        self._seconds = seconds
        self._saved = time.monotonic()

    def load(self, sha256: str) -> Statistics | None:
        """What an interrupted run has left behind; None if there is nothing.

        Raises:
            DataError: If it was left by another request, or by one for another model.
        """
        if not self.path.exists():
            return None
        found = Statistics.load(self.path)
        if (found.source, found.sha256) != (self._request, sha256):
            changed = "another model" if found.source == self._request else found.source
            raise DataError(
                f"{self.path} was left by an interrupted calibration with {changed}, not with "
                f"{self._request}; ask for the same again, or delete the file to start anew"
            )
        return found

    def keep(self, statistics: Callable[[], Statistics]) -> None:
        """Save the statistics so far, unless that was done a moment ago."""
        if time.monotonic() - self._saved >= self._seconds:
            replace(statistics(), source=self._request).save(self.path)
            self._saved = time.monotonic()

    def remove(self) -> None:
        """The calibration is done; nothing is left to go on from."""
        self.path.unlink(missing_ok=True)
