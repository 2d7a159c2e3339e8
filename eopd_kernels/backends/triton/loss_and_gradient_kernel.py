"""Both visits and the gate between them: docs/math.md, "One pass" and "One gradient form". A program takes a row.

Each logit is read twice, each element of the gradient written once, and nothing else of the size of the vocabulary is
touched: 20 bytes per logit of two fp32 sides with an fp32 gradient, less what the second visit finds in L2.
"""

import triton.language as tl

from .alignment import by_alignment
from .numbers import number, store_statistics
from .row_math import gated_coefficients
from .visits import gradient_of_columns, row_of, sums_of_columns


@by_alignment(
    matrices=["student", "teacher", "out"],
    per_row=["weights", "statistics", "gate"],
    numbers=["student_stride", "teacher_stride", "out_stride"],
)
def row_loss_and_gradient_kernel(
    student,  # [n, V]
    teacher,  # [n, V]
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    vocab_size,
    weights,  # [n]
    gate_threshold: tl.float64,
    r0: tl.float64,
    r1: tl.float64,
    f0: tl.float64,
    f1: tl.float64,
    student_inner: tl.float64,
    student_outer: tl.float64,
    teacher_inner: tl.float64,
    teacher_outer: tl.float64,
    statistics,  # [n, 8], out
    gate,  # [n], out
    out,  # [n, V], out; may be the student
    out_stride: tl.int64,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Grid (n,). A row of weight 0 is not read: its numbers are empty, its gate 0 and its gradient 0."""
    row = tl.program_id(0)
    dtype: tl.constexpr = statistics.dtype.element_ty
    weight = tl.load(weights + row)
    of_student = row_of(student, student_stride, row, VECTOR)
    of_teacher = row_of(teacher, teacher_stride, row, VECTOR)
    inner_s, outer_s = number(student_inner, dtype), number(student_outer, dtype)
    inner_t, outer_t = number(teacher_inner, dtype), number(teacher_outer, dtype)
    s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross = sums_of_columns(
        of_student,
        of_teacher,
        0,
        tl.where(weight == 0, 0, vocab_size),
        inner_s,
        outer_s,
        inner_t,
        outer_t,
        STUDENT_SOFTCAP,
        TEACHER_SOFTCAP,
        STEPS,
        LANES,
        VECTOR,
    )
    open_gate, a, b, c = gated_coefficients(
        s_sum,
        t_sum,
        t_self,
        s_cross,
        weight,
        number(gate_threshold, dtype),
        number(r0, dtype),
        number(r1, dtype),
        number(f0, dtype),
        number(f1, dtype),
    )
    store_statistics(statistics, row, s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross)
    tl.store(gate + row, open_gate)
    gradient_of_columns(
        of_student,
        of_teacher,
        row_of(out, out_stride, row, VECTOR),
        0,
        vocab_size,
        s_max,
        s_sum,
        t_max,
        t_sum,
        a,
        b,
        c,
        0.0,
        0.0,
        inner_s,
        outer_s,
        inner_t,
        outer_t,
        False,
        True,
        True,
        STUDENT_SOFTCAP,
        TEACHER_SOFTCAP,
        STEPS,
        LANES,
        VECTOR,
    )
