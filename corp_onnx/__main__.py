"""The command line as ``python -m corp_onnx``."""

from __future__ import annotations

import sys

from corp_onnx.cli import main

if __name__ == "__main__":
    sys.exit(main())
