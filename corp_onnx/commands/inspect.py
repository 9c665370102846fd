"""`inspect`: what can be cut, and why the rest cannot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from corp_onnx.blocks import find_blocks
from corp_onnx.commands.records import Answer, Progress
from corp_onnx.graph.model import load
from corp_onnx.graph.sizes import Sizes
from corp_onnx.report.results import catalog_json, catalog_table


@dataclass(frozen=True, slots=True)
class Inspect:
    """Blocks, refusals, and where the MACs are."""

    model: Path
    sizes: Sizes
    rotary: bool = False

    def __call__(self, progress: Progress) -> Answer:
        """Look; nothing is run."""
        model = load(self.model)
        catalog = find_blocks(model, self.sizes, rotary=self.rotary)
        return Answer(catalog_json(catalog, model.notes), catalog_table(catalog, model.notes))
