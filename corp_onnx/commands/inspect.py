"""`inspect`: what can be cut, and why the rest cannot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from corp_onnx import graph, present
from corp_onnx.blocks import find_blocks
from corp_onnx.commands.records import Answer, Progress
from corp_onnx.sizes import Sizes


@dataclass(frozen=True, slots=True)
class Inspect:
    """Blocks, refusals, and where the MACs are."""

    model: Path
    sizes: Sizes

    def __call__(self, progress: Progress) -> Answer:
        """Look; nothing is run."""
        model = graph.load(self.model)
        catalog = find_blocks(model, self.sizes)
        return Answer(
            present.catalog_json(catalog, model.notes), present.catalog_table(catalog, model.notes)
        )
