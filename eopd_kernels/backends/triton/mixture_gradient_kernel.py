"""The gradient of skewed divergences: docs/math.md, "Skewed divergences". A program takes one part of one row."""

import triton.language as tl

from .alignment import by_alignment
from .numbers import load_coefficients, load_statistics, number, stretch
from .row_math import mixture_coefficients, mixture_row, unused
from .visits import Sides, gradient_of_columns, row_of, side_of


@by_alignment
def row_mixture_gradient_kernel(
    student,  # [n, V]
    teacher,  # [n, V]
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    vocab_size,
    statistics,  # [n, 8], of whole rows
    a,  # [n]
    b,  # [n]
    c,  # [n]
    parts,
    forward_skew: tl.float64,
    reverse_skew: tl.float64,
    student_inner: tl.float64,
    student_outer: tl.float64,
    teacher_inner: tl.float64,
    teacher_outer: tl.float64,
    out,  # [n, V], written; may be the student
    out_stride: tl.int64,
    OPTIONS: tl.constexpr,
):
    """Launched on a grid (n · parts,)."""
    row, begin, end = stretch(parts, vocab_size, OPTIONS.columns)
    dtype: tl.constexpr = statistics.dtype.element_ty
    sides = Sides(
        side_of(student, student_stride, student_inner, student_outer, row, dtype, OPTIONS),
        side_of(teacher, teacher_stride, teacher_inner, teacher_outer, row, dtype, OPTIONS),
    )
    numbers = load_statistics(statistics, row)
    coefficients = load_coefficients(a, b, c, row)
    gradient_of_columns(
        sides,
        row_of(out, out_stride, row, OPTIONS),
        begin,
        end,
        mixture_row(numbers, number(forward_skew, dtype), number(reverse_skew, dtype)),
        mixture_coefficients(numbers, coefficients),
        unused(coefficients),
        MIXTURE=True,
        OPTIONS=OPTIONS,
    )
