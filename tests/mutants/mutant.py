"""One thing that is broken on purpose."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One change: ``original`` occurs exactly once in ``file`` and becomes ``broken``; ``tests`` are to notice it, by
    default the runner's suite."""

    name: str
    file: str
    original: str
    broken: str
    tests: tuple[str, ...] = ()


def noticed_by(tests: tuple[str, ...], mutants: list[Mutant]) -> list[Mutant]:
    """Mutants of a room that has tests of its own."""
    return [mutant._replace(tests=tests) for mutant in mutants]
