"""Blocks of logits: their memory, one for each side, and the chunks of tokens that they are computed for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kept_memory, tensors
from .sides import HiddenSide, Rows, Side


def pitch(columns: int, device: torch.device) -> int:
    """Returns how many elements lie between the beginnings of a block's rows.

    On a GPU a multiple of 16, so that rows begin at multiples of 16 bytes in any dtype: products take cuBLAS's slowest
    kernels where they do not (pytorch #146817: 100 times slower on an A100), and Triton's kernels narrow loads.
    """
    return columns if tensors.on_host(device) else -(-columns // 16) * 16


def block_in(memory: Tensor, n: int, k: int) -> Tensor:
    """Returns a block ``[n, k]`` in flat memory."""
    row = pitch(k, memory.device)
    return memory[: n * row].view(n, row)[:, :k]


class Buffer:
    """Holds memory for one block of a side's logits, if its blocks need any."""

    def __init__(self, side: Side, block: int) -> None:
        self.side = side
        self.memory: Tensor | None = None
        if isinstance(side, HiddenSide):
            self.memory = kept_memory.empty((block,), side.dtype, side.hidden.device, kept_memory.BLOCKS)

    def logits(self, taken: Tensor, columns: slice) -> Tensor:
        """Returns the side's block of logits ``[n, k]`` for the rows taken."""
        if self.memory is None:
            return self.side.logits(taken, columns, None)
        return self.side.logits(taken, columns, block_in(self.memory, len(taken), columns.stop - columns.start))


@dataclass(frozen=True)
class Blocks:
    """Computes the blocks of both sides for one chunk of tokens after another.

    For a teacher without logits the student's block stands in.
    """

    student: Buffer
    teacher: Buffer | None

    def give_back(self, block: Block, gradient: Tensor) -> None:
        """Lets go of the last chunk's logits, which are not read again; their ``gradient`` may lie in their memory."""
        for buffer in (self.student, self.teacher):
            if buffer is not None:
                buffer.memory = None
        block.student = block.teacher = gradient

    def take(self, rows: Rows) -> Chunk:
        """Returns the chunk of these tokens."""
        teacher = self.teacher
        return Chunk(self, rows, self.student.side.take(rows), None if teacher is None else teacher.side.take(rows))


@dataclass
class Block:
    """The logits of some tokens and columns, of both sides."""

    student: Tensor  # [n, k]
    teacher: Tensor  # [n, k]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.student, self.teacher))


class Chunk(NamedTuple):
    """The rows of one chunk of tokens."""

    blocks: Blocks
    rows: Rows
    student: Tensor
    teacher: Tensor | None

    def logits(self, columns: slice) -> Block:
        """Returns a block of logits ``[n, k]``."""
        student = self.blocks.student.logits(self.student, columns)
        if self.teacher is None or self.blocks.teacher is None:
            return Block(student, student)
        return Block(student, self.blocks.teacher.logits(self.teacher, columns))
