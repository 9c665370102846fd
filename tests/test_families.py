"""The page of families says what is found."""

from __future__ import annotations

import pytest

from corp_onnx.blocks import find_blocks
from tests.zoo_properties import found
from tools.families import PAGE, page


@pytest.mark.slow
def test_the_page_of_families_is_up_to_date():
    def catalog(name, rotary):
        model, plain = found(name)
        return find_blocks(model, rotary=True) if rotary else plain

    assert PAGE.read_text(encoding="utf-8") == page(catalog)
