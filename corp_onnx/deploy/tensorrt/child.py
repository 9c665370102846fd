"""The process that builds: reads a request, builds, writes the outcome.

``python -m corp_onnx.deploy.tensorrt.child REQUEST``. It ends well also where the request cannot
be met, which the outcome says; where there is no outcome, the builder took the process with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corp_onnx.deploy.tensorrt.network import construct
from corp_onnx.deploy.tensorrt.options import Options
from corp_onnx.errors import CorpError


def fulfil(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """What came of a request: versions, or the kind of an error and what it says."""
    options = Options.read(request["options"])
    try:
        versions = construct(Path(request["model"]), Path(request["folder"]), options, _say)
    except CorpError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"versions": versions}


def _say(line: str) -> None:
    """At once, so that it is there if the next thing is a crash."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main(path: Path) -> None:
    """Fulfil the request of a file; the outcome is written beside it."""
    outcome = fulfil(json.loads(path.read_text()))
    path.with_name("outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
