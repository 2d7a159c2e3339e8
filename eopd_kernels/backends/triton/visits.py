"""The two visits of a stretch of one row: all eight sums, then the gradient. docs/math.md, "One pass".

A stretch is visited in tiles ``[STEPS, LANES, VECTOR]``. A lane is a thread: it loads VECTOR neighbouring columns at
once (16 bytes of the widest dtype; one column where rows begin anywhere), STEPS times a tile, and keeps a partial row
of its own in eight registers. Threads meet once per row, when the lanes are merged, so the loop has neither a shuffle
nor a barrier, and a maximum that moves costs a lane two exponentials per STEPS·VECTOR columns.

Whole tiles are loaded without a mask, which keeps their loads vectors whatever V is; the ragged end has a tile of its
own. It is visited first on the way back, and the whole tiles in reverse: what was read last is likeliest still in L2.
"""

import triton
import triton.language as tl

from .row_math import (
    column_coefficients,
    column_gradient,
    log_sum_ratio,
    merged_lanes,
    mixture_coefficients,
    mixture_column_gradient,
    slope,
    transformed,
    with_columns,
)


@triton.jit
def tile_columns(STEPS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):  # -> [STEPS, LANES, VECTOR]
    """The columns of the first tile: neighbouring lanes have neighbouring vectors."""
    step = tl.arange(0, STEPS)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    return (step * LANES + lane) * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def converted(x, DTYPE: tl.constexpr):
    """``x`` in another dtype: by way of float32, the only one that every target and the interpreter turn bf16 into."""
    if x.dtype.primitive_bitwidth + DTYPE.primitive_bitwidth == 16 + 64:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def load_tile(
    row,  # pointer to the row's first logit
    columns,  # [STEPS, LANES, VECTOR]
    end,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # -> [STEPS, LANES, VECTOR]
    """Transformed logits in the dtype of ``inner``; −inf from ``end`` on, after the transform: tanh(−inf) is −1."""
    if MASKED:
        inside = columns < end
        x = converted(tl.load(row + columns, mask=inside, other=0.0), inner.dtype)
        z = tl.where(inside, transformed(x, inner, outer, SOFTCAP), float("-inf"))
    else:
        z = transformed(converted(tl.load(row + columns), inner.dtype), inner, outer, SOFTCAP)
    return z


@triton.jit
def sums_of_columns(
    student,  # pointer to the row's first logit
    teacher,  # the same
    begin,  # a multiple of the tile
    end,
    student_inner,
    student_outer,
    teacher_inner,
    teacher_outer,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The first visit: the eight numbers of the columns from ``begin`` to ``end``; empty where there are none."""
    columns = tile_columns(STEPS, LANES, VECTOR)
    tile = STEPS * LANES * VECTOR
    whole = tl.maximum(end - begin, 0) // tile
    zero = tl.zeros([LANES], student_inner.dtype)
    s_max, t_max = zero - float("inf"), zero - float("inf")
    s_sum, t_sum, t_self, t_cross, s_self, s_cross = zero, zero, zero, zero, zero, zero
    for i in range(0, whole):
        here = begin + i * tile + columns
        z_s = load_tile(student, here, end, student_inner, student_outer, STUDENT_SOFTCAP, False)
        z_t = load_tile(teacher, here, end, teacher_inner, teacher_outer, TEACHER_SOFTCAP, False)
        s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross = with_columns(
            s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross, z_s, z_t
        )
    if begin + whole * tile < end:
        here = begin + whole * tile + columns
        z_s = load_tile(student, here, end, student_inner, student_outer, STUDENT_SOFTCAP, True)
        z_t = load_tile(teacher, here, end, teacher_inner, teacher_outer, TEACHER_SOFTCAP, True)
        s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross = with_columns(
            s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross, z_s, z_t
        )
    return merged_lanes(s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross)


@triton.jit
def gradient_of_columns(
    student,  # pointer to the row's first logit
    teacher,  # the same
    out,  # the same, of the gradient; may be the student's
    begin,  # a multiple of the tile
    end,
    student_max,
    student_sum,
    teacher_max,
    teacher_sum,
    a,
    b,
    c,
    forward_skew,
    reverse_skew,
    student_inner,
    student_outer,
    teacher_inner,
    teacher_outer,
    MIXTURE: tl.constexpr,
    FORWARD_PLAIN: tl.constexpr,
    REVERSE_PLAIN: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The second visit, last column first. Rows with a = b = c = 0 are set to 0 without being read.

    ``MIXTURE``: of skewed divergences; without it the skews are not looked at.
    """
    columns = tile_columns(STEPS, LANES, VECTOR)
    tile = STEPS * LANES * VECTOR
    whole = tl.maximum(end - begin, 0) // tile
    ragged = begin + whole * tile + columns
    if (a != 0) | (b != 0) | (c != 0):
        shift = log_sum_ratio(student_sum, teacher_sum)
        if MIXTURE:
            own, ratio, other = mixture_coefficients(student_sum, teacher_sum, a, b, c)
        else:
            own, ratio, other = column_coefficients(student_sum, teacher_sum, a, b, c)
        if begin + whole * tile < end:
            z_s = load_tile(student, ragged, end, student_inner, student_outer, STUDENT_SOFTCAP, True)
            z_t = load_tile(teacher, ragged, end, teacher_inner, teacher_outer, TEACHER_SOFTCAP, True)
            gradient = raw_gradient(
                z_s,
                z_t,
                student_max,
                teacher_max,
                own,
                ratio,
                other,
                shift,
                forward_skew,
                reverse_skew,
                student_inner,
                student_outer,
                MIXTURE,
                FORWARD_PLAIN,
                REVERSE_PLAIN,
                STUDENT_SOFTCAP,
            )
            tl.store(out + ragged, converted(gradient, out.dtype.element_ty), mask=ragged < end)
        for i in range(0, whole):
            here = begin + (whole - 1 - i) * tile + columns
            z_s = load_tile(student, here, end, student_inner, student_outer, STUDENT_SOFTCAP, False)
            z_t = load_tile(teacher, here, end, teacher_inner, teacher_outer, TEACHER_SOFTCAP, False)
            gradient = raw_gradient(
                z_s,
                z_t,
                student_max,
                teacher_max,
                own,
                ratio,
                other,
                shift,
                forward_skew,
                reverse_skew,
                student_inner,
                student_outer,
                MIXTURE,
                FORWARD_PLAIN,
                REVERSE_PLAIN,
                STUDENT_SOFTCAP,
            )
            tl.store(out + here, converted(gradient, out.dtype.element_ty))
    else:
        zero = tl.zeros([STEPS, LANES, VECTOR], out.dtype.element_ty)
        if begin + whole * tile < end:
            tl.store(out + ragged, zero, mask=ragged < end)
        for i in range(0, whole):
            tl.store(out + (begin + i * tile + columns), zero)


@triton.jit
def raw_gradient(
    z_s,  # [STEPS, LANES, VECTOR]
    z_t,  # [STEPS, LANES, VECTOR]
    student_max,
    teacher_max,
    own,
    ratio,
    other,
    shift,
    forward_skew,
    reverse_skew,
    inner,
    outer,
    MIXTURE: tl.constexpr,
    FORWARD_PLAIN: tl.constexpr,
    REVERSE_PLAIN: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # -> [STEPS, LANES, VECTOR]
    """∂L/∂x_s: the gradient of the transformed logits times the slope of the transform."""
    if MIXTURE:
        gradient = mixture_column_gradient(
            z_s,
            z_t,
            student_max,
            teacher_max,
            own,
            ratio,
            other,
            shift,
            forward_skew,
            reverse_skew,
            FORWARD_PLAIN,
            REVERSE_PLAIN,
        )
    else:
        gradient = column_gradient(z_s, z_t, student_max, teacher_max, own, ratio, other)
    if SOFTCAP:
        return gradient * slope(z_s, inner, outer)
    return gradient * inner


@triton.jit
def row_of(logits, stride, row, VECTOR: tl.constexpr):  # pointer to [n, V] -> to the row's first logit
    """Rows lie 64-bit offsets apart. The stride is in vectors, so that Triton sees what rows begin at multiples of."""
    return logits + row.to(tl.int64) * stride * VECTOR
