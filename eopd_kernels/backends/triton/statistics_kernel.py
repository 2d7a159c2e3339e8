"""The first visit alone: docs/math.md, "One pass". A program sums one part of one row."""

import triton.language as tl

from .alignment import by_alignment
from .numbers import number, store_statistics, stretch
from .visits import row_of, sums_of_columns


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
    statistics,  # [n · parts, 8], out
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Grid (n · parts,). A row of weight 0 is not read and leaves empty numbers."""
    program = tl.program_id(0)
    row = program // parts
    begin, end = stretch(program % parts, parts, vocab_size, STEPS * LANES * VECTOR)
    if weights is not None:
        end = tl.where(tl.load(weights + row) == 0, begin, end)
    dtype: tl.constexpr = statistics.dtype.element_ty
    s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross = sums_of_columns(
        row_of(student, student_stride, row, VECTOR),
        row_of(teacher, teacher_stride, row, VECTOR),
        begin,
        end,
        number(student_inner, dtype),
        number(student_outer, dtype),
        number(teacher_inner, dtype),
        number(teacher_outer, dtype),
        STUDENT_SOFTCAP,
        TEACHER_SOFTCAP,
        STEPS,
        LANES,
        VECTOR,
    )
    store_statistics(statistics, program, s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross)
