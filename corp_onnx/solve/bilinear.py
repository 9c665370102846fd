"""Logit recovery: narrower queries and keys whose products stay what they were."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace
from jaxtyping import Float64, Int

from corp_onnx.calibration.moments import Moments, read_only
from corp_onnx.device import HOST, Array, Device, beside, to_host
from corp_onnx.errors import IllConditioned
from corp_onnx.solve.affine import Repair, share
from corp_onnx.solve.algebra import MAX_CONDITION, block, inner


@dataclass(frozen=True, slots=True, eq=False)
class Bilinear:
    """Solution of ``G_Q M G_K + λM = C``, and the condition number of that system."""

    matrix: Float64[Array, "r r"]
    """In the namespace of what was solved."""
    condition: float


@dataclass(frozen=True, slots=True, eq=False)
class QueryKeyMaps:
    """Maps that narrow every head, ``q ← q A`` and ``k ← k B``, and how well.

    They act on projected vectors, bias included, so both the weights and the
    bias of a projection are multiplied by its head's map.

    Attributes:
        query: ``A`` of every query head.
        key: ``B`` of every key head.
        condition: Largest condition number of a head's regularised system.
        unexplained: Squared error of the logits over the squared logits that
            the removed coordinates made, all heads together.
        error: The same squared error over all squared logits.
    """

    query: Float64[np.ndarray, "h e r"]
    key: Float64[np.ndarray, "g e r"]
    condition: float
    unexplained: float
    error: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "query", read_only(self.query))
        object.__setattr__(self, "key", read_only(self.key))


def recover_query_key(
    query: Moments,
    key: Moments,
    kept: Int[np.ndarray, "g r"],
    *,
    key_heads: Int[np.ndarray, " h"] | None = None,
    repair: Repair,
    ridge: float,
    device: Device = HOST,
) -> QueryKeyMaps:
    r"""Maps to ``r`` coordinates per head that keep the logits ``q kᵀ``.

    Every head for itself, with ``S`` kept and ``P`` removed, the products of
    kept coordinates are re-weighted to stand in for those of removed ones::

        min_M  E‖q_S M k_Sᵀ - q_P k_Pᵀ‖² + λ‖M‖²
        ⇔  G_Q M G_K + λM = C_Q C_K        λ = ridge · tr(G_Q) tr(G_K) / r²
        G_Q = E[q_Sᵀ q_S]   G_K = E[k_Sᵀ k_S]   C_Q = E[q_Sᵀ q_P]   C_K = E[k_Pᵀ k_S]
        I + M = L Rᵀ        A_S = L        B_S = R        A_P = B_P = 0

    over all pairs of tokens of all samples. ``M`` is not symmetric and is not
    made so. The repairs ``mean`` and ``none`` only select: ``A = B``, one 1 in
    each column. They are the same here because the mean of the removed products,
    ``E[q_P] E[k_P]ᵀ``, is one number added to every logit, and Softmax ignores it.

    Query heads that share a key head pool their Grams, ``G_Q = Σ_h G_Qh``, and
    share one ``A``: one ``M`` must serve them all.

    Both shares are exact on the vectors that the moments were taken of; with
    ``T = A Bᵀ - I`` the squared error of a head is ``tr(Tᵀ G_q T G_k)``,
    from Grams of all ``e`` coordinates.

    Source: arXiv 2602.05243, logit recovery of query-key width. There λ is
    absolute; here it is relative, so that one value fits every head.

    Args:
        query: Moments of the queries of ``h`` heads of width ``e``, as they
            enter the product, bias included.
        key: Moments of the keys of ``g`` heads.
        kept: Coordinates that stay, per key head.
        key_heads: The key head that every query head reads; without it, runs of
            equally many query heads read one key head after the other.
        repair: What stands in for the removed coordinates.
        ridge: Regularisation, relative; read by ``corp`` only.
        device: Where it is computed.

    Raises:
        IllConditioned: If a head's system is singular, or its condition number
            passes `MAX_CONDITION`.
        DataError: If the moments are of no vector.

    >>> x = np.array([[[1.0, 2.0]], [[3.0, 6.0]], [[-1.0, -2.0]]])  # x1 = 2 x0
    >>> maps = recover_query_key(
    ...     Moments.of(x), Moments.of(x), np.array([[0]]), repair="corp", ridge=0.0
    ... )
    >>> logit = maps.query[0, 0, 0] * maps.key[0, 0, 0]  # of q0 k0: it was q0 k0 + q1 k1
    >>> float(logit.round(6))
    5.0
    """
    key_grams = device.asarray(key.gram)
    groups, width = key_grams.shape[:2]
    heads = len(query.mean)
    if key_heads is None:
        assert heads % groups == 0, "every key head serves as many query heads"
        key_heads = np.repeat(np.arange(groups), heads // groups)
    query_grams = device.asarray(pooled(query.gram, key_heads, groups))

    xp = device.xp
    select = xp.matrix_transpose(device.asarray(np.eye(width)[kept]))
    narrow_query, narrow_key, condition = select, select, 1.0
    if repair == "corp" and 0 < kept.shape[1] < width:
        halves = [
            _split(query_grams[head, ...], key_grams[head, ...], kept[head], ridge=ridge)
            for head in range(groups)
        ]
        narrow_query = select @ xp.stack([left for left, _, _ in halves])
        narrow_key = select @ xp.stack([right for _, right, _ in halves])
        condition = max(head_condition for _, _, head_condition in halves)

    whole = device.asarray(np.eye(width))
    change = narrow_query @ xp.matrix_transpose(narrow_key) - whole
    removed = select @ xp.matrix_transpose(select) - whole
    lost = _logit_energy(query_grams, key_grams, change)
    return QueryKeyMaps(
        to_host(narrow_query)[key_heads],
        to_host(narrow_key),
        condition,
        unexplained=share(lost, _logit_energy(query_grams, key_grams, removed)),
        error=share(lost, _logit_energy(query_grams, key_grams, whole)),
    )


def pooled(
    of_heads: Float64[np.ndarray, "h *rest"], key_heads: Int[np.ndarray, " h"], groups: int
) -> Float64[np.ndarray, "g *rest"]:
    """What query heads have, added up over those that read the same key head.

    >>> pooled(np.array([1.0, 2.0, 4.0]), np.array([0, 1, 0]), 2)
    array([5., 2.])
    """
    total = np.zeros((groups, *of_heads.shape[1:]))
    np.add.at(total, key_heads, of_heads)
    return total


def solve_bilinear(
    left: Float64[Array, "r r"],
    right: Float64[Array, "r r"],
    target: Float64[Array, "r r"],
    *,
    ridge: float,
) -> Bilinear:
    r"""Solve ``G M H + λM = C`` for symmetric positive semidefinite ``G`` and ``H``.

    Diagonalising both sides, ``G = U diag(a) Uᵀ`` and ``H = V diag(b) Vᵀ``,
    turns the system into one division per entry::

        M = U [(Uᵀ C V)_ij / (a_i b_j + λ)] Vᵀ

    so it costs two eigendecompositions, not one solve of size ``r²``. Negative
    eigenvalues are rounding and count as zero. If ``G`` or ``H`` is zero and
    λ too, every ``M`` does as well; the answer is then zero.

    Args:
        left: ``G``.
        right: ``H``.
        target: ``C``.
        ridge: λ, absolute.

    Raises:
        IllConditioned: If ``max(a_i b_j) + λ`` over ``min(a_i b_j) + λ`` passes
            `MAX_CONDITION`.

    >>> answer = solve_bilinear(np.eye(1) * 2, np.eye(1) * 3, np.eye(1) * 14, ridge=1.0)
    >>> answer.matrix.round(6), answer.condition
    (array([[2.]]), 1.0)
    """
    xp = array_namespace(left, right, target)
    left_values, left_vectors = xp.linalg.eigh(left)
    right_values, right_vectors = xp.linalg.eigh(right)
    scale = xp.linalg.outer(xp.clip(left_values, min=0.0), xp.clip(right_values, min=0.0)) + ridge
    low, high = float(xp.min(scale)), float(xp.max(scale))
    if high == 0.0:
        return Bilinear(xp.zeros_like(target), condition=1.0)
    if low * MAX_CONDITION < high:
        raise IllConditioned(
            f"the query-key system of {left.shape[0]} kept coordinates has condition "
            f"{share(high, low):.1e} (limit {MAX_CONDITION:.0e}); "
            "calibrate with more samples or raise --ridge"
        )
    rotated = left_vectors.T @ target @ right_vectors
    return Bilinear(left_vectors @ (rotated / scale) @ right_vectors.T, condition=high / low)


def _split(
    query_gram: Float64[Array, "e e"],
    key_gram: Float64[Array, "e e"],
    kept: Int[np.ndarray, " r"],
    *,
    ridge: float,
) -> tuple[Float64[Array, "r r"], Float64[Array, "r r"], float]:
    """``L`` and ``R`` of ``I + M = L Rᵀ`` for one head, and its condition number."""
    xp = array_namespace(query_gram, key_gram)
    removed = np.setdiff1d(np.arange(key_gram.shape[0]), kept)
    left, right = block(query_gram, kept, kept), block(key_gram, kept, kept)
    target = block(query_gram, kept, removed) @ block(key_gram, removed, kept)
    absolute = ridge * float(xp.linalg.trace(left) * xp.linalg.trace(right)) / len(kept) ** 2
    answer = solve_bilinear(left, right, target, ridge=absolute)

    u, values, vt = xp.linalg.svd(beside(np.eye(len(kept)), left) + answer.matrix)
    root = xp.sqrt(values)
    return u * root, vt.T * root, answer.condition


def _logit_energy(
    query_grams: Float64[Array, "g e e"],
    key_grams: Float64[Array, "g e e"],
    form: Float64[Array, "... e e"],
) -> float:
    """``E[(q T kᵀ)²]`` over all pairs, added up over heads: ``tr(Tᵀ G_q T G_k)``."""
    return inner(query_grams @ form, form @ key_grams)
