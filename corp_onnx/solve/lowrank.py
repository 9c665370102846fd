"""The best narrow queries and keys, and the best narrow values: truncated, not selected."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace
from jaxtyping import Float64, Int

from corp_onnx.calibration.moments import read_only
from corp_onnx.device import Array, beside, to_host

NEGLIGIBLE = 1e-7
"""Share of the largest eigenvalue below which a direction of a second moment counts as absent.

Activations are float32 numbers: what is smaller may be their rounding.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """Maps of every head from its dense to its kept width, and what every width would lose.

    Attributes:
        maps: One ``[g, e, r]`` array per operand: ``A`` and ``B``, or ``P`` alone.
        curve: Squared error after keeping 0, 1, … ``e`` directions of every head, as a share of
            all there was.
        condition: Largest ratio of the eigenvalues that were inverted.
    """

    maps: tuple[Float64[np.ndarray, "g e r"], ...]
    curve: Float64[np.ndarray, " e1"]
    condition: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "maps", tuple(read_only(one) for one in self.maps))
        object.__setattr__(self, "curve", read_only(self.curve))


def truncate_query_key(
    query_grams: Float64[Array, "g e e"],
    key_grams: Float64[Array, "g e e"],
    width: int,
) -> Truncated:
    r"""The best rank-``r`` stand-in for the product of queries and keys of every head.

    Minimises ``E‖q kᵀ - (q A)(k B)ᵀ‖²`` over all ``A, B [e, r]`` and all pairs of tokens::

        T = G_q^½ G_k^½ = U diag(s) Vᵀ
        A = G_q^-½ U_r diag(s_r)^½        B = G_k^-½ V_r diag(s_r)^½

    which leaves ``Σ s²`` of the dropped directions: the error for every width at once. No
    coordinate has to survive, since the folded columns are dense anyway. Inverse roots are
    pseudo-inverses, without directions below ``NEGLIGIBLE`` of the largest eigenvalue.

    Source: ours; the best approximation of lower rank (Eckart & Young 1936), measured by what
    queries and keys really are.

    Args:
        query_grams: ``G_q`` of every key head; where several query heads read it, their sum.
        key_grams: ``G_k``; of keys centred within each sequence, because Softmax ignores what is
            constant along a row of logits.
        width: ``r``.

    >>> gram = np.diag([4.0, 1.0])[None]
    >>> found = truncate_query_key(gram, gram, 1)
    >>> a, b = found.maps
    >>> (a[0] @ b[0].T).round(6).tolist(), found.curve.round(4).tolist()
    ([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0588, 0.0])
    """
    xp = array_namespace(query_grams, key_grams)
    halves = []
    losses = np.zeros(query_grams.shape[-1] + 1)
    condition = 1.0
    for head in range(query_grams.shape[0]):
        root_q, inverse_q, spread_q = _roots(query_grams[head, ...])
        root_k, inverse_k, spread_k = _roots(key_grams[head, ...])
        u, sigma, vt = xp.linalg.svd(root_q @ root_k)
        root = xp.sqrt(sigma[:width])
        halves.append((inverse_q @ u[:, :width] * root, inverse_k @ vt[:width, :].T * root))
        losses += _left_after(to_host(sigma))
        condition = max(condition, spread_q, spread_k)
    a, b = (to_host(xp.stack(maps)) for maps in zip(*halves, strict=True))
    if width == query_grams.shape[-1]:
        a, b = _nothing_dropped(query_grams), _nothing_dropped(query_grams)
    return Truncated((a, b), _share(losses), condition)


def truncate_value_output(
    covariances: Float64[Array, "g e e"],
    weights: Float64[Array, "g e o"],
    width: int,
) -> Truncated:
    r"""The ``r`` directions of every value head that matter most to the layer's output.

    Mixing by attention is linear in the values, so a map ``P`` of them passes through it::

        Σ^½ W = U diag(s) Vᵀ        P = Σ^-½ U_r

    and ``o P (Pᵀ Σ P)⁻¹ Pᵀ Σ W`` is the best rank-``r`` stand-in for ``o W``; the dropped ``s²``
    are its squared error.

    Source: ours; reduced-rank regression (Izenman 1975) of a layer on what it reads.

    Args:
        covariances: ``Σ`` of the mixed values ``o`` of every value head; where several heads share
            one, their mean.
        weights: The head's rows ``W`` of the output projection; of heads that share one value head,
            side by side.
        width: ``r``.

    >>> found = truncate_value_output(np.diag([4.0, 1.0])[None], np.eye(2)[None], 1)
    >>> np.abs(found.maps[0][0]).round(6).tolist(), found.curve.round(4).tolist()
    ([[0.5], [0.0]], [1.0, 0.2, 0.0])
    """
    xp = array_namespace(covariances, weights)
    maps = []
    losses = np.zeros(covariances.shape[-1] + 1)
    condition = 1.0
    for head in range(covariances.shape[0]):
        root, inverse, spread = _roots(covariances[head, ...])
        matrix = root @ weights[head, ...]
        few = matrix.shape[1] < matrix.shape[0]  # fewer columns than there may be directions
        u, sigma, _ = xp.linalg.svd(matrix, full_matrices=few)
        maps.append(inverse @ u[:, :width])
        losses += _left_after(np.pad(to_host(sigma), (0, u.shape[0] - sigma.shape[0])))
        condition = max(condition, spread)
    if width == covariances.shape[-1]:
        return Truncated((_nothing_dropped(covariances),), _share(losses), condition)
    return Truncated((to_host(xp.stack(maps)),), _share(losses), condition)


def shared(
    covariances: Float64[np.ndarray, "h e e"], heads: Int[np.ndarray, " h"], groups: int
) -> Float64[np.ndarray, "g e e"]:
    """The mean covariance of the heads that share one value head."""
    total = np.zeros((groups, *covariances.shape[1:]))
    np.add.at(total, heads, covariances)
    counts: np.ndarray = np.bincount(heads, minlength=groups).clip(min=1)
    mean: np.ndarray = total / counts[:, None, None]
    return mean


def _nothing_dropped(of_heads: Float64[Array, "g e e"]) -> Float64[np.ndarray, "g e e"]:
    """The identity for every head: at full width there is nothing to choose."""
    return np.broadcast_to(np.eye(of_heads.shape[-1]), of_heads.shape)


def _roots(
    moment: Float64[Array, "e e"],
) -> tuple[Float64[Array, "e e"], Float64[Array, "e e"], float]:
    """Square root, inverse square root, and the spread of what was inverted."""
    values, vectors = array_namespace(moment).linalg.eigh(moment)
    spectrum = to_host(values)
    present = spectrum > NEGLIGIBLE * max(spectrum[-1], 0.0)
    roots = np.sqrt(np.where(present, spectrum, 0.0))
    inverses = np.where(present, 1.0 / np.sqrt(np.where(present, spectrum, 1.0)), 0.0)
    spread = float(spectrum[-1] / spectrum[present][0]) if present.any() else 1.0
    root, inverse = ((vectors * beside(each, moment)) @ vectors.T for each in (roots, inverses))
    return root, inverse, spread


def _left_after(sigma: Float64[np.ndarray, " e"]) -> Float64[np.ndarray, " e1"]:
    """The sum of squares that is left after keeping 0, 1, … of them."""
    squares = sigma**2
    return np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])


def _share(losses: Float64[np.ndarray, " e1"]) -> Float64[np.ndarray, " e1"]:
    return losses / losses[0] if losses[0] else losses
