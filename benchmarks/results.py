"""A row of the tables: what was measured against what, the target and whether it is reached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

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
    """One line. ``reached`` has the target's unit; ``peer`` is None where the target is absolute."""

    case: str
    against: str
    target: Target | None
    reached: Sample
    ours: Sample
    peer: Sample | None = None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.target.met(self.reached)

    def cells(self) -> list[str]:
        verdict = {None: "–", True: "yes", False: "**no**"}[self.met]
        target = "–" if self.target is None else str(self.target)
        peer = "–" if self.peer is None else str(self.peer)
        return [self.case, self.against, target, str(self.reached), verdict, str(self.ours), peer]

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def compared(case: str, against: str, target: Target | None, ours: Sample, peer: Sample) -> Row:
    """A row whose figure is a ratio: how many times better ours is, or what share of the peer it takes."""
    better = target is not None and target.from_below
    return Row(case, against, target, peer / ours if better else ours / peer, ours, peer)


HEADER = ("case", "against", "target", "reached", "met", "ours, median (min–max)", "peer, median (min–max)")


def ratio_table(rows: Iterable[Row]) -> str:
    return markdown_table(HEADER, [row.cells() for row in rows])


def summary_table(rows: Iterable[Row]) -> str:
    """What a newcomer asks, in three columns, for a front page: how it compares with plain PyTorch, and its memory."""
    lines = []
    for row in rows:
        if row.target is not None and (row.target.kind == "MiB" or row.against.startswith("plain PyTorch")):
            unit = "" if row.target.kind == "MiB" else f" {row.target.kind}"
            lines.append([row.case, row.against, f"{row.reached}{unit}"])
    return markdown_table(("what", "against", "median (min–max)"), lines)


def bound_table(rows: Iterable[Row]) -> str:
    """Rows without a target: one thing in units of another."""
    header = ("what", "in units of", "ratio", "median (min–max)", "of the unit")
    return markdown_table(
        header, [[row.case, row.against, str(row.reached), str(row.ours), str(row.peer)] for row in rows]
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
