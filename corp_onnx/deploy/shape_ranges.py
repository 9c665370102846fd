"""Smallest, likeliest and largest dimensions of inputs: one size, or what fits a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from corp_onnx.deploy.records import ShapeRange
from corp_onnx.errors import PlanError

Shapes = Mapping[str, tuple[int, ...]]


def exactly(shapes: Shapes) -> Mapping[str, ShapeRange]:
    """Ranges of one size each, as for timing."""
    return {name: ShapeRange(dims, dims, dims) for name, dims in shapes.items()}


def fitted(
    ranges: Mapping[str, ShapeRange], inputs: Mapping[str, tuple[int | None, ...]]
) -> Mapping[str, ShapeRange]:
    """A range for every input of a model, None being a dimension that may vary.

    Inputs whose dimensions are all fixed need none. A range of an input of other dimensions, or of
    one that the model does not have, is a mistake of the request.

    Raises:
        PlanError: If so, or if an input with dimensions that vary has no range.
    """
    unknown = ranges.keys() - inputs.keys()
    if unknown:
        raise PlanError(
            f"shapes are given for {', '.join(sorted(unknown))}, which the model does not read; "
            f"its inputs are {_listed(inputs)}"
        )
    missing = {name: dims for name, dims in inputs.items() if None in dims and name not in ranges}
    if missing:
        raise PlanError(
            f"the model takes inputs of different sizes, {_listed(missing)}: say which are "
            f"likeliest with --opt-shapes {_example(missing)}, and how far they go with "
            "--min-shapes and --max-shapes"
        )
    return {
        name: _fitting(name, ranges[name], dims) if name in ranges else _fixed(dims)
        for name, dims in inputs.items()
    }


def _fitting(name: str, given: ShapeRange, dims: tuple[int | None, ...]) -> ShapeRange:
    for shape in (given.smallest, given.likeliest, given.largest):
        if len(shape) != len(dims):
            raise PlanError(
                f"{name} has {len(dims)} dimensions, {written(dims)}, but {written(shape)} is "
                f"given, which has {len(shape)}"
            )
        if any(fixed not in (None, size) for fixed, size in zip(dims, shape, strict=True)):
            raise PlanError(
                f"{name} is {written(dims)} in the model; {written(shape)} changes a dimension "
                "that is fixed there: give it as it is, or export it as one that may vary"
            )
    return given


def _fixed(dims: tuple[int | None, ...]) -> ShapeRange:
    sizes = tuple(size for size in dims if size is not None)
    return ShapeRange(sizes, sizes, sizes)


def _listed(inputs: Mapping[str, tuple[int | None, ...]]) -> str:
    return ", ".join(f"{name} [{written(dims)}]" for name, dims in inputs.items())


def _example(inputs: Mapping[str, tuple[int | None, ...]]) -> str:
    first, dims = next(iter(inputs.items()))
    return f"{first}:{written(tuple(1 if size is None else size for size in dims))}"


def written(dims: Sequence[int | None]) -> str:
    """Dimensions as a message shows them; None is one that may vary."""
    return "x".join("?" if size is None else str(size) for size in dims)
