"""What a compiled kernel executes: its instructions, and which may come after which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """An instruction at an address; where it may branch to, and whether what follows it may come next."""

    address: int
    name: str
    target: int | None
    goes_on: bool


def successors(code: Sequence[Instruction]) -> list[list[int]]:
    """Returns the places of what may come after each instruction."""
    places = {one.address: i for i, one in enumerate(code)}
    following = [[i + 1] if one.goes_on and i + 1 < len(code) else [] for i, one in enumerate(code)]
    return [
        ends if one.target is None else [*ends, places[one.target]] for one, ends in zip(code, following, strict=True)
    ]
