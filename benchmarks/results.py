"""A row of the tables: what was measured against what, the target and whether it is reached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .measure import Sample

Kind = Literal["faster", "less memory", "its time", "MiB"]


@dataclass(frozen=True)
class Target:
    """A bound on a ratio or on memory: from below for "faster" and "less memory", else from above."""

    kind: Kind
    bound: float

    @property
    def from_below(self) -> bool:
        return self.kind in ("faster", "less memory")

    def met(self, reached: Sample) -> bool:
        return reached.median >= self.bound if self.from_below else reached.median <= self.bound

    def __str__(self) -> str:
        separator = " " if self.kind == "MiB" else "x "
        return f"{'≥' if self.from_below else '≤'} {self.bound:g}{separator}{self.kind}"


@dataclass(frozen=True)
class Row:
    """One line. ``reached`` has the target's unit; ``peer`` is None where the target is absolute.

    A side that has failed is the words that say why, and then nothing is reached.
    """

    case: str
    against: str
    target: Target | None
    reached: Sample | None
    ours: Sample | str
    peer: Sample | str | None = None

    @property
    def met(self) -> bool | None:
        return None if self.target is None or self.reached is None else self.target.met(self.reached)

    def cells(self) -> list[str]:
        verdict = {None: "–", True: "yes", False: "**no**"}[self.met]
        return [self.case, self.against, words(self.target), words(self.reached), verdict, *map(words, self.sides)]

    @property
    def sides(self) -> tuple[Sample | str, Sample | str | None]:
        return self.ours, self.peer


def compared(case: str, against: str, target: Target | None, ours: Sample, peer: Sample) -> Row:
    """A row whose figure is a ratio: how many times better ours is, or what share of the peer it takes."""
    better = target is not None and target.from_below
    return Row(case, against, target, peer / ours if better else ours / peer, ours, peer)


HEADER = ("case", "against", "target", "reached", "met", "ours, median (min–max)", "peer, median (min–max)")


def words(value: object) -> str:
    """A cell; a dash for what there is not."""
    return "–" if value is None else str(value)


def ratio_table(rows: Iterable[Row]) -> str:
    return markdown_table(HEADER, [row.cells() for row in rows])


def bound_table(rows: Iterable[Row]) -> str:
    """Rows without a target: one thing in units of another."""
    header = ("what", "in units of", "ratio", "median (min–max)", "of the unit")
    return markdown_table(
        header, [[row.case, row.against, words(row.reached), words(row.ours), words(row.peer)] for row in rows]
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
