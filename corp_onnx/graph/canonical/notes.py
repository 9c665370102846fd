"""What a user should know of a model before it is cut: said, and logged."""

from __future__ import annotations

import logging

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.graph.canonical.quantised import stored_narrow, stored_rounded

log = logging.getLogger(__name__)

RANDOM_OPS = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)


def notes_of(graph: gs.Graph) -> tuple[str, ...]:
    """All that is to be said of a graph."""
    said = (stored_rounded(graph), stored_narrow(graph), _random(graph))
    notes = tuple(note for note in said if note)
    for note in notes:
        log.warning("%s", note)
    return notes


def _random(graph: gs.Graph) -> str | None:
    found = [node for node in graph.nodes if node.op in RANDOM_OPS or _drops_out(node)]
    if not found:
        return None
    return (
        f"the model draws random numbers ({found[0].op} {found[0].name!r}), so what is measured of "
        "it differs from run to run; a network that is in evaluation mode when it is exported "
        "(`module.eval()`) does not drop out"
    )


def _drops_out(node: gs.Node) -> bool:
    """Whether a Dropout is in training mode."""
    if node.op != "Dropout" or len(node.inputs) < 3:
        return False
    mode = node.inputs[2]
    return isinstance(mode, gs.Constant) and bool(np.all(mode.values))
