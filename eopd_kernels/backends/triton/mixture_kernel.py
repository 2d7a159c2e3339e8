"""The sums of skewed divergences: docs/math.md, "Skewed divergences". A program sums one part of one row."""

import triton.language as tl

from .alignment import by_alignment
from .numbers import load_statistics, number, stretch
from .row_math import MixtureStatistics, add_mixture_columns, mixture_column, mixture_row, transformed
from .visits import Sides, converted, row_of, tile_columns


@by_alignment(
    matrices=["student", "teacher"],
    per_row=["statistics", "mixture"],
    numbers=["student_stride", "teacher_stride", "parts"],
)
def row_mixture_kernel(
    student,  # [n, V]
    teacher,  # [n, V]
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    vocab_size,
    statistics,  # [n, 8], of whole rows
    parts,
    forward_skew: tl.float64,
    reverse_skew: tl.float64,
    student_inner: tl.float64,
    student_outer: tl.float64,
    teacher_inner: tl.float64,
    teacher_outer: tl.float64,
    mixture,  # [n · parts, 4], written
    FORWARD_PLAIN: tl.constexpr,
    REVERSE_PLAIN: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Launched on a grid (n · parts,)."""
    program = tl.program_id(0)
    row = program // parts
    tile: tl.constexpr = STEPS * LANES * VECTOR
    begin, end = stretch(program % parts, parts, vocab_size, tile)
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
    shared = mixture_row(numbers, number(forward_skew, dtype), number(reverse_skew, dtype))
    columns = begin + tile_columns(STEPS, LANES, VECTOR)
    whole = tl.maximum(end - begin, 0) // tile
    zero = tl.zeros([LANES], dtype)
    lanes = MixtureStatistics(zero, zero, zero, zero)
    for i in range(0, tl.cdiv(tl.maximum(end - begin, 0), tile)):
        here = i * tile + columns
        inside = here < end
        # The ragged end differs in its loads alone: a second copy of the arithmetic spilled scalar registers in fp64 on
        # gfx942, 28 bytes.
        if i < whole:
            x_s = tl.load(sides.student + here)
            x_t = tl.load(sides.teacher + here)
        else:
            x_s = tl.load(sides.student + here, mask=inside, other=0.0)
            x_t = tl.load(sides.teacher + here, mask=inside, other=0.0)
        z_s = transformed(converted(x_s, dtype), sides.student_inner, sides.student_outer, STUDENT_SOFTCAP)
        z_t = transformed(converted(x_t, dtype), sides.teacher_inner, sides.teacher_outer, TEACHER_SOFTCAP)
        z_s, z_t = tl.where(inside, z_s, float("-inf")), tl.where(inside, z_t, float("-inf"))
        lanes = add_mixture_columns(lanes, shared, mixture_column(shared, z_s, z_t), FORWARD_PLAIN, REVERSE_PLAIN)
    first = mixture + program.to(tl.int64) * 4
    tl.store(first, tl.sum(lanes.forward_kl, 0) / numbers.teacher_sum)
    tl.store(first + 1, tl.sum(lanes.reverse_kl, 0) / numbers.student_sum)
    tl.store(first + 2, tl.sum(lanes.forward_share, 0) / numbers.teacher_sum)
    tl.store(first + 3, tl.sum(lanes.reverse_share, 0) / numbers.student_sum)
