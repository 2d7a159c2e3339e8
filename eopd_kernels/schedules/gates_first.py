"""The chunked schedule without a reverse half: a chunk's gates are found before its student is projected.

    teacher's logits of a chunk ─► gates ─┬─ enough are open ─► the student's three products of the open rows, now
                                          └─ a few are open ──► put aside, until all chunks' make full chunks

A token whose gate is shut has no gradient then, and costs the student nothing. Open rows that are taken at once have
the teacher's logits still; those put aside need them again. For a share s of open tokens that is F·(D_t + 3·s·D_s)
flops, and at most F·(D_t + s·(3·D_s + D_t)): never more than F·(3·D_s + D_t), whatever the share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Block, Chunk
from .chunked import chunk_gradient
from .first_visit import gate_of
from .own_columns import token_logits
from .problem import Problem
from .seen import Seen
from .sides import HiddenSide, Rows
from .student_gradient import StudentGradient
from .teacher_first import of_teacher, without_student

# How many more rows a chunk's products with the student's head could take in the time that they take longer for being
# few: reading the head and dW does not depend on the rows. Times per row of 64, 96 and 128 rows over those of a full
# chunk: 1.76, 1.38, 1.53 (V = 49,152, D = 576) and 1.47, 1.20, 0.97 (V = 151,936, D = 1,024).
ROWS_LOST_PER_CHUNK = 45


def gates_first_forward(problem: Problem, gradient: StudentGradient) -> Seen:
    """Runs the chunked schedule with the gates first; see :func:`eopd_kernels.schedules.chunked.chunked_forward`."""
    assert isinstance(problem.teacher, HiddenSide)
    seen = Seen.empty(problem)
    blocks, columns = problem.blocks(), problem.columns
    assert blocks.teacher is not None
    put_aside = []
    for rows in problem.chunks():
        teacher = blocks.teacher.logits(problem.teacher.take(rows), columns)
        alive = find_gates(problem, rows, teacher, seen)
        opened = problem.of_open_tokens(seen.gate)
        there = index_of(rows, alive)
        if worth_a_chunk(problem, len(alive), len(teacher)):
            chunk = Chunk(blocks, there, problem.student.take(there), None)  # its logits are here
            student = blocks.student.logits(chunk.student, columns)
            chunk_gradient(opened, chunk, Block(student, moved_up(teacher, alive)), gradient, seen)
        elif len(alive):
            put_aside.append(there)
    for rows in torch.cat(put_aside).split(problem.tiling.tokens) if put_aside else ():
        chunk = blocks.take(rows)
        chunk_gradient(opened, chunk, chunk.logits(columns), gradient, seen)
    return seen


def find_gates(problem: Problem, rows: Rows, teacher: Tensor, seen: Seen) -> Tensor:
    """Returns which of a chunk's rows are open, and notes what the teacher's logits ``[n, V]`` say of all of them."""
    token = None if problem.tokens.token_ids is None else token_logits(problem, Block(teacher, teacher), rows)[1]
    statistics = without_student(of_teacher(problem, teacher), token)
    gate = gate_of(problem, statistics, problem.tokens.take(rows), problem.weights[rows])
    seen.put(rows, statistics, gate)
    return gate.nonzero().squeeze(1)


def index_of(rows: Rows, part: Tensor) -> Tensor:
    """Returns the index of the tokens that are ``part`` of a chunk's rows."""
    return part + rows.start if isinstance(rows, slice) else rows[part]


def worth_a_chunk(problem: Problem, alive: int, n: int) -> bool:
    """Returns whether taking ``alive`` of a chunk's n rows now costs less than their teacher's logits a second time."""
    assert isinstance(problem.student, HiddenSide) and isinstance(problem.teacher, HiddenSide)
    again = alive * problem.teacher.hidden.shape[1]
    return alive > 0 and again >= 3 * problem.student.hidden.shape[1] * min(ROWS_LOST_PER_CHUNK, n - alive)


def moved_up(block: Tensor, rows: Tensor) -> Tensor:
    """Moves the ``rows`` of a block ``[n, V]``, ascending, to its first rows; no second block is allocated."""
    for i, row in enumerate(rows.tolist()):
        if i != row:
            block[i].copy_(block[row])
    return block[: len(rows)]
