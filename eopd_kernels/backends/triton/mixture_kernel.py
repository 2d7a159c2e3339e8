"""The sums of skewed divergences: docs/math.md, "Skewed divergences". A program sums one part of one row."""

import triton.language as tl

from .alignment import by_alignment
from .numbers import load_statistics, number, stretch
from .row_math import log_sum_ratio, transformed, with_mixed_columns
from .visits import converted, row_of, tile_columns


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
    mixture,  # [n · parts, 4], out
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
    tile: tl.constexpr = STEPS * LANES * VECTOR
    begin, end = stretch(program % parts, parts, vocab_size, tile)
    dtype: tl.constexpr = statistics.dtype.element_ty
    of_student = row_of(student, student_stride, row, VECTOR)
    of_teacher = row_of(teacher, teacher_stride, row, VECTOR)
    inner_s, outer_s = number(student_inner, dtype), number(student_outer, dtype)
    inner_t, outer_t = number(teacher_inner, dtype), number(teacher_outer, dtype)
    skew_f, skew_r = number(forward_skew, dtype), number(reverse_skew, dtype)
    s_max, s_sum, t_max, t_sum, _, _, _, _ = load_statistics(statistics, row)
    shift = log_sum_ratio(s_sum, t_sum)
    columns = begin + tile_columns(STEPS, LANES, VECTOR)
    whole = tl.maximum(end - begin, 0) // tile
    zero = tl.zeros([LANES], dtype)
    forward_kl, reverse_kl, forward_share, reverse_share = zero, zero, zero, zero
    for i in range(0, tl.cdiv(tl.maximum(end - begin, 0), tile)):
        here = i * tile + columns
        inside = here < end
        # The ragged end differs in its loads alone: a second copy of the arithmetic spilled scalar registers in fp64 on
        # gfx942, 28 bytes.
        if i < whole:
            x_s = tl.load(of_student + here)
            x_t = tl.load(of_teacher + here)
        else:
            x_s = tl.load(of_student + here, mask=inside, other=0.0)
            x_t = tl.load(of_teacher + here, mask=inside, other=0.0)
        z_s = transformed(converted(x_s, dtype), inner_s, outer_s, STUDENT_SOFTCAP)
        z_t = transformed(converted(x_t, dtype), inner_t, outer_t, TEACHER_SOFTCAP)
        forward_kl, reverse_kl, forward_share, reverse_share = with_mixed_columns(
            forward_kl,
            reverse_kl,
            forward_share,
            reverse_share,
            tl.where(inside, z_s, float("-inf")),
            tl.where(inside, z_t, float("-inf")),
            s_max,
            t_max,
            shift,
            skew_f,
            skew_r,
            FORWARD_PLAIN,
            REVERSE_PLAIN,
        )
    first = mixture + program.to(tl.int64) * 4
    tl.store(first, tl.sum(forward_kl, 0) / t_sum)
    tl.store(first + 1, tl.sum(reverse_kl, 0) / s_sum)
    tl.store(first + 2, tl.sum(forward_share, 0) / t_sum)
    tl.store(first + 3, tl.sum(reverse_share, 0) / s_sum)
