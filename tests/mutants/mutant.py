"""One thing that is broken on purpose."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One change: ``original`` occurs exactly once in ``file`` and becomes ``broken``."""

    name: str
    file: str
    original: str
    broken: str
