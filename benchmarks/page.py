"""Generated blocks of a Markdown page, each between two HTML comments that carry its name, and the tables in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

QUICK_LABEL = "**Quick run: small shapes and few rounds. These are not the published figures.**"


def block(facts: Mapping[str, str], parts: Sequence[str]) -> str:
    """Joins a list of facts and the parts of a page."""
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return "\n\n".join([listed, *parts])


def replace_block(path: Path, name: str, text: str) -> None:
    """Puts ``text`` between the markers of ``name``.

    Raises:
        ValueError: the page has no such markers.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} must contain the lines {begin!r} and {end!r}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
