"""The first visit alone: docs/math.md, "One pass". A program sums one part of one row."""

import triton.language as tl

from .alignment import by_alignment
from .numbers import store_statistics, stretch
from .visits import Sides, side_of, sums_of_columns


@by_alignment
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
    OPTIONS: tl.constexpr,
):
    """Launched on a grid (n · parts,). A row of weight 0 is not read and leaves empty numbers."""
    row, begin, end = stretch(parts, vocab_size, OPTIONS.columns)
    if weights is not None:
        end = tl.where(tl.load(weights + row) == 0, begin, end)
    dtype: tl.constexpr = statistics.dtype.element_ty
    sides = Sides(
        side_of(student, student_stride, student_inner, student_outer, row, dtype, OPTIONS),
        side_of(teacher, teacher_stride, teacher_inner, teacher_outer, row, dtype, OPTIONS),
    )
    numbers = sums_of_columns(sides, begin, end, OPTIONS)
    store_statistics(statistics, tl.program_id(0), numbers)
