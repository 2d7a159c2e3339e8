"""The two visits of a stretch of one row: all eight sums, then the gradient. docs/math.md, "One pass".

A stretch is visited in groups of ``steps`` tiles ``[lanes, width]``. A lane is a thread: it loads neighbouring columns
at once (16 bytes of the widest dtype; single ones where rows begin anywhere) and keeps a partial row of its own in
eight registers. Threads meet once per row, when the lanes are merged, so the loop has neither a shuffle nor a barrier,
and a maximum that moves costs a lane two exponentials per group.

The tiles of a group are tensors of their own: as a dimension of one tensor, Triton 3.6 spread the steps over threads.

Whole groups are loaded without a mask, which keeps their loads vectors whatever V is; the ragged end has one. It is
visited first on the way back, and the whole groups in reverse: what was read last is likeliest still in L2.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .numbers import number
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


class Side(NamedTuple):
    """A row of one side: a pointer to its first logit, and the two factors of its transform."""

    logits: tl.tensor
    inner: tl.tensor
    outer: tl.tensor


class Sides(NamedTuple):
    """A row of both sides."""

    student: Side
    teacher: Side


@triton.jit
def row_of(logits, stride, row, OPTIONS: tl.constexpr):  # pointer to [n, V] -> to the row's first logit
    """Rows lie 64-bit offsets apart. The stride is in vectors, so that Triton sees what rows begin at multiples of."""
    return logits + row.to(tl.int64) * stride * OPTIONS.vector


@triton.jit
def side_of(logits, stride, inner, outer, row, DTYPE: tl.constexpr, OPTIONS: tl.constexpr):
    """One side's row, to be computed in this dtype."""
    return Side(row_of(logits, stride, row, OPTIONS), number(inner, DTYPE), number(outer, DTYPE))


@triton.jit
def converted(x, DTYPE: tl.constexpr):
    """``x`` in another dtype: by way of float32, the only one that every target and the interpreter turn bf16 into."""
    if x.dtype.primitive_bitwidth + DTYPE.primitive_bitwidth == 16 + 64:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def tile_columns(first, STEPS: tl.constexpr, OPTIONS: tl.constexpr):  # -> STEPS times [lanes, width]
    """The columns of tiles that begin at ``first``. Neighbouring lanes have neighbouring vectors of the tile's whole
    width, or of one column and the next one a tile's lanes further on."""
    columns = ()
    for step in tl.static_range(STEPS):
        lane = tl.arange(0, OPTIONS.lanes)[:, None] + step * OPTIONS.lanes
        i = tl.arange(0, OPTIONS.width)[None, :]
        if OPTIONS.vector == 1:
            tile = first + i * OPTIONS.lanes + lane
        else:
            tile = first + lane * OPTIONS.width + i
        columns = columns + (tile,)  # type: ignore[assignment]  # noqa: RUF005
    return columns


@triton.jit
def load_tile(side, columns, end, MASKED: tl.constexpr):  # -> [lanes, width]
    """A side's logits as they are stored."""
    if MASKED:
        return tl.load(side.logits + columns, mask=columns < end, other=0.0)
    return tl.load(side.logits + columns)


@triton.jit
def load_tiles(side, columns, end, MASKED: tl.constexpr):  # -> a group of [lanes, width]
    """A side's logits of a group as they are stored."""
    return [load_tile(side, tile, end, MASKED) for tile in columns]


@triton.jit
def transformed_tile(side, x, columns, end, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """Transformed logits in the dtype computed in; −inf from ``end`` on, after the transform: tanh(−inf) is −1."""
    z = transformed(converted(x, side.inner.dtype), side.inner, side.outer, SOFTCAP)
    if MASKED:
        z = tl.where(columns < end, z, float("-inf"))
    return z


@triton.jit
def load_side(side, columns, end, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):  # -> a group of [lanes, width]
    """Transformed logits of one side."""
    return [transformed_tile(side, load_tile(side, tile, end, MASKED), tile, end, SOFTCAP, MASKED) for tile in columns]


@triton.jit
def load_sides(sides, columns, end, OPTIONS: tl.constexpr, MASKED: tl.constexpr):  # -> two groups of [lanes, width]
    """Transformed logits of the student and of the teacher."""
    z_s = load_side(sides.student, columns, end, OPTIONS.student_softcap, MASKED)
    z_t = load_side(sides.teacher, columns, end, OPTIONS.teacher_softcap, MASKED)
    return z_s, z_t


@triton.jit
def sums_of_columns(sides, begin, end, OPTIONS: tl.constexpr):
    """The first visit: the eight numbers of the columns from ``begin``, a multiple of a group, to ``end``; empty where
    there are none."""
    LANES: tl.constexpr = OPTIONS.lanes
    STEPS: tl.constexpr = OPTIONS.steps
    whole = tl.maximum(end - begin, 0) // OPTIONS.columns
    ragged = begin + whole * OPTIONS.columns
    zero = tl.zeros([LANES], sides.student.inner.dtype)
    lanes = RowStatistics(zero - float("inf"), zero, zero - float("inf"), zero, zero, zero, zero, zero)
    for i in range(0, whole):
        z_s, z_t = load_sides(
            sides, tile_columns(begin + i * OPTIONS.columns, STEPS, OPTIONS), end, OPTIONS, MASKED=False
        )
        lanes = add_columns(lanes, z_s, z_t)
    if ragged < end:
        z_s, z_t = load_sides(sides, tile_columns(ragged, STEPS, OPTIONS), end, OPTIONS, MASKED=True)
        lanes = add_columns(lanes, z_s, z_t)
    return merge(lanes)


@triton.jit
def gradient_of_columns(
    sides,
    out,  # pointer to the row's first gradient; may be the student's
    begin,  # a multiple of a group
    end,
    row,  # what the columns share
    k,  # column coefficients
    unused,  # whether the gradient is exactly 0
    MIXTURE: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """The second visit, last column first. Unused rows are set to 0 without being read.

    ``MIXTURE``: of skewed divergences, of which the plain halves are computed without a mixture.
    """
    STEPS: tl.constexpr = OPTIONS.steps
    whole = tl.maximum(end - begin, 0) // OPTIONS.columns
    ragged = begin + whole * OPTIONS.columns
    if unused:
        zero = tl.full((1, 1), 0, out.dtype.element_ty)
        for i in range(0, whole * OPTIONS.steps):
            tl.store(out + tile_columns(begin + i * OPTIONS.tile, 1, OPTIONS)[0], zero)
        for i in range(0, OPTIONS.steps):
            columns = tile_columns(ragged + i * OPTIONS.tile, 1, OPTIONS)
            tl.store(out + columns[0], zero, mask=columns[0] < end)
    else:
        if ragged < end:
            columns = tile_columns(ragged, STEPS, OPTIONS)
            gradient_of_tiles(sides, out, columns, end, row, k, MIXTURE, OPTIONS, MASKED=True)
        for i in range(0, whole):
            columns = tile_columns(begin + (whole - 1 - i) * OPTIONS.columns, STEPS, OPTIONS)
            gradient_of_tiles(sides, out, columns, end, row, k, MIXTURE, OPTIONS, MASKED=False)


@triton.jit
def gradient_of_tiles(
    sides, out, columns, end, row, k, MIXTURE: tl.constexpr, OPTIONS: tl.constexpr, MASKED: tl.constexpr
):
    """Writes ∂L/∂x_s: the gradient of the transformed logits times the slope of the transform."""
    z_s, z_t = load_sides(sides, columns, end, OPTIONS, MASKED)
    for step in tl.static_range(len(columns)):
        if MIXTURE:
            gradient = mixture_column_gradient(row, k, mixture_column(row, z_s[step], z_t[step]), OPTIONS)
        else:
            gradient = column_gradient(row, k, z_s[step], z_t[step])
        if OPTIONS.student_softcap:
            gradient = gradient * transform_slope(z_s[step], sides.student.inner, sides.student.outer)
        else:
            gradient = gradient * sides.student.inner
        gradient = converted(gradient, out.dtype.element_ty)
        if MASKED:
            tl.store(out + columns[step], gradient, mask=columns[step] < end)
        else:
            tl.store(out + columns[step], gradient)
