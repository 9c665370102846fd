"""The page of families says what is found."""

from __future__ import annotations

import pytest

from tests.zoo_properties import found
from tools.families import PAGE, page


@pytest.mark.slow
def test_the_page_of_families_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(lambda name: found(name)[1])
