"""The second visit alone: docs/math.md, "One gradient form". A program takes one part of one row."""

import triton.language as tl

from .alignment import by_alignment
from .numbers import load_coefficients, load_statistics, number, stretch
from .row_math import column_coefficients, mixture_row, unused
from .visits import Sides, gradient_of_columns, row_of


@by_alignment(
    matrices=["student", "teacher", "out"],
    per_row=["statistics", "a", "b", "c"],
    numbers=["student_stride", "teacher_stride", "out_stride", "parts"],
)
def row_gradient_kernel(
    student,  # [n, V]
    teacher,  # [n, V]
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    vocab_size,
    statistics,  # [n, 8]
    a,  # [n]
    b,  # [n]
    c,  # [n]
    parts,
    student_inner: tl.float64,
    student_outer: tl.float64,
    teacher_inner: tl.float64,
    teacher_outer: tl.float64,
    out,  # [n, V], written; may be the student
    out_stride: tl.int64,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Launched on a grid (n · parts,)."""
    program = tl.program_id(0)
    row = program // parts
    begin, end = stretch(program % parts, parts, vocab_size, STEPS * LANES * VECTOR)
    dtype: tl.constexpr = statistics.dtype.element_ty
    sides = Sides(
        row_of(student, student_stride, row, VECTOR),
        number(student_inner, dtype),
        number(student_outer, dtype),
        row_of(teacher, teacher_stride, row, VECTOR),
        number(teacher_inner, dtype),
        number(teacher_outer, dtype),
    )
    numbers = load_statistics(statistics, row)
    coefficients = load_coefficients(a, b, c, row)
    gradient_of_columns(
        sides,
        row_of(out, out_stride, row, VECTOR),
        begin,
        end,
        mixture_row(numbers, 0.0, 0.0),
        column_coefficients(numbers, coefficients),
        unused(coefficients),
        MIXTURE=False,
        FORWARD_PLAIN=True,
        REVERSE_PLAIN=True,
        STUDENT_SOFTCAP=STUDENT_SOFTCAP,
        TEACHER_SOFTCAP=TEACHER_SOFTCAP,
        STEPS=STEPS,
        LANES=LANES,
        VECTOR=VECTOR,
    )
