"""The command line, as ``corp-onnx`` and as ``python -m corp_onnx``."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> int:
    """Run one command; an interruption has one status, also while modules are still loaded."""
    try:
        from corp_onnx import cli

        return cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("corp-onnx: interrupted\n")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
