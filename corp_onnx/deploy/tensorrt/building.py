"""The builder in a process of its own: a crash of it is an error, and its log stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from corp_onnx import errors
from corp_onnx.deploy.records import LOG
from corp_onnx.deploy.tensorrt.options import Options

CHILD = "corp_onnx.deploy.tensorrt.child"
TAIL = 20

EXCEPTION = 1
"""Exit status of Python after an exception."""


def build_apart(model: Path, folder: Path, options: Options) -> Mapping[str, str]:
    """Build an engine into a folder, with a log; returns versions by name.

    Raises:
        BackendUnavailable: If TensorRT or a GPU is missing.
        GraphError: If TensorRT cannot take the model, or the process failed or crashed.
        PlanError: If the options do not fit the model.
    """
    request = {
        "model": str(model.resolve()),
        "folder": str(folder.resolve()),
        "options": options.document(),
    }
    with tempfile.TemporaryDirectory(prefix="corp_onnx.") as scratch:
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request))
        status = _run(path, folder / LOG)
        outcome = path.with_name("outcome.json")
        if status != 0 or not outcome.exists():
            raise _crash(status, folder / LOG)
        document = json.loads(outcome.read_text())
    if "error" in document:
        raise getattr(errors, document["error"])(document["message"])
    versions: Mapping[str, str] = document["versions"]
    return versions


def _run(request: Path, log: Path) -> int:
    """The child finds the modules that this process finds, and no others (``-P``)."""
    places = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
    with log.open("wb") as output:
        return subprocess.run(
            [sys.executable, "-P", "-m", CHILD, str(request)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": places},
            check=False,
        ).returncode


def _crash(status: int, log: Path) -> errors.GraphError:
    """A signal or an abort is TensorRT's; status 1 is an exception of Python that got out."""
    lines = log.read_text(errors="replace").splitlines()
    said = "\n  ".join(lines[-TAIL:]) or "nothing"
    return errors.GraphError(
        f"TensorRT's builder {_name(status)}; it said last:\n  {said}\nAll of it is in "
        f"{log.name}, where the engine was to be. {_remedy(status)}"
    )


def _name(status: int) -> str:
    if status == EXCEPTION:
        return "failed"
    return f"crashed ({_signal(status)})"


def _signal(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _remedy(status: int) -> str:
    if status == EXCEPTION:
        return "If the last line is no fault of this machine, report it, with the log."
    if status == -getattr(signal, "SIGKILL", 9):
        return "The system most likely ran out of memory: free some, or allow a smaller workspace."
    return "Build with a lower optimisation level, or with another version of TensorRT."
