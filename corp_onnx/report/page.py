"""What all pages share: a document as text, and an empty table."""

from __future__ import annotations

import json
import math
from typing import Any

from rich.table import Table

Json = dict[str, Any]


def as_json(document: Json) -> str:
    """A document as text."""
    return json.dumps(_finite(document), indent=2, allow_nan=False)


def table_of(*columns: str) -> Table:
    """An empty table; all columns but the first hold numbers or short words."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _finite(value: Any) -> Any:  # noqa: ANN401 (whatever JSON holds)
    """The same document with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
