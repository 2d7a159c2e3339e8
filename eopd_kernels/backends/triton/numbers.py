"""What there is one or eight of per row, and which stretch of a row a program visits."""

import triton
import triton.language as tl


@triton.jit
def number(x, DTYPE: tl.constexpr):
    """A float argument in the compute dtype. Arguments are float64, or a float64 problem would lose its digits here."""
    return tl.full((), x, DTYPE)


@triton.jit
def stretch(part, parts, vocab_size, TILE: tl.constexpr):
    """First and last-but-one column of one of ``parts`` parts of a row: whole tiles, and the last part what is left."""
    columns = tl.cdiv(tl.cdiv(vocab_size, TILE), parts) * TILE
    return part * columns, tl.minimum(part * columns + columns, vocab_size)


@triton.jit
def load_statistics(statistics, row):  # pointer to [n, 8] -> eight scalars
    """A row's eight numbers, in the order of ``statistics.FIELDS``."""
    first = statistics + row.to(tl.int64) * 8
    return (
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
def store_statistics(statistics, row, s_max, s_sum, t_max, t_sum, t_self, t_cross, s_self, s_cross):
    """The same into ``statistics`` [n, 8]."""
    first = statistics + row.to(tl.int64) * 8
    tl.store(first, s_max)
    tl.store(first + 1, s_sum)
    tl.store(first + 2, t_max)
    tl.store(first + 3, t_sum)
    tl.store(first + 4, t_self)
    tl.store(first + 5, t_cross)
    tl.store(first + 6, s_self)
    tl.store(first + 7, s_cross)
