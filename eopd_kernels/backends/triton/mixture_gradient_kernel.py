"""The gradient of skewed divergences: docs/math.md, "Skewed divergences". A program takes one part of one row."""

import triton.language as tl

from .alignment import by_alignment
from .numbers import load_statistics, number, stretch
from .visits import gradient_of_columns, row_of


@by_alignment(
    matrices=["student", "teacher", "out"],
    per_row=["statistics", "a", "b", "c"],
    numbers=["student_stride", "teacher_stride", "out_stride", "parts"],
)
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
    out,  # [n, V], out; may be the student
    out_stride: tl.int64,
    FORWARD_PLAIN: tl.constexpr,
    REVERSE_PLAIN: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Grid (n · parts,)."""
    program = tl.program_id(0)
    row = program // parts
    begin, end = stretch(program % parts, parts, vocab_size, STEPS * LANES * VECTOR)
    dtype: tl.constexpr = statistics.dtype.element_ty
    student_max, student_sum, teacher_max, teacher_sum, _, _, _, _ = load_statistics(statistics, row)
    gradient_of_columns(
        row_of(student, student_stride, row, VECTOR),
        row_of(teacher, teacher_stride, row, VECTOR),
        row_of(out, out_stride, row, VECTOR),
        begin,
        end,
        student_max,
        student_sum,
        teacher_max,
        teacher_sum,
        tl.load(a + row),
        tl.load(b + row),
        tl.load(c + row),
        number(forward_skew, dtype),
        number(reverse_skew, dtype),
        number(student_inner, dtype),
        number(student_outer, dtype),
        number(teacher_inner, dtype),
        number(teacher_outer, dtype),
        True,
        FORWARD_PLAIN,
        REVERSE_PLAIN,
        STUDENT_SOFTCAP,
        TEACHER_SOFTCAP,
        STEPS,
        LANES,
        VECTOR,
    )
