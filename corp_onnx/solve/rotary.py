r"""Fewer pairs of rotated queries and keys, and what makes up for the others.

Rotary embeddings turn pairs of channels by an angle that grows with the position. What shall pass
through that has to commute with every such turn: of each pair that is left, a factor and a constant
angle. With pairs of queries and keys as complex numbers ``q_p`` and ``k_p`` behind the rotation,
the logits of a head are ``Σ_p Re(q_p k̄_p)``. Fewer pairs with a factor each give
``Σ_p Re(c_p q_p k̄_p)``, which is linear in ``c``: two features, with the weights ``Re c_p`` and
``Im c_p``, of every pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int, Int64

from corp_onnx.calibration.moments import Moments
from corp_onnx.errors import PlanError
from corp_onnx.solve.affine import Repair, share
from corp_onnx.solve.algebra import inverse_definite, mean_variance, solve_definite
from corp_onnx.solve.bilinear import QueryKeyMaps

LEAST_RIDGE = 1e-9
"""Of two pairs that are always alike one goes, whatever the ridge."""

FORMS = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]])
"""Of both features, what multiplies a pair of ``q`` with one of ``k``: ``Re(q k̄)`` and, with the
sign that it has in ``Re(i q k̄)``, the imaginary part."""


def pair_grams(
    query: Moments,
    key: Moments,
    key_heads: Int[np.ndarray, " h"],
    pairs: Int64[np.ndarray, "p 2"],
) -> Float64[np.ndarray, "h f f"]:
    r"""Second moments of the features of every head, over all pairs of tokens.

    Of queries and keys that are drawn apart from each other, as their Grams are pooled: with ``B``
    the forms of two features and ``G`` the blocks of two pairs in the Grams,
    ``E[(q B kᵀ)(q B' kᵀ)] = tr(Bᵀ G_q B' G_k)``. Features are the real parts of all pairs, then the
    imaginary ones.

    Args:
        query: Moments of the queries of ``h`` heads of width ``e``, turned.
        key: Moments of the keys, turned; centred within each sequence, they leave out what Softmax
            does not notice.
        key_heads: The key head that every query head reads.
        pairs: Positions within a head.
    """
    grams = (query.gram, key.gram[key_heads])
    places = pairs[:, None, :, None], pairs[None, :, None, :]
    of_query, of_key = (gram[:, places[0], places[1]] for gram in grams)  # [h, p, p', 2, 2]
    found = np.einsum("aij,hpqik,bkl,hpqjl->hapbq", FORMS, of_query, FORMS, of_key, optimize=True)
    width = 2 * len(pairs)
    grams_of_features: np.ndarray = found.reshape(-1, width, width)
    return grams_of_features


def eliminated_pairs(
    grams: Float64[np.ndarray, "h f f"], *, ridge: float
) -> tuple[Int64[np.ndarray, " p"], Float64[np.ndarray, " p1"]]:
    r"""Pairs in the order in which they go, and the relative error after 0, 1, … of them went.

    One by one that pair goes whose loss the others make up for best, in all heads together. With
    ``H = (G + λI)⁻¹`` over the features that are left, ``w`` the weights as they are by then and
    ``j`` the two features of a pair, as in `eliminate`::

        cost_j = w_jᵀ (H_jj)⁻¹ w_j      w ← w - H_:j (H_jj)⁻¹ w_j      H ← H - H_:j (H_jj)⁻¹ H_j:

    Source: the optimal brain surgeon (Hassibi & Stork 1993), several weights at a time.
    """
    heads, width = grams.shape[:2]
    count = width // 2
    inverse = np.stack([inverse_definite(gram) for gram in _ridged(grams, ridge)])
    weight = np.tile(_dense(count), (heads, 1))
    left = list(range(count))
    order, costs = [], []
    while left:
        features = np.stack([left, np.add(left, count)], axis=1)
        own = inverse[:, features[:, :, None], features[:, None, :]]
        of_pairs = weight[:, features]
        each = np.einsum("hpi,hpi->p", of_pairs, _solved(own, of_pairs))
        gone = int(np.argmin(each))
        j = features[gone]
        column = np.linalg.solve(own[:, gone], inverse[:, j]).swapaxes(1, 2)
        weight = weight - np.einsum("hfi,hi->hf", column, weight[:, j])
        inverse = inverse - column @ inverse[:, j]
        weight[:, j] = 0.0
        order.append(left.pop(gone))
        costs.append(float(each[gone]))
    total = float(np.einsum("f,hfg,g->", _dense(count), grams, _dense(count)))
    curve = np.concatenate([[0.0], np.cumsum(costs)])
    return np.array(order), curve / total if total else np.zeros_like(curve)


def curve_of(errors: Float64[np.ndarray, " p1"]) -> Float64[np.ndarray, " w1"]:
    """Relative error at every width 0, 1, … of a head, from that after 0, 1, … pairs went.

    >>> curve_of(np.array([0.0, 0.25, 1.0]))
    array([1.  , 1.  , 0.25, 0.25, 0.  ])
    """
    by_pairs = errors[::-1]
    curve: np.ndarray = by_pairs[np.arange(2 * len(by_pairs) - 1) // 2]
    return curve


def recover_pairs(
    grams: Float64[np.ndarray, "h f f"],
    kept: Int[np.ndarray, " k"],
    pairs: Int64[np.ndarray, "p 2"],
    key_heads: Int[np.ndarray, " h"],
    *,
    repair: Repair,
    ridge: float,
) -> QueryKeyMaps:
    r"""The maps to some pairs, with the factors that make up best for the others in the queries.

    ``c = 1 + d`` on kept pairs, and ``d`` minimises the squared error of the logits of a head::

        (G_kk + λI) d = G_kr w_r        λ = ridge · s(G_kk)

    with ``w`` ones for real and zeros for imaginary parts, ``k`` the features of kept pairs and
    ``r`` those of removed ones.

    Source: the paper's recovery of logits (arXiv 2602.05243), as far as it commutes with rotations.

    Args:
        grams: Of `pair_grams`.
        kept: The pairs that stay, by their number; the same in all heads.
        pairs: Positions within a head.
        key_heads: The key head that every query head reads.
        repair: What stands in for the removed pairs; only ``corp`` finds factors.
        ridge: Relative.

    Raises:
        IllConditioned: If a head's system is singular.
    """
    count, width = len(pairs), 2 * len(pairs)
    removed = np.setdiff1d(np.arange(count), kept)
    dense, bare = _dense(count), np.zeros(width)
    bare[kept] = 1.0
    factors, condition = np.tile(bare, (len(grams), 1)), 1.0
    if repair == "corp" and len(kept) and len(removed):
        some = np.concatenate([kept, np.add(kept, count)])
        for head, gram in enumerate(grams):
            change, at = _made_up(gram[np.ix_(some, some)], gram[some][:, removed].sum(1), ridge)
            factors[head, some] += change
            condition = max(condition, at)
    lost, without, whole = (
        float(np.einsum("hf,hfg,hg->", gone, grams, gone))
        for gone in (dense - factors, np.tile(dense - bare, (len(grams), 1)), dense + 0 * factors)
    )
    numbers = factors[:, :count] + 1j * factors[:, count:]
    groups = int(np.max(key_heads)) + 1
    return QueryKeyMaps(
        pair_maps(pairs, kept, numbers[:, kept]),
        pair_maps(pairs, kept, np.ones((groups, len(kept)))),
        condition,
        share(lost, without),
        share(lost, whole),
    )


def pair_maps(
    pairs: Int64[np.ndarray, "p 2"], kept: Int[np.ndarray, " k"], factors: np.ndarray
) -> Float64[np.ndarray, "h e r"]:
    """Maps of heads that multiply some pairs, as complex numbers, by factors ``[h, k]``.

    The first channels of all pairs come out before the second ones.
    """
    first, second = pairs[kept].T
    count = len(kept)
    maps = np.zeros((len(factors), pairs.size, 2 * count))
    to = np.arange(count)
    maps[:, first, to] = maps[:, second, count + to] = factors.real
    maps[:, first, count + to] = factors.imag
    maps[:, second, to] = -factors.imag
    return maps


def positions_of(
    pairs: Int64[np.ndarray, "p 2"], kept: Int[np.ndarray, " k"]
) -> Int64[np.ndarray, " r"]:
    """The position within a head by whose angle each channel behind `pair_maps` is turned."""
    positions: np.ndarray = pairs[kept].T.reshape(-1)
    return positions


def whole_pairs(
    kept: Int[np.ndarray, "g r"], pairs: Int64[np.ndarray, "p 2"]
) -> Int64[np.ndarray, " k"]:
    """The numbers of the pairs that some positions make up, the same in all heads.

    Raises:
        PlanError: If they are no whole pairs, or others in another head.
    """
    inside = np.isin(pairs, kept[0])
    numbers = np.flatnonzero(inside.all(axis=1))
    same = all(set(of_head.tolist()) == set(kept[0].tolist()) for of_head in kept)
    if not same or inside.sum() != 2 * len(numbers):
        raise PlanError(
            "rotated queries and keys keep whole pairs of channels, the same in every head"
        )
    return numbers


def _dense(count: int) -> Float64[np.ndarray, " f"]:
    """The weights of all features in the dense logits."""
    return np.repeat([1.0, 0.0], count)


def _ridged(grams: Float64[np.ndarray, "h f f"], ridge: float) -> Sequence[np.ndarray]:
    scales = (max(mean_variance(gram), np.finfo(float).tiny) for gram in grams)
    least = max(ridge, LEAST_RIDGE)
    return [
        gram + least * scale * np.eye(len(gram)) for gram, scale in zip(grams, scales, strict=True)
    ]


def _solved(own: np.ndarray, of_pairs: np.ndarray) -> np.ndarray:
    solved: np.ndarray = np.linalg.solve(own, of_pairs[..., None])[..., 0]
    return solved


def _made_up(
    within: Float64[np.ndarray, "f f"], lost: Float64[np.ndarray, " f"], ridge: float
) -> tuple[Float64[np.ndarray, " f"], float]:
    """``(G + λI)⁻¹ x``, and the condition number; nothing where nothing is lost."""
    if not lost.any():
        return np.zeros_like(lost), 1.0
    system = within + ridge * mean_variance(within) * np.eye(len(within))
    answer, condition = solve_definite(system, lost[:, None])
    return answer[:, 0], condition
