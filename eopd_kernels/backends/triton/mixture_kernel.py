"""The sums of skewed divergences: docs/math.md, "Skewed divergences". A program sums one part of one row."""

import triton.language as tl

from .alignment import by_alignment
from .numbers import load_statistics, number, stretch
from .row_math import MixtureStatistics, add_mixture_columns, mixture_column, mixture_row
from .visits import Sides, load_tiles, side_of, tile_columns, transformed_tile


@by_alignment
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
    shared = mixture_row(numbers, number(forward_skew, dtype), number(reverse_skew, dtype))
    LANES: tl.constexpr = OPTIONS.lanes
    STEPS: tl.constexpr = OPTIONS.steps
    zero = tl.zeros([LANES], dtype)
    lanes = MixtureStatistics(zero, zero, zero, zero)
    whole = tl.maximum(end - begin, 0) // OPTIONS.columns
    for i in range(0, tl.cdiv(tl.maximum(end - begin, 0), OPTIONS.columns)):
        columns = tile_columns(begin + i * OPTIONS.columns, STEPS, OPTIONS)
        # The ragged end differs in its loads alone: a second copy of the arithmetic spilled scalar registers in fp64 on
        # gfx942, 28 bytes.
        if i < whole:
            x_s = load_tiles(sides.student, columns, end, MASKED=False)
            x_t = load_tiles(sides.teacher, columns, end, MASKED=False)
        else:
            x_s = load_tiles(sides.student, columns, end, MASKED=True)
            x_t = load_tiles(sides.teacher, columns, end, MASKED=True)
        for step in tl.static_range(len(columns)):
            z_s = transformed_tile(sides.student, x_s[step], columns[step], end, OPTIONS.student_softcap, MASKED=True)
            z_t = transformed_tile(sides.teacher, x_t[step], columns[step], end, OPTIONS.teacher_softcap, MASKED=True)
            lanes = add_mixture_columns(lanes, shared, mixture_column(shared, z_s, z_t), OPTIONS)
    first = mixture + tl.program_id(0).to(tl.int64) * 4
    tl.store(first, tl.sum(lanes.forward_kl, 0) / numbers.teacher_sum)
    tl.store(first + 1, tl.sum(lanes.reverse_kl, 0) / numbers.student_sum)
    tl.store(first + 2, tl.sum(lanes.forward_share, 0) / numbers.teacher_sum)
    tl.store(first + 3, tl.sum(lanes.reverse_share, 0) / numbers.student_sum)
