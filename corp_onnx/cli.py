"""The command line: every verb, and the exit status.

Exit status: 0 done and verified, 1 done but a check or gate failed, 2 wrong request or unusable
input, 3 nothing prunable was found, 130 interrupted.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

import typer

from corp_onnx.errors import CorpError, NothingPrunable
from corp_onnx.terminal import engines, gathering, pruning, screen, starting

DONE, UNUSABLE, NOTHING = 0, 2, 3

COLLECTED = (50_000, 20, 50)
"""Graphs are many small objects: starting for garbage among them less often saves a sixth."""

VERBS = (
    *(starting.demo, starting.export, starting.inspect),
    *(gathering.calibrate, gathering.merge),
    *(pruning.prune, pruning.sweep, pruning.verify),
    *(engines.build, engines.bench),
)

app = typer.Typer(
    name="corp-onnx",
    help="Cut an exported ONNX transformer to half its width, and repair it in closed form.",
    callback=screen.about,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in VERBS:
    app.command()(verb)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    gc.set_threshold(*COLLECTED)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        app(arguments, prog_name="corp-onnx")
    except SystemExit as end:
        return int(end.code or DONE)
    except NothingPrunable as error:
        return screen.complain(error, NOTHING)
    except (CorpError, OSError) as error:
        return screen.complain(error, UNUSABLE)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
