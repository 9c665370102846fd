"""Multiply-adds of DeiT by this program's count, against counts by hand.

By hand, for one picture of ``t = 197`` tokens, width ``d``, hidden ``m``, twelve blocks: patches
``196 · 768 d``, projections ``4 t d²``, MLP ``2 t d m``, attention products ``2 t² d``, head
``1000 d``. Half the MLP halves the third term; half the query-key width takes a quarter of the
second and a quarter of the fourth.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from benchmarks import exports
from benchmarks.halves import halved
from benchmarks.outcome import Outcome, Place, Row
from corp_onnx.solve import Recipe
from corp_onnx.verify.checks import Check

log = logging.getLogger(__name__)

PUBLISHED: Mapping[str, tuple[float, float]] = {
    "DeiT-T": (1.25, 0.77),
    "DeiT-S": (4.60, 2.77),
    "DeiT-B": (17.56, 10.41),
}
"""G multiply-adds, dense and with half of MLP and query-key width."""


def measure(place: Place) -> Outcome:
    """Count every size, dense and cut."""
    sizes = list(PUBLISHED)[: 1 if place.quick else None]
    rows = [_row(place, size) for size in sizes]
    checks = tuple(_check(row) for row in rows)
    return Outcome(
        {"multiply-adds of one picture": rows}, checks, {"shares_removed": "mlp 0.5, qk 0.5"}
    )


def _row(place: Place, size: str) -> Row:
    log.info("%s", size)
    surgery = halved(exports.deit(place, size), Recipe("none"))
    dense, cut = PUBLISHED[size]
    return {
        "model": size,
        "dense": surgery.dense.total,
        "dense by hand, G": dense,
        "cut": surgery.pruned.total,
        "cut by hand, G": cut,
        "removed": 1 - surgery.pruned.total / surgery.dense.total,
    }


def _check(row: Row) -> Check:
    found = [round(row[key] / 1e9, 2) for key in ("dense", "cut")]
    wanted = [row["dense by hand, G"], row["cut by hand, G"]]
    return Check(f"{row['model']} as by hand", found == wanted, f"{found[0]} G and {found[1]} G")
