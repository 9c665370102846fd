"""Whether arrays fit a model's inputs, and the one cast that makes them fit."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from corp_onnx.data.preprocessing import Preprocessing
from corp_onnx.data.stores import Layout
from corp_onnx.errors import DataError
from corp_onnx.graph.inputs import InputSpec

WHOLE = frozenset("biu")
"""NumPy's kinds of truth values and whole numbers."""


_log = logging.getLogger(__name__)


def require_batchable(inputs: Sequence[InputSpec]) -> None:
    """Every input of the model must have an axis for samples, of one size if it is fixed.

    Raises:
        DataError: If one has none, or two have different sizes.
    """
    for spec in inputs:
        if not spec.shape:
            raise DataError(
                f"the model's input {spec.name!r} is a single number with no axis for samples; "
                "make it a constant of the model, or export the model without it"
            )
    fixed = {spec.name: spec.shape[0] for spec in inputs if spec.shape[0] is not None}
    if len(set(fixed.values())) > 1:
        listed = ", ".join(f"{name!r} has {size}" for name, size in fixed.items())
        raise DataError(
            f"the model's inputs have first axes of different fixed sizes ({listed}), so it takes "
            "no batches; export it with the batch as the first axis of every input"
        )


def require_fit(
    where: str,
    layout: Layout,
    inputs: Sequence[InputSpec],
    *,
    preprocessing: Preprocessing | None,
) -> None:
    """Names, shapes and dtypes of a source must be those of the model, or castable to them.

    Raises:
        DataError: At the first that does not fit; says what was expected and what was found.
    """
    _require_names(where, [spec.name for spec in layout], [spec.name for spec in inputs])
    found = {spec.name: spec for spec in layout}
    for wanted in inputs:
        offered = found[wanted.name]
        _require_shape(where, offered, wanted)
        if not _is_normalised(wanted, offered.dtype, preprocessing):
            _require_castable(where, offered, wanted)


def fitted(
    spec: InputSpec,
    array: Shaped[np.ndarray, "b ..."],
    *,
    preprocessing: Preprocessing | None,
    name: Callable[[int], str],
) -> Shaped[np.ndarray, "b ..."]:
    """A batch in the dtype of the model's input, with every value preserved or rounded.

    Pixels in uint8 are normalised if there is a preprocessing for that input.

    Args:
        spec: The model's input.
        array: A batch for it, of a dtype that `require_fit` let pass.
        preprocessing: The model's, if it has one.
        name: What to call a row of the batch in a message.

    Raises:
        DataError: If a value is not finite, or the dtype cannot hold it.
    """
    if preprocessing is not None and _is_normalised(spec, array.dtype, preprocessing):
        array = preprocessing.normalise(array)
    if array.dtype.kind in WHOLE:
        _require_in_range(spec, array, name)
        return array.astype(spec.dtype, copy=False)
    _require_none(~np.isfinite(array), spec, name, "is not finite (NaN or infinity)")
    with np.errstate(over="ignore"):
        cast = array.astype(spec.dtype, copy=False)
    if cast is not array:
        _require_none(~np.isfinite(cast), spec, name, f"is too large for {spec.dtype}")
    return cast


def listed(names: Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(repr(name) for name in names) or "none"


def only_input(source: str, what: str, specs: Layout) -> str:
    """The name of the one input that a source of one array per sample can fill.

    Raises:
        DataError: If the model has several.
    """
    if len(specs) == 1:
        return specs[0].name
    raise DataError(
        f"{source}: {what} one input, but the model has {listed([spec.name for spec in specs])}; "
        "save all of them in a .npz under these names"
    )


def shape_text(spec: InputSpec) -> str:
    """A shape for a message: n counts samples, ? is any size."""
    sizes = ["?" if size is None else str(size) for size in spec.shape[1:]]
    return f"[{', '.join(['n', *sizes])}]"


def _require_names(where: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    if not missing:
        if unknown:
            _log.info("%s also has %s, which the model does not read", where, listed(unknown))
        return
    hints = [
        f"{name!r} may be meant as {close[0]!r}"
        for name in unknown
        if (close := difflib.get_close_matches(name, missing, n=1, cutoff=0.4))
    ]
    raise DataError(
        f"{where} has the arrays {listed(found)}, but the model's inputs are {listed(wanted)} "
        f"(missing: {listed(missing)}; unknown: {listed(unknown)}); name the arrays as the inputs "
        f"are named{''.join(f', {hint}' for hint in hints)}"
    )


def _require_shape(where: str, found: InputSpec, wanted: InputSpec) -> None:
    same = len(found.shape) == len(wanted.shape) and all(
        want is None or have == want
        for have, want in zip(found.shape[1:], wanted.shape[1:], strict=True)
    )
    if not same:
        raise DataError(
            f"{where} gives {found.name!r} the shape {shape_text(found)}, but the model expects "
            f"{shape_text(wanted)} (n: samples, ?: any size); bring the data into that shape, "
            "or export the model for this one"
        )


def _is_normalised(
    spec: InputSpec, dtype: np.dtype[Any], preprocessing: Preprocessing | None
) -> bool:
    """Whether data of this dtype are pixels that the preprocessing turns into the input."""
    meant = preprocessing is not None and preprocessing.input == spec.name
    return meant and dtype == np.uint8 and spec.dtype.kind == "f"


def _require_castable(where: str, found: InputSpec, wanted: InputSpec) -> None:
    have, want = found.dtype, wanted.dtype
    if have == want or {have.kind, want.kind} <= WHOLE or have.kind == want.kind == "f":
        return
    if have == np.uint8 and want.kind == "f":
        remedy = (
            "pixels must be scaled as they were in training: write a <model>.preprocessing.json "
            "for that input, or give them already normalised"
        )
    elif have.kind in WHOLE and want.kind == "f":
        remedy = "if these numbers are what the model expects, convert them with .astype first"
    elif have.kind == "f" and want.kind in WHOLE:
        remedy = "a cast would drop fractions; round and convert them yourself, if that is meant"
    else:
        remedy = "there is no safe cast; give numbers of the model's dtype"
    raise DataError(
        f"{where} gives {found.name!r} as {have}, but the model expects {want}: {remedy}"
    )


def _require_in_range(
    spec: InputSpec, array: Shaped[np.ndarray, "b ..."], name: Callable[[int], str]
) -> None:
    """Whole numbers must be values of the model's dtype."""
    low, high = (0, 1) if spec.dtype.kind == "b" else _limits(spec.dtype)
    if array.size and (int(array.min()) < low or int(array.max()) > high):
        outside = np.array([int(row.min()) < low or int(row.max()) > high for row in array])
        row = int(np.flatnonzero(outside)[0])
        raise DataError(
            f"input {spec.name!r}: {name(row)} holds whole numbers from {array[row].min()} to "
            f"{array[row].max()}, but the model's {spec.dtype} only goes from {low} to {high}; "
            "correct the data, or export the model with a wider dtype"
        )


def _limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    limits = np.iinfo(dtype)
    return int(limits.min), int(limits.max)


def _require_none(
    bad: Bool[np.ndarray, "b ..."], spec: InputSpec, name: Callable[[int], str], what: str
) -> None:
    """No value may be bad."""
    if bad.any():
        first = np.argwhere(bad)[0]
        where = f" at {first[1:].tolist()}" if len(first) > 1 else ""
        raise DataError(
            f"input {spec.name!r}: a value of {name(int(first[0]))}{where} {what}; correct that "
            "sample or take it away"
        )


def how_to_preprocess(folder: Path, spec: InputSpec) -> str:
    """What to say of a folder of images where the model has no recipe for pictures."""
    if len(spec.shape) != 4:
        return (
            f"{folder} is a folder, so of images, but the model's input {spec.name!r} has shape "
            f"{shape_text(spec)} and takes none; give arrays in a .npz"
        )
    height, width = (size or 224 for size in spec.shape[2:])
    grey = spec.shape[1] == 1
    mean, std = ((0.5,), (0.5,)) if grey else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    example = Preprocessing(
        *(spec.name, (height, width), len(mean), mean, std), interpolation="bicubic", crop_pct=0.9
    )
    used = "pixels between -1 and 1" if grey else "ImageNet's mean and standard deviation"
    return (
        f"{folder} holds images, but there is no <model>.preprocessing.json beside the model that "
        f"says how a picture becomes its input; write one. For a model trained with {used} it "
        f"holds {json.dumps(asdict(example))}"
    )
