"""The first visit alone: docs/math.md, "One pass". A program sums one part of one row."""

import triton.language as tl

from .alignment import by_alignment
from .numbers import number, store_statistics, stretch
from .visits import Sides, row_of, sums_of_columns


@by_alignment(
    matrices=["student", "teacher"],
    per_row=["weights", "statistics"],
    numbers=["student_stride", "teacher_stride", "parts"],
)
def row_statistics_kernel(
    student,  # [n, V]
    teacher,  # [n, V]
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    vocab_size,
    weights,  # [n], or None: every row counts
    parts,
    student_inner: tl.float64,
    student_outer: tl.float64,
    teacher_inner: tl.float64,
    teacher_outer: tl.float64,
    statistics,  # [n · parts, 8], written
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Launched on a grid (n · parts,). A row of weight 0 is not read and leaves empty numbers."""
    program = tl.program_id(0)
    row = program // parts
    begin, end = stretch(program % parts, parts, vocab_size, STEPS * LANES * VECTOR)
    if weights is not None:
        end = tl.where(tl.load(weights + row) == 0, begin, end)
    dtype: tl.constexpr = statistics.dtype.element_ty
    sides = Sides(
        row_of(student, student_stride, row, VECTOR),
        number(student_inner, dtype),
        number(student_outer, dtype),
        row_of(teacher, teacher_stride, row, VECTOR),
        number(teacher_inner, dtype),
        number(teacher_outer, dtype),
    )
    numbers = sums_of_columns(sides, begin, end, STUDENT_SOFTCAP, TEACHER_SOFTCAP, STEPS, LANES, VECTOR)
    store_statistics(statistics, program, numbers)
