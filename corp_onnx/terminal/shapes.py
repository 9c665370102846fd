"""Dimensions of inputs from the text of flags."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from corp_onnx.deploy.records import ShapeRange
from corp_onnx.deploy.shape_ranges import written
from corp_onnx.errors import PlanError

_SHAPE = re.compile(
    r"""(?P<quote>'?)(?P<name>[^\s,']+?)(?P=quote):    # trtexec quotes names with colons: 'input:0'
        (?P<dims>\[\s*(?:\d+\s*(?:,\s*\d+\s*)*)?\]     # polygraphy: [1,3,224,224]
            |\d+(?:,\d+)+                             # onnxslim: 1,3,224,224
            |\d+(?:x\d+)*                             # trtexec: 1x3x224x224
            |scalar)
        (?=[,\s]|$)""",
    re.VERBOSE,
)
_SEPARATOR = re.compile(r"[,\s]\s*")

SPELLINGS = "NAME:1x3x224x224, NAME:1,3,224,224 or NAME:[1,3,224,224]"


def parse_ranges(
    smallest: Sequence[str] = (), likeliest: Sequence[str] = (), largest: Sequence[str] = ()
) -> Mapping[str, ShapeRange]:
    """The ranges that ``--min-shapes``, ``--opt-shapes`` and ``--max-shapes`` say.

    Each text may name several inputs, with commas or spaces between. An input with only likeliest
    dimensions gets no others; one without a smallest or largest has its likeliest there.

    Raises:
        PlanError: If a text is of another form, an input has no likeliest dimensions, or those of
            an input are of different number or out of order.

    >>> parse_ranges(["x:1x8,y:1x2"], ["x:4x8,y:1x2"], ["x:16x8"])["x"]
    ShapeRange(smallest=(1, 8), likeliest=(4, 8), largest=(16, 8))
    """
    low, middle, high = (
        parse_shapes(texts, flag)
        for texts, flag in (
            (smallest, "--min-shapes"),
            (likeliest, "--opt-shapes"),
            (largest, "--max-shapes"),
        )
    )
    for name in (low | high).keys() - middle.keys():
        raise PlanError(
            f"{name!r} has --min-shapes or --max-shapes, but nothing says which dimensions are "
            f"likeliest: give --opt-shapes {name}:... too"
        )
    return {
        name: _range(name, low.get(name, dims), dims, high.get(name, dims))
        for name, dims in middle.items()
    }


def parse_shapes(texts: Sequence[str], flag: str) -> dict[str, tuple[int, ...]]:
    """The dimensions that one flag gives, by input; its texts may name several inputs each.

    Raises:
        PlanError: If a text is of another form, or an input has two sizes.

    >>> parse_shapes(["x:4x8,y:[1,2]"], "--shapes")
    {'x': (4, 8), 'y': (1, 2)}
    """
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        for name, dims in _parsed(text, flag):
            if found.setdefault(name, dims) != dims:
                raise PlanError(f"{flag} gives {name!r} twice, with different sizes")
    return found


def _parsed(text: str, flag: str) -> Iterable[tuple[str, tuple[int, ...]]]:
    place = 0
    while place < len(text):
        match = _SHAPE.match(text, place)
        if match is None:
            raise PlanError(
                f"{flag} {text!r} is not of the form {SPELLINGS}; several inputs with "
                "commas between"
            )
        dims = re.findall(r"\d+", match["dims"])
        yield match["name"], tuple(map(int, dims))
        separator = _SEPARATOR.match(text, match.end())
        place = separator.end() if separator else match.end()


def _range(
    name: str, low: tuple[int, ...], middle: tuple[int, ...], high: tuple[int, ...]
) -> ShapeRange:
    try:
        return ShapeRange(low, middle, high)
    except ValueError as error:
        raise PlanError(
            f"the shapes of {name!r}, from {written(low)} by {written(middle)} to "
            f"{written(high)}, are not in order: give each as many dimensions, none of which "
            "falls from --min-shapes to --opt-shapes to --max-shapes"
        ) from error
