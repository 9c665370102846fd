"""Models that torch writes, made once and kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from benchmarks.outcome import Place
from corp_onnx.export import export

log = logging.getLogger(__name__)

EXPORTERS: Mapping[str, tuple[str, int]] = {
    "ts17": ("torchscript", 17),
    "dynamo18": ("dynamo", 18),
    "dynamo23": ("dynamo", 23),
}

NETWORKS = ("deit_s", "vit_s", "hf_vit_eager", "hf_vit_sdpa", "hf_bert_eager", "hf_bert_sdpa")
"""Functions of ``networks.py``."""

DEIT: Mapping[str, str] = {
    "DeiT-T": "deit_tiny_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "DeiT-B": "deit_base_patch16_224",
}
"""Sizes of DeiT in timm, drawn with its own initialisation."""


def drawn(place: Place, network: str, exporter: str) -> Path:
    """One of `NETWORKS` by one of `EXPORTERS`."""
    source = f"{Path(__file__).with_name('networks.py')}:{network}"
    return _kept(place, f"{network}.{exporter}", source, exporter, random_weights=False)


def deit(place: Place, size: str) -> Path:
    """A DeiT of one of the sizes in `DEIT`, by the TorchScript exporter."""
    return _kept(place, f"{DEIT[size]}.ts17", f"timm:{DEIT[size]}", "ts17", random_weights=True)


def _kept(place: Place, name: str, source: str, exporter: str, *, random_weights: bool) -> Path:
    """The file of that name among the exports; written first if it is not there."""
    path = place.exports / f"{name}.onnx"
    if not path.is_file():
        log.info("exporting %s", name)
        place.exports.mkdir(parents=True, exist_ok=True)
        kind, opset = EXPORTERS[exporter]
        export(source, path, random_weights=random_weights, exporter=kind, opset=opset)
    return path
