"""Loads and stores of a row's numbers, scalar arguments, and the part of a row that a program visits."""

import triton
import triton.language as tl

from .row_math import Coefficients, RowStatistics


@triton.jit
def number(x, DTYPE: tl.constexpr):
    """A float argument in the compute dtype. Arguments are float64, or a float64 problem would lose its digits here."""
    return tl.full((), x, DTYPE)


@triton.jit
def stretch(parts, vocab_size, GROUP: tl.constexpr):
    """The row that a program takes a part of, the part's first column, and the column after its last: whole groups of
    tiles, and in the last part the rest."""
    program = tl.program_id(0)
    columns = tl.cdiv(tl.cdiv(vocab_size, GROUP), parts) * GROUP
    begin = program % parts * columns
    return program // parts, begin, tl.minimum(begin + columns, vocab_size)


@triton.jit
def load_statistics(statistics, row):  # pointer to [n, 8] -> eight scalars
    """A row's eight numbers."""
    first = statistics + row.to(tl.int64) * 8
    return RowStatistics(
        tl.load(first),
        tl.load(first + 1),
        tl.load(first + 2),
        tl.load(first + 3),
        tl.load(first + 4),
        tl.load(first + 5),
        tl.load(first + 6),
        tl.load(first + 7),
    )


@triton.jit
def store_statistics(statistics, row, numbers):  # pointer to [n, 8]; eight scalars
    """Writes a row's eight numbers."""
    first = statistics + row.to(tl.int64) * 8
    tl.store(first, numbers.student_max)
    tl.store(first + 1, numbers.student_sum)
    tl.store(first + 2, numbers.teacher_max)
    tl.store(first + 3, numbers.teacher_sum)
    tl.store(first + 4, numbers.teacher_self)
    tl.store(first + 5, numbers.teacher_cross)
    tl.store(first + 6, numbers.student_self)
    tl.store(first + 7, numbers.student_cross)


@triton.jit
def load_coefficients(a, b, c, row):  # pointers to [n] -> three scalars
    """A row's numbers in the gradient form."""
    return Coefficients(tl.load(a + row), tl.load(b + row), tl.load(c + row))


@triton.jit
def store_coefficients(a, b, c, row, coefficients):  # pointers to [n]; three scalars
    """Writes a row's numbers in the gradient form."""
    tl.store(a + row, coefficients.a)
    tl.store(b + row, coefficients.b)
    tl.store(c + row, coefficients.c)
