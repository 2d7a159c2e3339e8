"""What the project must reach, as lines of a table: ours against a peer on one case."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from . import contenders as of
from .contenders import FLOOR, OURS, OURS_REVERSE, PLAIN, PRODUCTS
from .matrix import HEADS, MODELS, REAL, TARGETS, TINY, Level, pair, real
from .measure import Sample
from .page import markdown_table
from .problems import Shape
from .records import Record


@dataclass(frozen=True)
class Target:
    """A bound on a ratio or on memory: from below for "faster" and "less memory", else from above."""

    kind: Literal["faster", "less memory", "its time", "MiB"]
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
class Goal:
    """A comparison on a case. ``against`` None: the target is absolute. ``target`` None: it bounds another line."""

    case: str
    ours: str
    against: str | None
    target: Target | None

    @property
    def of_memory(self) -> bool:
        return self.target is not None and self.target.kind in ("less memory", "MiB")


@dataclass(frozen=True)
class Row:
    """One line of the table. Where a side has failed, it is the reason in words, and nothing is reached.

    ``reached`` has the target's unit; ``peer`` is None where the target is absolute.
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


def goals(level: Level) -> list[Goal]:
    """Returns the goals with the sizes of a level; the targets are those of the published sizes."""

    def hidden(tokens: int, dtype: str = "fp32") -> str:
        return f"hidden states {Shape(tokens, level.vocab, level.dim, level.dim)} {dtype}"

    logits = f"logits {level.rows:,} x {level.logits_vocab:,} fp32"
    main, usual, long = hidden(level.main_tokens), hidden(level.tokens), hidden(level.long_tokens)
    # What the products alone take of the time of torch.compile and of Liger bounds how much faster a loss can be.
    beside = [(OURS, PLAIN, 1.5), (OURS_REVERSE, of.TRL, 2.2), (OURS, of.ORDA_GATED, 2.8)]
    lean = [
        (OURS, PLAIN, 25),
        (OURS, of.COMPILED, 10),
        (OURS_REVERSE, of.TRL, 5),
        (OURS_REVERSE, of.LIGER, 3),
        (OURS, of.ORDA_GATED, 25),
    ]
    made = [Goal(main, ours, peer, Target("faster", faster)) for ours, peer, faster in beside]
    made += [Goal(main, ours, peer, Target("less memory", less)) for ours, peer, less in lean]
    for few in (pair(*names) for names in level.pairs if HEADS[names[0]].vocab >= 128_000):
        made += [Goal(few, OURS, PLAIN, Target("less memory", 1.0)), Goal(few, OURS, PRODUCTS, Target("its time", 1.1))]
    late = real(level)[0].name  # the student that is nearest to its teacher, as late in training
    made += [
        Goal(main, OURS, PRODUCTS, Target("its time", 1.03)),
        Goal(TINY, OURS, PLAIN, Target("its time", 2.3)),
        Goal(usual, OURS, PRODUCTS, Target("its time", 1.1)),
        Goal(usual, OURS, PLAIN, Target("faster", 1.5)),
        Goal(usual, OURS, PLAIN, Target("less memory", 15)),
        *(Goal(case, OURS, None, Target("MiB", 160)) for case in (usual, main, long)),
        *(Goal(logits, ours, PLAIN, Target("faster", 25)) for ours in (OURS, of.INPLACE)),
        *(Goal(logits, ours, of.COMPILED, Target("faster", 8)) for ours in (OURS, of.INPLACE)),
        *(Goal(logits, ours, of.ADD, Target("its time", 1.6)) for ours in (of.KERNEL, OURS, of.INPLACE)),
        Goal(hidden(level.tokens, "bf16"), OURS, PLAIN, Target("faster", 15)),
        Goal(late, of.FILTERED[12], PRODUCTS, Target("its time", 0.6)),
        Goal(late, of.BACKWARD_FILTERED, of.BACKWARD, Target("its time", 0.5)),
    ]
    bounds = [(logits, of.TOUCH, of.ADD), (logits, of.HUGE, of.ADD), (logits, of.SCALED, of.ADD)]
    bounds += [(usual, PRODUCTS, of.UNCHUNKED), (main, PRODUCTS, of.COMPILED), (main, PRODUCTS, of.LIGER)]
    bounds += [(main, OURS, of.COMPILED), (main, OURS_REVERSE, of.LIGER)]
    bounds.append((hidden(level.tokens, "bf16"), of.DX_BF16, of.DX_FP32))
    return made + [Goal(case, ours, against, None) for case, ours, against in bounds]


def rows(goals: Sequence[Goal], records: Sequence[Record]) -> list[Row]:
    """Makes a line for each goal whose two sides were run; where one of them failed, the line says that."""
    found = {(r.case, r.implementation): r for r in records if r.group in (TARGETS, MODELS, REAL)}
    made = []
    for goal in goals:
        ours = found.get((goal.case, goal.ours))
        peer = found.get((goal.case, goal.against)) if goal.against else ours
        if ours is not None and peer is not None:
            made.append(row(goal, ours, peer))
    return made


def row(goal: Goal, ours: Record, peer: Record) -> Row:
    beyond = ", memory beyond inputs and gradients" if goal.of_memory else ""
    case = f"{goal.case}, {goal.ours}{beyond}"
    against = f"{peer.implementation} ({objectives(ours, peer)})" if goal.against else "–"
    ours_value, peer_value = (r.memory if goal.of_memory else r.time for r in (ours, peer))
    if ours_value is None or peer_value is None:
        return Row(case, against, goal.target, None, ours_value or ours.failure, peer_value or peer.failure)
    if goal.against is None:
        return Row(case, against, goal.target, ours_value, ours_value)
    if 0 in (*ours_value.values, *peer_value.values):  # memory too small to be seen: there is no ratio
        return Row(case, against, goal.target, None, ours_value, peer_value)
    return compared(case, against, goal.target, ours_value, peer_value)


def compared(case: str, against: str, target: Target | None, ours: Sample, peer: Sample) -> Row:
    """Makes a row whose figure is a ratio: how many times better ours is, or what share of the peer it takes."""
    better = target is not None and target.from_below
    return Row(case, against, target, peer / ours if better else ours / peer, ours, peer)


def objectives(ours: Record, peer: Record) -> str:
    """Says which objectives are compared."""
    if peer.objective == FLOOR:
        return "no loss"
    return ours.objective if peer.objective == ours.objective else f"{peer.objective}; ours {ours.objective}"


def ratio_table(rows: Iterable[Row]) -> str:
    """Formats rows with targets."""
    header = ("case", "against", "target", "reached", "met", "ours, median (min–max)", "peer, median (min–max)")
    verdicts = {None: "–", True: "yes", False: "**no**"}
    return markdown_table(
        header,
        [
            [*map(words, (r.case, r.against, r.target, r.reached)), verdicts[r.met], words(r.ours), words(r.peer)]
            for r in rows
        ],
    )


def bound_table(rows: Iterable[Row]) -> str:
    """Formats rows without a target: one thing in units of another."""
    header = ("what", "in units of", "ratio", "median (min–max)", "of the unit")
    return markdown_table(header, [[*map(words, (r.case, r.against, r.reached, r.ours, r.peer))] for r in rows])


def words(value: object) -> str:
    """Formats a cell, None as a dash."""
    return "–" if value is None else str(value)
