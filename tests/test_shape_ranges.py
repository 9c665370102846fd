"""Shapes in all three spellings, and what does not fit a model."""

from __future__ import annotations

import pytest

from corp_onnx.deploy.records import ShapeRange
from corp_onnx.deploy.shape_ranges import exactly, fitted
from corp_onnx.errors import PlanError
from corp_onnx.terminal.shapes import parse_ranges


def only(*texts):
    return {name: given.likeliest for name, given in parse_ranges(likeliest=texts).items()}


@pytest.mark.parametrize(
    "text", ["x:[1,3,224,224]", "x:1x3x224x224", "x:1,3,224,224", "x:[1, 3, 224, 224]"]
)
def test_the_spellings_of_polygraphy_trtexec_and_onnxslim(text):
    assert only(text) == {"x": (1, 3, 224, 224)}


@pytest.mark.parametrize(
    "texts",
    [
        ("x:1x3,y:2",),
        ("x:1x3", "y:2"),
        ("x:1,3,y:2",),
        ("x:[1,3],y:[2]",),
        ("x:[1,3] y:[2]",),
        ("x:1x3, y:2",),
    ],
)
def test_several_inputs_in_one_text_or_more(texts):
    assert only(*texts) == {"x": (1, 3), "y": (2,)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("input:0:1x3", {"input:0": (1, 3)}),
        ("input:0:1,3", {"input:0": (1, 3)}),
        ("input:0:[1,3],mask:0:[1]", {"input:0": (1, 3), "mask:0": (1,)}),
        ("input:0:7", {"input:0": (7,)}),
        ("'input:0':1x3,'x':2", {"input:0": (1, 3), "x": (2,)}),
        ("461:1x3,462:1x2", {"461": (1, 3), "462": (1, 2)}),
        ("461:1,3,462:1,2", {"461": (1, 3), "462": (1, 2)}),
        ("/model/x.1:1x3", {"/model/x.1": (1, 3)}),
        ("x:[]", {"x": ()}),
        ("x:scalar,y:2", {"x": (), "y": (2,)}),
    ],
)
def test_names_may_hold_colons_digits_and_slashes(text, expected):
    assert only(text) == expected


@pytest.mark.parametrize(
    "text", ["x", "x:", "1x3", "x:1x", "x:axb", "x:-1x3", "x:[1,3", ":1x3", "x:axb,y:2", "'x:1x3"]
)
def test_other_forms_are_refused_with_those_that_there_are(text):
    with pytest.raises(PlanError, match=r"--opt-shapes .* is not of the form NAME:1x3x224x224"):
        only(text)


def test_the_three_extents():
    assert parse_ranges(["x:1x8"], ["x:4x8"], ["x:16x8"]) == {
        "x": ShapeRange((1, 8), (4, 8), (16, 8))
    }


def test_with_only_the_likeliest_there_is_one_size():
    assert parse_ranges(likeliest=["x:4x8"]) == exactly({"x": (4, 8)})


def test_one_without_a_smallest_or_largest_has_its_likeliest_there():
    given = parse_ranges(["x:1x8"], ["x:4x8,y:2"], ["y:3"])
    assert given == {"x": ShapeRange((1, 8), (4, 8), (4, 8)), "y": ShapeRange((2,), (2,), (3,))}


def test_one_without_a_likeliest_is_refused():
    with pytest.raises(PlanError, match=r"give --opt-shapes x:\.\.\. too"):
        parse_ranges(["x:1"], [], ["x:4"])


def test_two_sizes_of_one_input_are_refused():
    with pytest.raises(PlanError, match="gives 'x' twice"):
        only("x:1", "x:2")
    assert only("x:1", "x:1") == {"x": (1,)}


@pytest.mark.parametrize("low", ["x:5x8", "x:4x8x1"])
def test_ranges_out_of_order_are_refused(low):
    with pytest.raises(PlanError, match="from --min-shapes to --opt-shapes to --max-shapes"):
        parse_ranges([low], ["x:4x8"])


INPUTS = {"x": (None, 3), "fixed": (2, 2)}


def test_inputs_of_fixed_dimensions_need_no_range():
    given = parse_ranges(["x:1x3"], ["x:2x3"])
    assert fitted(given, INPUTS) == {**given, **exactly({"fixed": (2, 2)})}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "x:2x3,z:1",
            r"given for z, which the model does not read; its inputs are x \[\?x3\], fixed",
        ),
        ("x:2x3x1", "x has 2 dimensions, \\?x3, but 2x3x1 is given, which has 3"),
        ("x:2x4", "x is \\?x3 in the model; 2x4 changes a dimension that is fixed"),
        ("fixed:2x2", r"sizes, x \[\?x3\]: say which are likeliest with --opt-shapes x:1x3"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(text, message):
    with pytest.raises(PlanError, match=message):
        fitted(parse_ranges(likeliest=[text]), INPUTS)
