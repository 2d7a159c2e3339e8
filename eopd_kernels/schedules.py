"""The order in which blocks of logits come and go: "chunked" by tokens, "recompute" by slices of the vocabulary.

chunked                                     recompute
             V                                           V
    ┌───────────────────┐                       ┌────┬────┬────┬────┐
    │ ───────────────►  │ chunk 1               │ │  │ │  │ │  │ │  │   statistics of every slice, merged;
  N ├───────────────────┤                     N │ ▼  │ ▼  │ ▼  │ ▼  │   then every slice once more,
    │ ───────────────►  │ chunk 2               │    │    │    │    │   for the gradient
    └───────────────────┘                       └────┴────┴────┴────┘
F(3·D_s + D_t) flops, gradient while the    F(4·D_s + 2·D_t) flops, the logits are projected
chunk's logits are alive                    again in backward
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import devices, memory
from .objective import Coefficients, Objective
from .rows import RowFunctions
from .sides import HiddenGradient, HiddenSide, LogitsGradient, LogitsSide, Rows, Side, StudentGradient
from .statistics import RowStatistics

SCHEDULES = ("chunked", "recompute")
CPU = torch.device("cpu")

# Where no budget is asked for: the blocks of logits that live at one time (both sides, and the gradient where it has
# memory of its own), and the fewest tokens of a chunk. Each chunk reads both heads and dW again: at V = 151,936 and
# D = 1024 chunks of 103 tokens (128 MiB) cost 29 % over the unchunked products, chunks of 128 cost 17 %. Measured in
# docs/benchmarks.md, "Workspace".
WORKSPACE_BYTES = 128 * 2**20
USUAL_MIN_TOKENS = 128
# The same on a GPU. A chunk of M tokens reads and writes the fp32 dW, 8·V·D bytes, beside a product of 2·M·V·D flops:
# at the data sheets' bf16 rates and bandwidths the product takes as long from M = 4·rate/bandwidth on: 610 (A100),
# 1,180 (H100), 820 (H200), 1,130 (B200). So a chunk may have 1,024 tokens even where that exceeds the budget
# (V = 151,936 in bf16: 1.6 GB), and a batch of 1,024 tokens or fewer is never split into launches too small to fill the
# device. Arithmetic, not measured.
GPU_WORKSPACE_BYTES = 2**30
GPU_USUAL_MIN_TOKENS = 1024
# No budget, however small, makes blocks smaller than these: the products would cost a multiple.
MIN_TOKENS = 32
MIN_COLUMNS = 512


class Tiling(NamedTuple):
    """The shape of a block: at most so many tokens and so many entries of the vocabulary."""

    tokens: int
    columns: int


@dataclass(frozen=True)
class Problem:
    """One call of the loss, as the schedules see it.

    Args:
        student, teacher: the two sides, N rows each.
        weights: ``[N]`` in the compute dtype, 0 where masked.
        index: ``[M]`` the tokens that count, or None where all N are visited.
        objective: what is minimised.
        functions: the backend's row functions.
        tiling: the shape of a block.
    """

    student: Side
    teacher: Side
    weights: Tensor
    index: Tensor | None
    objective: Objective
    functions: RowFunctions
    tiling: Tiling

    @property
    def transforms(self) -> list[float]:
        temperature = self.objective.temperature
        return [*self.student.transform, temperature, *self.teacher.transform, temperature]

    def chunks(self) -> Iterator[Rows]:
        """The chunks of tokens, none larger than the tiling says, all within one run of either side."""
        if self.index is not None:
            yield from (part for part in self.index.split(self.tiling.tokens) if len(part))
            return
        start, stop = 0, len(self.weights)
        while start < stop:
            ends = [start + self.tiling.tokens, stop]
            ends += [(start // side.run + 1) * side.run for side in (self.student, self.teacher)]
            yield slice(start, min(ends))
            start = min(ends)

    def slices(self) -> Iterator[slice]:
        """The slices of the vocabulary."""
        size = self.student.vocab_size
        for start in range(0, size, self.tiling.columns):
            yield slice(start, min(start + self.tiling.columns, size))

    @property
    def block(self) -> int:
        """The most logits of a block."""
        return min(self.tiling.tokens, len(self.weights)) * self.tiling.columns

    def buffers(self) -> tuple[Buffer, Buffer]:
        """Memory for one block of each side."""
        return Buffer(self.student, self.block), Buffer(self.teacher, self.block)


class Buffer:
    """The memory of one block, allocated once a pass: fresh pages would cost as much as the kernel that fills them."""

    def __init__(self, side: Side, block: int) -> None:
        self.side = side
        self.memory: Tensor | None = None
        if isinstance(side, HiddenSide):
            self.memory = memory.empty((block,), side.dtype, side.hidden.device)

    def logits(self, taken: Tensor, columns: slice) -> Tensor:
        """The side's block of logits for the rows taken, ``[n, k]``."""
        if self.memory is None:
            return self.side.logits(taken, columns, None)
        n, k = len(taken), columns.stop - columns.start
        return self.side.logits(taken, columns, self.memory[: n * k].view(n, k))


def usual_workspace(device: torch.device) -> tuple[int, int]:
    """The budget in bytes and the fewest tokens of a chunk where none is asked for."""
    if devices.on_host(device):
        return WORKSPACE_BYTES, USUAL_MIN_TOKENS
    return GPU_WORKSPACE_BYTES, GPU_USUAL_MIN_TOKENS


def tiling(
    schedule: str,
    n: int,
    student: Side,
    teacher: Side,
    gathered: bool,
    workspace_bytes: int | None,
    device: torch.device = CPU,
) -> Tiling:
    """The shape of a block under a budget of ``workspace_bytes`` for the blocks of both sides.

    Chunks of tokens are made equal in size; a side whose blocks are views of its logits needs no workspace.
    """
    budget, min_tokens = usual_workspace(device) if workspace_bytes is None else (workspace_bytes, MIN_TOKENS)
    vocab_size = student.vocab_size
    logit_bytes = student.block_bytes(gathered) + teacher.block_bytes(gathered) + student.gradient_bytes()
    if n == 0 or logit_bytes == 0:
        return Tiling(max(n, 1), vocab_size)
    logits = budget // logit_bytes
    if schedule == "chunked":
        tokens = max(logits // vocab_size, min_tokens)
        return Tiling(-(-n // -(-n // tokens)), vocab_size)
    columns = min(max(logits // n, MIN_COLUMNS), vocab_size)
    tokens = max(logits // columns, MIN_TOKENS)
    return Tiling(-(-n // -(-n // tokens)), columns)


def statistics(problem: Problem) -> RowStatistics:
    """The statistics of every token, ``[N, 8]``; empty for those that are not visited."""
    packed = RowStatistics.empty(len(problem.weights), problem.weights.dtype, problem.weights.device).packed
    student_buffer, teacher_buffer = problem.buffers()
    for rows in problem.chunks():
        student_rows, teacher_rows = problem.student.take(rows), problem.teacher.take(rows)
        chunk: RowStatistics | None = None
        for columns in problem.slices():
            student = student_buffer.logits(student_rows, columns)
            teacher = teacher_buffer.logits(teacher_rows, columns)
            part = RowStatistics(problem.functions.row_statistics(student, teacher, problem.transforms))
            chunk = part if chunk is None else chunk.merge(part)
        assert chunk is not None
        packed[rows] = chunk.packed
    return RowStatistics(packed)


def statistics_and_gradient(problem: Problem, gradient: StudentGradient) -> tuple[RowStatistics, Tensor]:
    """The chunked schedule: statistics ``[N, 8]`` and gate ``[N]`` of every token, and the gradient of Σ w·L."""
    packed = RowStatistics.empty(len(problem.weights), problem.weights.dtype, problem.weights.device).packed
    gate = torch.zeros_like(problem.weights)
    objective = problem.objective
    student_buffer, teacher_buffer = problem.buffers()
    columns = slice(0, problem.student.vocab_size)
    for rows in problem.chunks():
        student_rows = problem.student.take(rows)
        student = student_buffer.logits(student_rows, columns)
        teacher = teacher_buffer.logits(problem.teacher.take(rows), columns)
        out = gradient.target(rows, columns, student)
        packed[rows], gate[rows] = problem.functions.row_loss_and_gradient(
            student,
            teacher,
            problem.weights[rows],
            objective.gate_threshold,
            list(objective.combination),
            problem.transforms,
            out,
        )
        gradient.begin(rows, student_rows)
        gradient.add(columns, out)
        gradient.end()
    return RowStatistics(packed), gate


def gradient_of(
    problem: Problem, statistics: RowStatistics, coefficients: Coefficients, gradient: StudentGradient
) -> None:
    """The second visit of the recompute schedule: the gradient of rows with these statistics and coefficients."""
    student_buffer, teacher_buffer = problem.buffers()
    for rows in problem.chunks():
        student_rows, teacher_rows = problem.student.take(rows), problem.teacher.take(rows)
        row_numbers = [statistics.packed[rows], *(numbers[rows] for numbers in coefficients)]
        gradient.begin(rows, student_rows)
        for columns in problem.slices():
            student = student_buffer.logits(student_rows, columns)
            teacher = teacher_buffer.logits(teacher_rows, columns)
            out = gradient.target(rows, columns, student)
            problem.functions.row_gradient(student, teacher, *row_numbers, problem.transforms, out)
            gradient.add(columns, out)
        gradient.end()


def student_gradient(
    student: Tensor, problem: Problem, needs: tuple[bool, bool, bool], inplace: bool = False
) -> StudentGradient:
    """Where the gradient of this kind of student goes; ``needs``: of the student, its weight, its bias."""
    side = problem.student
    if isinstance(side, LogitsSide):
        return LogitsGradient(student, side, inplace)
    assert isinstance(side, HiddenSide)
    return HiddenGradient(side, needs, problem.block)
