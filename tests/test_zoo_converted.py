"""The zoo as simplifiers, converters and optimisers leave it: the same blocks, the same properties.

Every module is tried with both simplifiers, in one of its forms, and with every other of the
remaining tools; with ``CORP_ONNX_EVERY_FORM`` in the environment with all, in all of its forms.
"""

from __future__ import annotations

import os

import pytest

from tests import zoo_properties as zoo
from tests.converted import DIFFERENT, FAILING, TOOLS, is_static
from tests.full_width import run, squared_error
from tests.zoo_models import NAMES, TOKENS, feeds, load, module_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("rarely_collected", "uncounted")]

RESHAPED = ("onnxslim", "onnxsim", "opset24")
"""Tools behind which a model is what it was, spelled otherwise: all properties must hold.

They are the first of all tools, so that tests of one model have it under one number.
"""


SIMPLIFIERS = RESHAPED[:2]


def chosen(tool):
    """Models for a tool: of a module one form, another one for the next tool."""
    forms = {}
    for name in NAMES:
        forms.setdefault(module_of(name), []).append(name)
    turn = list(TOOLS).index(tool)
    rotated = [
        names[turn % len(names)]
        for place, names in enumerate(forms.values())
        if tool in SIMPLIFIERS or (place + turn) % 2
    ]
    different = [name for name, other in DIFFERENT if other == tool]
    every = "CORP_ONNX_EVERY_FORM" in os.environ
    return NAMES if every else tuple(dict.fromkeys((*rotated, *different)))


def converted(tools):
    return [
        f"{name}@{tool}" for tool in tools for name in chosen(tool) if (name, tool) not in FAILING
    ]


@pytest.fixture(scope="module")
def name(request):
    """A converted model: all tests of one model run together, and share what they found."""
    yield request.param
    zoo.forget()


every_tool = pytest.mark.parametrize("name", converted(TOOLS), indirect=True, scope="module")
reshaped = pytest.mark.parametrize("name", converted(RESHAPED), indirect=True, scope="module")


@every_tool
def test_the_tool_leaves_the_function_and_the_inputs_as_they_were(name):
    exported, _, tool = name.partition("@")
    whole, made = load(exported), zoo.given(name)
    sizes = [(2, TOKENS)] if is_static(tool) else [(1, TOKENS + 4), (3, TOKENS - 3)]
    inputs = [feeds(name, *size) for size in sizes]
    for pair in zip(run(made, *inputs), run(whole, *inputs), strict=True):
        assert squared_error(*pair) <= zoo.bound(name)
    if not is_static(tool):
        assert list(map(str, made.graph.input)) == list(map(str, whole.graph.input))


@pytest.mark.parametrize(("name", "tool"), FAILING)
def test_tools_that_fail_still_do(name, tool):
    with pytest.raises(RuntimeError, match="topologically sorted"):
        load(f"{name}@{tool}")


@every_tool
def test_the_catalog_is_the_truth(name):
    """Where it is not, that is the tool's doing, and known."""
    if tuple(name.split("@")) in DIFFERENT:
        with pytest.raises(AssertionError):
            zoo.require_the_truth(name)
    else:
        zoo.require_the_truth(name)


@every_tool
def test_refusals_give_reasons_and_nothing_large_goes_unmentioned(name):
    zoo.require_reasons(name)
    zoo.require_every_layer(name)


@reshaped
def test_ratio_0_gives_back_the_function(name):
    zoo.require_exactness_at_ratio_0(name)


@reshaped
def test_another_basis_gives_back_the_function(name):
    zoo.require_exactness_in_another_basis(name)


@reshaped
def test_half_a_model_is_whole_and_keeps_its_promises(name):
    zoo.require_half_a_model(name)
