"""Concrete dimensions for the inputs of a model, as counting and probing need them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

import numpy as np
import onnx_graphsurgeon as gs

from corp_onnx.errors import PlanError

DEFAULT_BATCH = 1
DEFAULT_SEQUENCES = (128, 64, 32, 16, 8, 4000)
"""Sequence lengths for counting: the first that all tensors of the model admit.

The last is a quarter of a second of sound, of which convolutions leave a dozen tokens.
"""

DEFAULT_PIXELS = 224

TRACED_SEQUENCES, MOST_TRACED, LONGEST_SHAPE = range(5, 5000), 3, 8
"""Which numbers in constants of so few entries may be the one length that a model was traced at,
and how many of them are tried."""

_WHOLE = (np.int64, np.int32)

Sizes = Mapping[str, tuple[int, ...]]
"""Concrete dimensions of every graph input, by input name."""


def input_sizes(
    graph: gs.Graph,
    *,
    batch: int = DEFAULT_BATCH,
    sequence: int = DEFAULT_SEQUENCES[0],
    pixels: int = DEFAULT_PIXELS,
    given: Sizes | None = None,
) -> dict[str, tuple[int, ...]]:
    """Concrete dimensions for every graph input: those given, else static ones, else by place.

    The first dimension is the batch; the last two of a 4-D input are pixels; any other that is
    dynamic is a sequence. Keys and values of tokens before, 4-D inputs of one form with one open
    axis, are those of as many tokens again; a mask of both, whose axis has another name than the
    first input's, is as long as both together. Dimensions of one name have one size, that of the
    first input to have it: one that is given, else one that is no image.

    Raises:
        PlanError: If ``given`` names an unknown input or contradicts a static dimension.
    """
    given = given or {}
    unknown = given.keys() - {tensor.name for tensor in graph.inputs}
    if unknown:
        raise PlanError(
            f"sizes are given for {', '.join(sorted(unknown))}, but the inputs of the model are "
            f"{', '.join(tensor.name for tensor in graph.inputs)}"
        )
    sizes: dict[str, tuple[int, ...]] = {}
    named: dict[str, int] = {}
    caches = _caches(graph)
    for tensor in sorted(
        graph.inputs, key=lambda t: (t.name not in given, len(t.shape or ()) == 4)
    ):
        declared = list(tensor.shape or ())
        if tensor.name in given and tensor.shape is None:
            declared = [None] * len(given[tensor.name])
        if tensor.name in given:
            sizes[tensor.name] = _checked(tensor.name, declared, given[tensor.name])
        else:
            places = [batch] + [sequence] * (len(declared) - 1)
            if tensor.name not in caches and len(declared) == 4:
                places[2:] = [pixels, pixels]
            elif caches and len(declared) == 2:
                places[1] = _all_tokens(sizes, caches, sequence)
            sizes[tensor.name] = _by_place(declared, named, places)
        for name, size in zip(declared, sizes[tensor.name], strict=True):
            named.setdefault(str(name), size)
    return {tensor.name: sizes[tensor.name] for tensor in graph.inputs}


def stretched(graph: gs.Graph, given: Sizes, times: float) -> Sizes:
    """Shapes with every dimension but the first so many times as large where the model admits it.

    >>> import onnx_graphsurgeon as gs
    >>> mono = gs.Variable("sound", "float32", ("batch", 1, "samples"))
    >>> stretched(gs.Graph(inputs=[mono]), {"sound": (8, 1, 4000)}, 2)
    {'sound': (8, 1, 8000)}
    """
    declared = {tensor.name: tensor.shape for tensor in graph.inputs}
    return {
        name: tuple(
            max(int(size * times), 1) if axis and _static(fixed) is None else size
            for axis, (size, fixed) in enumerate(
                zip_longest(shape, (declared.get(name) or ())[: len(shape)])
            )
        )
        for name, shape in given.items()
    }


def sequences_to_try(graph: gs.Graph) -> Iterator[int]:
    """The usual lengths, then the commonest that the graph itself holds among its sizes.

    A model that was traced at one length, and holds it, runs at no other.
    """
    yield from DEFAULT_SEQUENCES
    yield from traced_sequences(graph)


def traced_sequences(graph: gs.Graph) -> list[int]:
    """The commonest numbers in the shapes that the graph holds, but for those of its weights."""
    constants = [t for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant)]
    widths = {size for t in constants if t.dtype not in _WHOLE for size in t.shape}
    small = [t for t in constants if t.dtype in _WHOLE and np.prod(t.shape) <= LONGEST_SHAPE]
    found = Counter(int(size) for t in small for size in np.ravel(t.values))
    usual = widths.union(DEFAULT_SEQUENCES)
    wanted = [n for n, _ in found.most_common() if n in TRACED_SEQUENCES and n not in usual]
    return wanted[:MOST_TRACED]


def batch_of(sizes: Sizes) -> int:
    """The first dimension of the first input that has others behind it, else of any; else 1.

    >>> batch_of({"scale": (), "places": (64,), "ids": (8, 64)})
    8
    """
    shapes = sorted(sizes.values(), key=lambda shape: len(shape) < 2)
    return next((shape[0] for shape in shapes if shape), DEFAULT_BATCH)


def _static(size: object) -> int | None:
    return int(size) if isinstance(size, (int, np.integer)) and size > 0 else None


def _all_tokens(sizes: Sizes, caches: Sequence[str], sequence: int) -> int:
    """New tokens and those before; new ones alone as long as nothing says how many these are."""
    new = next((shape[1] for shape in sizes.values() if len(shape) == 2), 0)
    before = next((sizes[name][2] for name in caches if name in sizes), sequence)
    return new + before if new else sequence


def _caches(graph: gs.Graph) -> list[str]:
    """Inputs that hold keys or values of tokens before: several of one form ``[b, h, ?, d]``."""
    forms = {tensor.name: tuple(map(_static, tensor.shape or ())) for tensor in graph.inputs}
    found = {
        name: form[1:]
        for name, form in forms.items()
        if len(form) == 4 and [size is None for size in form[1:]] == [False, True, False]
    }
    counts = Counter(found.values())
    return [name for name, form in found.items() if counts[form] > 1]


def _by_place(
    declared: Sequence[object], named: Mapping[str, int], places: Sequence[int]
) -> tuple[int, ...]:
    """Sizes of dynamic dimensions: by their name if it is known, else by their place."""
    return tuple(
        _static(size) or (named.get(size, place) if isinstance(size, str) and size else place)
        for size, place in zip(declared, places[: len(declared)], strict=True)
    )


def _checked(name: str, declared: Sequence[object], given: tuple[int, ...]) -> tuple[int, ...]:
    static = [_static(size) for size in declared]
    fits = len(static) == len(given) and all(
        size in {None, asked} for size, asked in zip(static, given, strict=True)
    )
    if not fits:
        shown = ["?" if size is None else size for size in static]
        raise PlanError(f"input {name!r} has shape {shown}, which {list(given)} does not fit")
    return tuple(given)
