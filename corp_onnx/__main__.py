"""``python -m corp_onnx``: the command line."""

from __future__ import annotations

import sys

from corp_onnx.cli import main

sys.exit(main())
