"""What cutting query-key width would cost under rotary position embeddings.

Channels of a head are rotated in pairs by an angle that grows with the position. Only whole pairs
can go, the same ones in all heads that read one table of angles, and what makes up for them must
commute with the rotation: on every kept pair a rotation by a constant angle with a factor, in other
words a complex number ``c``. With ``q`` and ``k`` as complex numbers after the rotation, the logits
are ``Σ_p Re(q_p k̄_p)``, and the best ``c`` solve

    min ‖Σ_p Re(q_p k̄_p) - Σ_{p kept} Re(c_p q_p k̄_p)‖²

over all pairs of tokens that see each other, centred over the keys of every query, which is all
that Softmax notices: a regression on two features for every kept pair. Pairs are chosen per layer
by backward elimination on that very error, summed over heads: the best case.

What this does to the text is seen by multiplying the queries of the dense model by the kept pairs'
``c`` and by zero elsewhere, which computes what a cut model would. Held against it: the MLPs cut by
as much as saves the same multiply-adds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
from jaxtyping import Float64

from benchmarks import exports
from benchmarks.language import CALIBRATION, TEST, WINDOW, batches, read, windows_of
from benchmarks.outcome import Outcome, Place
from corp_onnx.blocks import Mlp, find_blocks
from corp_onnx.blocks.catalog import view_of
from corp_onnx.blocks.logits import Anchor, match_logits, match_softmax
from corp_onnx.calibration.calibrate import gather
from corp_onnx.data.batching import Batch
from corp_onnx.graph.emit import replace_readers
from corp_onnx.graph.extracts import exposed
from corp_onnx.graph.macs import count
from corp_onnx.graph.model import Model, load
from corp_onnx.graph.shapes import evaluate
from corp_onnx.plan import uniform
from corp_onnx.session import open_session
from corp_onnx.solve import Recipe, solve
from corp_onnx.surgery.operate import operate

log = logging.getLogger(__name__)

FIT, JUDGE = 48, 24
"""Windows to choose and to fit on, and windows to judge on."""

SHARES = (0.125, 0.25, 0.5)
RIDGE = 1e-6

WIDTH, HEADS, KEY_HEADS, HEAD = 576, 9, 3, 64
"""Of SmolLM2-135M, for counting."""


def measure(place: Place) -> Outcome:
    """Grams of all pairs in every layer, and from these the error at every share; perplexity."""
    model = load(exports.drawn(place, "smollm2", "dynamo18"))
    fit, judge = (4, 4) if place.quick else (FIT, JUDGE)
    windows = windows_of(place, CALIBRATION + TEST)
    fitting, unseen_windows = windows[:fit], windows[-judge:]
    layers = _operands(model)
    log.info("%d layers, %d windows", len(layers), fit + judge)
    known = _grams(model, layers, fitting)
    unseen = _grams(model, layers, unseen_windows)
    calibration = windows[: 8 if place.quick else CALIBRATION]
    narrow = _narrower_mlps(model, batches(calibration))
    models, rows = {"dense": model}, []
    for share in SHARES:
        fitted = [_chosen(gram, share) for gram in known]
        saved = _saved(model, len(layers), share)
        models[f"{share:.1%} of the pairs"] = _turned(model, layers, [c for _, c in fitted])
        models[f"MLPs, as much as {share:.1%} of the pairs"] = narrow(saved)
        errors = [
            [_error(one, bare).mean(), _error(one, c).mean(), _error(other, c).mean()]
            for one, other, (bare, c) in zip(known, unseen, fitted, strict=True)
        ]
        bare, repaired, judged = np.mean(errors, axis=0)
        rows.append(
            {
                "pairs removed": f"{share:.1%}",
                "error without repair": float(bare),
                "error repaired": float(repaired),
                "unseen, repaired": float(judged),
                "of the model's MACs": saved,
            }
        )
    return Outcome(
        {
            "SmolLM2-135M: squared error of the centred logits, mean over layers and heads": rows,
            "SmolLM2-135M: what it does to the text": read(models, unseen_windows),
        },
        (),
        {
            "window": WINDOW,
            "fitted on": fit,
            "judged on": judge,
            "MLPs fitted on": len(calibration),
        },
    )


def _narrower_mlps(model: Model, calibration: list[Batch]) -> Callable[[float], Model]:
    """From a share of all MACs to the model whose MLPs are that much narrower."""
    (name,) = (tensor.name for tensor in model.graph.inputs)
    catalog = find_blocks(model, {name: (1, WINDOW)})
    statistics = gather(model, catalog, calibration, source="definitions")
    mlps = [block for block in catalog.blocks if isinstance(block, Mlp)]
    of_mlps = sum(catalog.macs_by_block[block.id] for block in mlps) / catalog.macs

    def narrow(saved: float) -> Model:
        plan = uniform(catalog, {"mlp": saved / of_mlps}, align=1)
        return operate(
            model, catalog, solve(model, catalog, plan, statistics, Recipe("corp"))
        ).model

    return narrow


def _turned(model: Model, layers: list[tuple[str, str]], factors: list[np.ndarray]) -> Model:
    """The model with the queries of every layer multiplied by the factors of their pairs."""
    changed = model.graph.copy()
    tensors = changed.tensors()
    for (query, _), weights in zip(layers, factors, strict=True):
        real, imaginary = (
            np.eye(HEAD // 2) * part[:, None] for part in np.split(weights, 2, axis=1)
        )
        maps = np.block([[real, imaginary], [-imaginary, real]]).astype(np.float32)
        old, new = tensors[query], gs.Variable(f"{query}_turned", dtype=np.float32)
        replace_readers(old, new)
        constant = gs.Constant(f"{query}_factors", maps)
        changed.nodes.append(gs.Node("MatMul", new.name, inputs=[old, constant], outputs=[new]))
    return model.with_graph(changed.toposort())


def _operands(model: Model) -> list[tuple[str, str]]:
    """Queries ``[b, h, t, e]`` and transposed keys ``[b, h, e, t]`` of every attention."""
    view, _ = view_of(model)
    found = []
    for node in model.graph.nodes:
        anchor = match_softmax(view, node)
        product = match_logits(view, anchor).product if isinstance(anchor, Anchor) else None
        if product is not None:
            query, key = product.inputs
            found.append((query.name, key.name))
    return found


def _grams(
    model: Model, layers: list[tuple[str, str]], windows: np.ndarray
) -> Float64[np.ndarray, "l h f f"]:
    """Second moments of the real and imaginary products of every pair, by layer and head."""
    session = open_session(exposed(model, [name for layer in layers for name in layer]))
    total: np.ndarray | float = 0.0
    for batch in batches(windows):
        tensors = session.run(batch)
        total = total + np.stack([_gram(tensors[q], tensors[k]) for q, k in layers])
    return np.asarray(total)


def _gram(query: np.ndarray, key: np.ndarray) -> Float64[np.ndarray, "h f f"]:
    """Of one layer: ``f`` counts the real parts of all pairs, then the imaginary ones."""
    q, k = _complex(query), _complex(key.swapaxes(-1, -2))
    gram = np.zeros((q.shape[1], 2 * q.shape[-1], 2 * q.shape[-1]))
    for sample in range(len(q)):
        for token in range(1, q.shape[2]):
            products = q[sample, :, token, None] * k[sample, :, : token + 1].conj()
            features = np.concatenate([products.real, -products.imag], axis=-1)
            features -= features.mean(axis=1, keepdims=True)
            gram += features.swapaxes(1, 2) @ features
    return gram


def _complex(x: np.ndarray) -> np.ndarray:
    """Channel ``j`` and channel ``j + e/2`` of every head as one complex number."""
    half = x.shape[-1] // 2
    return x[..., :half] + 1j * x[..., half:]


def _chosen(
    gram: Float64[np.ndarray, "h f f"], share: float
) -> tuple[Float64[np.ndarray, "h f"], Float64[np.ndarray, "h f"]]:
    """Factors that only keep the best pairs, and factors that also make up for the others."""
    pairs = gram.shape[-1] // 2
    kept = list(range(pairs))
    while len(kept) > round((1 - share) * pairs):
        trials = [[pair for pair in kept if pair != gone] for gone in kept]
        kept = min(trials, key=lambda trial: _error(gram, _fit(gram, trial)).mean())
    bare = np.zeros(gram.shape[:2])
    bare[:, kept] = 1.0
    return bare, _fit(gram, kept)


def _fit(gram: Float64[np.ndarray, "h f f"], kept: list[int]) -> Float64[np.ndarray, "h f"]:
    """The best factors of the kept pairs' features, zero elsewhere."""
    pairs = gram.shape[-1] // 2
    places = np.array([*kept, *(pair + pairs for pair in kept)])
    system = gram[:, places[:, None], places]
    scale = np.trace(system, axis1=1, axis2=2)[:, None, None] / len(places)
    right = gram[:, places, :pairs].sum(axis=-1)
    weights = np.zeros(gram.shape[:2])
    weights[:, places] = np.linalg.solve(
        system + RIDGE * scale * np.eye(len(places)), right[..., None]
    )[..., 0]
    return weights


def _error(
    gram: Float64[np.ndarray, "h f f"], weights: Float64[np.ndarray, "h f"]
) -> Float64[np.ndarray, " h"]:
    """``‖logits - features · weights‖² / ‖logits‖²`` of every head."""
    pairs = gram.shape[-1] // 2
    dense = np.concatenate([np.ones(pairs), np.zeros(pairs)])
    lost = dense - weights
    return np.einsum("hf,hfg,hg->h", lost, gram, lost) / np.einsum("f,hfg,g->h", dense, gram, dense)


def _saved(model: Model, layers: int, share: float) -> float:
    """Share of all MACs in query and key projections and their product, times the share cut."""
    (name,) = (tensor.name for tensor in model.graph.inputs)
    total = count(model.graph, evaluate(model.graph, {name: (1, WINDOW)})).total
    projections = WINDOW * WIDTH * (HEADS + KEY_HEADS) * HEAD
    return share * layers * (projections + HEADS * WINDOW**2 * HEAD) / total
