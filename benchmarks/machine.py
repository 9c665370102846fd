"""Where a measurement was made: device, operating system, versions, commit."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from corp_onnx import session
from corp_onnx.latency import conditions

log = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
PACKAGES = ("corp_onnx", "numpy", "scipy", "onnx", "onnx_graphsurgeon")
SOURCES = ("corp_onnx", "tests", "benchmarks", ":!benchmarks/results")
TURN = Path(tempfile.gettempdir()) / "corp_onnx.benchmarks.lock"
"""Held by who times something; `flock` lets other work of this machine hold it too."""


@contextmanager
def alone() -> Iterator[None]:
    """Wait for others on this machine who time something, and let them wait afterwards."""
    with TURN.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("prepared; waiting for %s", TURN)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def slug(name: str) -> str:
    """A name as part of a file name.

    >>> slug("Intel(R) Xeon(R) CPU @ 2.20GHz")
    'intel-xeon-2-20ghz'
    """
    plain = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def device() -> dict[str, object]:
    """Processor, cores that this process may use, memory, NVIDIA GPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processor, *gpus = conditions.devices()
    cores = len(os.sched_getaffinity(0))
    return {"cpu": processor, "cores": cores, "memory_bytes": memory, "gpus": gpus}


def name() -> str:
    """The GPU of a machine that has one, else the processor."""
    return conditions.devices()[-1]


def system() -> str:
    """The operating system and its kernel."""
    return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, Linux {platform.release()}"


def versions(optional: tuple[str, ...]) -> dict[str, str]:
    """Of Python, of what is always used, and of ``optional`` where it is installed."""
    found = {"python": platform.python_version(), "onnxruntime": session.version()}
    for package in (*PACKAGES, *optional):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, object]:
    """The commit that is checked out, and whether the sources differ from it; None if unknown."""
    changed = _git("status", "--porcelain", "--", *SOURCES)
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed": None if changed is None else changed != "",
    }


def _git(*arguments: str) -> str | None:
    """What git says; None outside a checkout, or without git."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        answer = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
