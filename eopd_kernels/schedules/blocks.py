"""Blocks of logits: memory for one block of each side, and the chunks of tokens they are taken of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .. import tensors
from .sides import HiddenSide, Rows, Side


class Buffer:
    """Memory for one block of a side's logits, if its blocks need any."""

    def __init__(self, side: Side, block: int) -> None:
        self.side = side
        self.memory: Tensor | None = None
        if isinstance(side, HiddenSide):
            self.memory = tensors.empty((block,), side.dtype, side.hidden.device)

    def logits(self, taken: Tensor, columns: slice) -> Tensor:
        """The side's block of logits for the rows taken, ``[n, k]``."""
        if self.memory is None:
            return self.side.logits(taken, columns, None)
        n, k = len(taken), columns.stop - columns.start
        return self.side.logits(taken, columns, self.memory[: n * k].view(n, k))


@dataclass(frozen=True)
class Blocks:
    """Both sides' blocks of one chunk of tokens after another; the student's own for a teacher without logits."""

    student: Buffer
    teacher: Buffer | None

    def take(self, rows: Rows) -> Chunk:
        """The chunk of these tokens."""
        teacher = self.teacher
        return Chunk(self, rows, self.student.side.take(rows), None if teacher is None else teacher.side.take(rows))


class Chunk(NamedTuple):
    """The rows of one chunk of tokens."""

    blocks: Blocks
    rows: Rows
    student: Tensor
    teacher: Tensor | None

    def logits(self, columns: slice) -> tuple[Tensor, Tensor]:
        """A block of student and teacher logits ``[n, k]``."""
        student = self.blocks.student.logits(self.student, columns)
        if self.teacher is None or self.blocks.teacher is None:
            return student, student
        return student, self.blocks.teacher.logits(self.teacher, columns)
