"""What the project must reach, as lines of a table: ours against a peer on one case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .implementations import (
    ADD,
    BACKWARD,
    BACKWARD_FILTERED,
    COMPILED,
    DX_BF16,
    DX_FP32,
    FILTERED,
    FLOOR,
    HUGE,
    INPLACE,
    KERNEL,
    LIGER,
    ORDA_GATED,
    OURS,
    OURS_REVERSE,
    PLAIN,
    PRODUCTS,
    SCALED,
    TOUCH,
    TRL,
    UNCHUNKED,
)
from .matrix import REAL, TARGETS, Level, real
from .records import Record
from .results import Row, Target, compared


@dataclass(frozen=True)
class Goal:
    """A line to come. ``against`` None: the target is absolute. ``target`` None: it bounds another line."""

    case: str
    ours: str
    against: str | None
    target: Target | None

    @property
    def of_memory(self) -> bool:
        return self.target is not None and self.target.kind in ("less memory", "MiB")


def goals(level: Level) -> list[Goal]:
    """Under a level's own sizes; the targets are those of the published ones."""

    def hidden(tokens: int, dtype: str = "fp32") -> str:
        return f"hidden states N={tokens:,}, V={level.vocab:,}, D={level.dim:,} {dtype}"

    logits = f"logits {level.rows:,} x {level.logits_vocab:,} fp32"
    main, usual, long = hidden(level.main_tokens), hidden(level.tokens), hidden(level.long_tokens)
    beside = [
        (OURS, PLAIN, 1.5, 25),
        (OURS, COMPILED, 1.3, 10),
        (OURS_REVERSE, TRL, 2.2, 5),
        (OURS_REVERSE, LIGER, 1.3, 3),
        (OURS, ORDA_GATED, 2.8, 25),
    ]
    made = [Goal(main, ours, peer, Target("faster", faster)) for ours, peer, faster, _ in beside]
    made += [Goal(main, ours, peer, Target("less memory", less)) for ours, peer, _, less in beside]
    made += [Goal(main, OURS, PRODUCTS, Target("its time", 1.1))]
    made += [
        Goal(usual, OURS, PRODUCTS, Target("its time", 1.1)),
        Goal(usual, OURS, PLAIN, Target("faster", 1.5)),
        Goal(usual, OURS, PLAIN, Target("less memory", 15)),
        *(Goal(case, OURS, None, Target("MiB", 160)) for case in (usual, main, long)),
        *(Goal(logits, ours, PLAIN, Target("faster", 25)) for ours in (OURS, INPLACE)),
        *(Goal(logits, ours, COMPILED, Target("faster", 8)) for ours in (OURS, INPLACE)),
        *(Goal(logits, ours, ADD, Target("its time", 1.8)) for ours in (KERNEL, OURS, INPLACE)),
        Goal(hidden(level.tokens, "bf16"), OURS, PLAIN, Target("faster", 15)),
    ]
    late = real(level)[0].name  # the student that is nearest to its teacher, as late in training
    made += [
        Goal(late, FILTERED[12], PRODUCTS, Target("its time", 1.0)),
        Goal(late, BACKWARD_FILTERED, BACKWARD, Target("its time", 0.5)),
    ]
    bounds = [(logits, TOUCH, ADD), (logits, HUGE, ADD), (logits, SCALED, ADD), (usual, PRODUCTS, UNCHUNKED)]
    bounds += [(main, PRODUCTS, peer) for peer in (COMPILED, LIGER)]
    bounds.append((hidden(level.tokens, "bf16"), DX_BF16, DX_FP32))
    return made + [Goal(case, ours, against, None) for case, ours, against in bounds]


def rows(goals: Sequence[Goal], records: Sequence[Record]) -> list[Row]:
    """A line for each goal whose two sides were run; where one of them failed, the line says that."""
    found = {(r.case, r.implementation): r for r in records if r.group in (TARGETS, REAL)}
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


def objectives(ours: Record, peer: Record) -> str:
    """What is compared with what."""
    if peer.objective == FLOOR:
        return "no loss"
    return ours.objective if peer.objective == ours.objective else f"{peer.objective}; ours {ours.objective}"
