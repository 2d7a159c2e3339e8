"""A case: a problem, and who is measured on it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass

from .implementations import Implementation
from .problems import Problem
from .records import Record


@dataclass(frozen=True)
class Case:
    """A problem, and who is measured on it.

    Args:
        group, name: where its lines stand in the tables.
        source: makes the problem, in a process of its own.
        implementations: in the order of their turns.
        tokens, vocab, student_dim, teacher_dim, dtype: of the problem; dims are 0 where logits come in.
        scale: how the problem is smaller than the one it stands for.
        error_tokens: the first so many are compared with the truth; 0: none are.
        seconds, patience: see :func:`benchmarks.measure.rounds`.
        limit: seconds that a single answer of a worker may take.
    """

    group: str
    name: str
    source: Callable[[], Problem]
    implementations: tuple[Implementation, ...]
    tokens: int
    vocab: int
    student_dim: int = 0
    teacher_dim: int = 0
    dtype: str = "fp32"
    scale: str = ""
    error_tokens: int = 128
    seconds: float = 10.0
    patience: float = 60.0
    limit: float = 300.0

    @property
    def cost(self) -> float:
        """Roughly its seconds on two cores: starting a process, its first steps, and the rounds."""
        flops = 2 * self.tokens * self.vocab * (3 * self.student_dim + self.teacher_dim)
        step = 0.1 + flops / 8e10
        turns = step * len(self.implementations)
        return 5 + 4 * len(self.implementations) + 2 * turns + min(max(3 * turns, self.seconds), self.patience + turns)

    def record(self, implementation: Implementation) -> Record:
        """What is known before anything is measured."""
        return Record(
            self.group,
            self.name,
            implementation.name,
            implementation.objective,
            self.tokens,
            self.vocab,
            self.student_dim,
            self.teacher_dim,
            self.dtype,
            self.scale,
            version=implementation.version or "",
            date=datetime.date.today().isoformat(),
            load=round(os.getloadavg()[0], 2),
        )
