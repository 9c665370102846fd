"""The paper's repair as its reference code does it, for comparison only.

What differs from the method ``corp``:

* channels are ranked by energy times the norms of the weights that carry them;
* of the logits' solution ``I + M``, which is not symmetric, only the symmetric part is used;
* the softmax scale follows the narrower head, ``1/√r`` instead of the dense model's ``1/√e``.

So, with ``A Bᵀ = I + M`` of `recover_query_key` on the kept coordinates::

    ½ (A Bᵀ + B Aᵀ) = U D Vᵀ        A' = √(e/r) U_r D_r^½        B' = V_r D_r^½

where ``√(e/r)`` is the change of scale, folded into the query. Values are not cut by the paper.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from corp_onnx.blocks import Attention, Catalog
from corp_onnx.calibration.statistics import Statistics
from corp_onnx.graph.model import Model
from corp_onnx.plan import Plan
from corp_onnx.solve import Recipe, solve
from corp_onnx.solve.folds import QueryKeyFold, Solution

RECIPE = Recipe("corp", ranking="energy-norm")


def solve_as_published(
    model: Model, catalog: Catalog, plan: Plan, statistics: Statistics
) -> Solution:
    """New weights for every cut of a plan, as the reference code makes them."""
    found = solve(model, catalog, plan, statistics, RECIPE)
    blocks = {block.id: block for block in catalog.blocks}
    folds = tuple(
        _as_published(fold, blocks[fold.block]) if isinstance(fold, QueryKeyFold) else fold
        for fold in found.folds
    )
    return Solution("published", folds)


def _as_published(fold: QueryKeyFold, block: object) -> QueryKeyFold:
    """Symmetrised and rescaled; a fold that cuts nothing stays as it is."""
    assert isinstance(block, Attention), "queries and keys are an attention's"
    _, width, kept = fold.query.shape
    if kept == width:
        return fold
    heads = np.asarray(block.key_heads)
    first = [int(np.flatnonzero(heads == group)[0]) for group in range(len(fold.key))]
    query, key = symmetrised(fold.query[first], fold.key)
    return replace(fold, query=query[heads] * np.sqrt(width / kept), key=key)


def symmetrised(query: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps whose product is the symmetric part of that of these.

    >>> query, key = symmetrised(np.eye(2)[None], np.array([[[1.0, 0.0], [2.0, 1.0]]]))
    >>> (query @ key.swapaxes(1, 2)).round(6)
    array([[[1., 1.],
            [1., 1.]]])
    """
    product = query @ key.swapaxes(-1, -2)
    u, values, vt = np.linalg.svd((product + product.swapaxes(-1, -2)) / 2)
    kept = query.shape[-1]
    root = np.sqrt(values[:, None, :kept])
    return u[..., :kept] * root, vt.swapaxes(-1, -2)[..., :kept] * root
