"""The two visits of a stretch of one row: all eight sums, then the gradient. docs/math.md, "One pass".

A stretch is visited in tiles ``[STEPS, LANES, VECTOR]``. A lane is a thread: it loads VECTOR neighbouring columns at
once (16 bytes of the widest dtype; one column where rows begin anywhere), STEPS times a tile, and keeps a partial row
of its own in eight registers. Threads meet once per row, when the lanes are merged, so the loop has neither a shuffle
nor a barrier, and a maximum that moves costs a lane two exponentials per STEPS·VECTOR columns.

Whole tiles are loaded without a mask, which keeps their loads vectors whatever V is; the ragged end has a tile of its
own. It is visited first on the way back, and the whole tiles in reverse: what was read last is likeliest still in L2.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_math import (
    RowStatistics,
    add_columns,
    column_gradient,
    merge,
    mixture_column,
    mixture_column_gradient,
    transform_slope,
    transformed,
)


class Sides(NamedTuple):
    """A row of both sides, each as a pointer to its first logit and the two factors of its transform."""

    student: tl.tensor
    student_inner: tl.tensor
    student_outer: tl.tensor
    teacher: tl.tensor
    teacher_inner: tl.tensor
    teacher_outer: tl.tensor


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
def load_tiles(
    sides,
    columns,  # [STEPS, LANES, VECTOR]
    end,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # -> twice [STEPS, LANES, VECTOR]
    """Transformed logits of the student and of the teacher."""
    z_s = load_tile(sides.student, columns, end, sides.student_inner, sides.student_outer, STUDENT_SOFTCAP, MASKED)
    z_t = load_tile(sides.teacher, columns, end, sides.teacher_inner, sides.teacher_outer, TEACHER_SOFTCAP, MASKED)
    return z_s, z_t


@triton.jit
def sums_of_columns(
    sides,
    begin,  # a multiple of the tile
    end,
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
    zero = tl.zeros([LANES], sides.student_inner.dtype)
    lanes = RowStatistics(zero - float("inf"), zero, zero - float("inf"), zero, zero, zero, zero, zero)
    for i in range(0, whole):
        z_s, z_t = load_tiles(sides, begin + i * tile + columns, end, STUDENT_SOFTCAP, TEACHER_SOFTCAP, MASKED=False)
        lanes = add_columns(lanes, z_s, z_t)
    ragged = begin + whole * tile
    if ragged < end:
        z_s, z_t = load_tiles(sides, ragged + columns, end, STUDENT_SOFTCAP, TEACHER_SOFTCAP, MASKED=True)
        lanes = add_columns(lanes, z_s, z_t)
    return merge(lanes)


@triton.jit
def gradient_of_columns(
    sides,
    out,  # pointer to the row's first gradient; may be the student's
    begin,  # a multiple of the tile
    end,
    row,  # what the columns share
    k,  # column coefficients
    unused,  # whether the gradient is exactly 0
    MIXTURE: tl.constexpr,
    FORWARD_PLAIN: tl.constexpr,
    REVERSE_PLAIN: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The second visit, last column first. Unused rows are set to 0 without being read.

    ``MIXTURE``: of skewed divergences, of which the plain halves are computed without a mixture.
    """
    columns = tile_columns(STEPS, LANES, VECTOR)
    tile = STEPS * LANES * VECTOR
    whole = tl.maximum(end - begin, 0) // tile
    ragged = begin + whole * tile
    if unused:
        zero = tl.zeros([STEPS, LANES, VECTOR], out.dtype.element_ty)
        if ragged < end:
            tl.store(out + (ragged + columns), zero, mask=ragged + columns < end)
        for i in range(0, whole):
            tl.store(out + (begin + i * tile + columns), zero)
    else:
        if ragged < end:
            gradient_of_tile(
                sides,
                out,
                ragged + columns,
                end,
                row,
                k,
                MIXTURE,
                FORWARD_PLAIN,
                REVERSE_PLAIN,
                STUDENT_SOFTCAP,
                TEACHER_SOFTCAP,
                MASKED=True,
            )
        for i in range(0, whole):
            gradient_of_tile(
                sides,
                out,
                begin + (whole - 1 - i) * tile + columns,
                end,
                row,
                k,
                MIXTURE,
                FORWARD_PLAIN,
                REVERSE_PLAIN,
                STUDENT_SOFTCAP,
                TEACHER_SOFTCAP,
                MASKED=False,
            )


@triton.jit
def gradient_of_tile(
    sides,
    out,
    columns,  # [STEPS, LANES, VECTOR]
    end,
    row,
    k,
    MIXTURE: tl.constexpr,
    FORWARD_PLAIN: tl.constexpr,
    REVERSE_PLAIN: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Writes ∂L/∂x_s: the gradient of the transformed logits times the slope of the transform."""
    z_s, z_t = load_tiles(sides, columns, end, STUDENT_SOFTCAP, TEACHER_SOFTCAP, MASKED)
    if MIXTURE:
        gradient = mixture_column_gradient(row, k, mixture_column(row, z_s, z_t), FORWARD_PLAIN, REVERSE_PLAIN)
    else:
        gradient = column_gradient(row, k, z_s, z_t)
    if STUDENT_SOFTCAP:
        gradient = gradient * transform_slope(z_s, sides.student_inner, sides.student_outer)
    else:
        gradient = gradient * sides.student_inner
    if MASKED:
        tl.store(out + columns, converted(gradient, out.dtype.element_ty), mask=columns < end)
    else:
        tl.store(out + columns, converted(gradient, out.dtype.element_ty))


@triton.jit
def row_of(logits, stride, row, VECTOR: tl.constexpr):  # pointer to [n, V] -> to the row's first logit
    """Rows lie 64-bit offsets apart. The stride is in vectors, so that Triton sees what rows begin at multiples of."""
    return logits + row.to(tl.int64) * stride * VECTOR
