"""Generated blocks of a Markdown page, each between two HTML comments that carry its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def block(machine: Mapping[str, str], parts: Sequence[str]) -> str:
    """The machine as a list, then the parts."""
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    return "\n\n".join([facts, *parts])


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
