"""Both visits and the gate between them: docs/math.md, "One pass" and "One gradient form". A program takes a row.

Each logit is read twice, each element of the gradient written once, and nothing else of the size of the vocabulary is
touched: 20 bytes per logit of two fp32 sides with an fp32 gradient, less what the second visit finds in L2.
"""

import triton.language as tl

from .alignment import by_alignment
from .numbers import number, store_statistics
from .row_math import Combine, column_coefficients, gated_coefficients, gated_loss, mixture_row, open_gate, unused
from .visits import Sides, gradient_of_columns, row_of, side_of, sums_of_columns


@by_alignment
def row_loss_and_gradient_kernel(
    student,  # [n, V]
    teacher,  # [n, V]
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    vocab_size,
    weights,  # [n]
    gate_threshold: tl.float64,
    reverse: tl.float64,
    reverse_gate: tl.float64,
    forward: tl.float64,
    forward_gate: tl.float64,
    student_inner: tl.float64,
    student_outer: tl.float64,
    teacher_inner: tl.float64,
    teacher_outer: tl.float64,
    statistics,  # [n, 8], written
    gate,  # [n], written
    loss,  # [n], written
    out,  # [n, V], written; may be the student
    out_stride: tl.int64,
    OPTIONS: tl.constexpr,
):
    """Launched on a grid (n,). A row of weight 0 is not read: its numbers are empty, its gate, loss and gradient 0."""
    row = tl.program_id(0)
    dtype: tl.constexpr = statistics.dtype.element_ty
    weight = tl.load(weights + row)
    sides = Sides(
        side_of(student, student_stride, student_inner, student_outer, row, dtype, OPTIONS),
        side_of(teacher, teacher_stride, teacher_inner, teacher_outer, row, dtype, OPTIONS),
    )
    end = tl.where(weight == 0, 0, vocab_size)
    numbers = sums_of_columns(sides, 0, end, OPTIONS)
    combine = Combine(
        number(reverse, dtype), number(reverse_gate, dtype), number(forward, dtype), number(forward_gate, dtype)
    )
    opened = open_gate(numbers, weight, number(gate_threshold, dtype))
    coefficients = gated_coefficients(numbers, opened, weight, combine)
    store_statistics(statistics, row, numbers)
    tl.store(gate + row, opened)
    tl.store(loss + row, gated_loss(numbers, opened, weight, combine))
    gradient_of_columns(
        sides,
        row_of(out, out_stride, row, OPTIONS),
        0,
        vocab_size,
        mixture_row(numbers, 0.0, 0.0),
        column_coefficients(numbers, coefficients),
        unused(coefficients),
        MIXTURE=False,
        OPTIONS=OPTIONS,
    )
