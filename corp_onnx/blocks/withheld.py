"""Axes that could be cut, and are not for what was learned from the data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from corp_onnx.blocks.records import Axis, Catalog, axes_of

log = logging.getLogger(__name__)


def withheld(catalog: Catalog, reasons: Mapping[str, Mapping[Axis, str]]) -> Catalog:
    """Refuse axes by block, each for its reason, and say so.

    Args:
        catalog: The blocks of a model.
        reasons: By block; those that were refused already keep theirs.
    """
    found = [
        (block.id, axis, reasons[block.id][axis])
        for block in catalog.blocks
        for axis in axes_of(block)
        if axis in reasons.get(block.id, ())
    ]
    if found:
        others = f'; so are {len(found) - 1} more, see "uncut" in --json' if found[1:] else ""
        log.warning("%s %s is left as it is: %s%s", *found[0], others)
    blocks = [
        replace(block, refused={**reasons.get(block.id, {}), **block.refused})
        for block in catalog.blocks
    ]
    return replace(catalog, blocks=tuple(blocks))
