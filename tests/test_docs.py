"""The pages that show code: it runs, and every Objective they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eopd_kernels import Objective

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "objectives.md").read_text()


def test_the_blocks_of_the_objectives_page_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) > 2
    exec("\n".join(blocks), {"__name__": "page"})


@pytest.mark.parametrize("file", ["docs/objectives.md", "README.md"])
def test_every_objective_on_a_line_of_its_own_exists(file: str) -> None:
    names: dict[str, object] = {}
    exec("from eopd_kernels import *", names)
    found = re.findall(r"`(Objective(?:\.\w+)?\([^`]*\))`", (ROOT / file).read_text())
    assert len(found) > 8
    for line in found:
        if re.search(r"[…ταβ]", line):  # a pattern, not code
            continue
        assert isinstance(eval(line, names | {"beta": 0.5}), Objective), line


def test_links_lead_somewhere() -> None:
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples" / "README.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    for page in pages:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
