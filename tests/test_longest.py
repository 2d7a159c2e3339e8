"""The list of the longest tests, by which test processes share them, names what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import LONGEST

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", LONGEST)
def test_it_is_there(name: str) -> None:
    file, _, of_class = name.partition("::")
    assert (ROOT / file).is_file()
    assert f"class {of_class}(" in (ROOT / file).read_text() or not of_class
