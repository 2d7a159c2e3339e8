"""The row functions in plain PyTorch: for every device, and where no compiler was there to build the native ones.

A block is visited in tiles, so that the temporaries stay small whatever the block's size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..row_math.formulas import (
    Coefficients,
    Combine,
    column_gradient,
    gated_coefficients,
    mixture_column_gradient,
    open_gate,
    transform_slope,
    transformed,
)
from ..row_math.mixture import MixtureStatistics, Skews
from ..row_math.statistics import RowStatistics
from ..tensors import compute_dtype

# Elements of a tile: some twenty fp32 temporaries of it live at a time, 20 MiB. Loss and gradient of 256 × 49,152 on
# two cores: 0.45 s in tiles of 2^17, 0.38 of 2^18, 0.45 of 2^19, 0.36 of 2^20.
TILE_ELEMENTS = 2**18
TILE_COLUMNS = 2**14


def unavailable() -> str | None:
    """Always available."""
    return None


def description() -> str:
    """One line for ``python -m eopd_kernels.info``."""
    return "plain PyTorch in tiles, on every device"


def row_statistics(student: Tensor, teacher: Tensor, transforms: Sequence[float]) -> Tensor:
    """The eight numbers of every row, ``[n, 8]``; see :mod:`eopd_kernels.rows`."""
    dtype = compute_dtype(student, teacher)
    packed = torch.empty(len(student), 8, dtype=dtype, device=student.device)
    for rows, slices in tiles(student):
        total = RowStatistics.empty(rows.stop - rows.start, dtype, student.device)
        for columns in slices:
            z_s = transformed(student[rows, columns], transforms[:3], dtype)
            z_t = transformed(teacher[rows, columns], transforms[3:], dtype)
            total = total.merge(RowStatistics.of(z_s, z_t))
        packed[rows] = total.packed
    return packed


def row_gradient(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    transforms: Sequence[float],
    out: Tensor,
) -> None:
    """∂/∂x_s of Σ rows' losses into ``out`` [n, V]; see :mod:`eopd_kernels.rows`."""
    gradient_in_tiles(student, teacher, statistics, Coefficients(a, b, c), transforms, out, column_gradient)


def row_loss_and_gradient(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    gate_threshold: float,
    combine: Sequence[float],
    transforms: Sequence[float],
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Statistics ``[n, 8]`` and gate ``[n]``, and the gradient into ``out``; see :mod:`eopd_kernels.rows`."""
    packed = row_statistics(student, teacher, transforms)
    unread = RowStatistics.empty(1, packed.dtype, packed.device).packed
    statistics = RowStatistics(torch.where(weights.unsqueeze(1) == 0, unread, packed))
    gate = torch.where(weights == 0, 0.0, open_gate(statistics, gate_threshold))
    coefficients = gated_coefficients(statistics, gate, Combine(*combine), weights)
    row_gradient(student, teacher, statistics.packed, *coefficients, transforms, out)
    return statistics.packed, gate


def row_mixture(
    student: Tensor, teacher: Tensor, statistics: Tensor, skews: Sequence[float], transforms: Sequence[float]
) -> Tensor:
    """The four numbers of every row, ``[n, 4]``; see :mod:`eopd_kernels.rows`."""
    packed = statistics.new_zeros(len(student), 4)
    for rows, slices in tiles(student):
        part = RowStatistics(statistics[rows])
        for columns in slices:
            z_s = transformed(student[rows, columns], transforms[:3], statistics.dtype)
            z_t = transformed(teacher[rows, columns], transforms[3:], statistics.dtype)
            packed[rows] += MixtureStatistics.of(z_s, z_t, part, Skews(*skews)).packed
    return packed


def row_mixture_gradient(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skews: Sequence[float],
    transforms: Sequence[float],
    out: Tensor,
) -> None:
    """∂/∂x_s of Σ rows' losses into ``out`` [n, V]; see :mod:`eopd_kernels.rows`."""
    element = functools.partial(mixture_column_gradient, skews=Skews(*skews))
    gradient_in_tiles(student, teacher, statistics, Coefficients(a, b, c), transforms, out, element)


def gradient_in_tiles(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    coefficients: Coefficients,
    transforms: Sequence[float],
    out: Tensor,
    element: Callable[[Tensor, Tensor, Tensor, Coefficients], Tensor],
) -> None:
    """``element`` maps p, q, log p − log q ``[n, k]`` and coefficients ``[n, 1]`` to the gradient by z_s."""
    for rows, slices in tiles(student):
        part = RowStatistics(statistics[rows])
        a, b, c = (k[rows].unsqueeze(1) for k in coefficients)
        unused = (a == 0) & (b == 0) & (c == 0)
        for columns in slices:
            z_s = transformed(student[rows, columns], transforms[:3], statistics.dtype)
            z_t = transformed(teacher[rows, columns], transforms[3:], statistics.dtype)
            gradient = element(*part.probabilities(z_s, z_t), Coefficients(a, b, c))
            gradient = torch.where(unused, 0.0, gradient)
            out[rows, columns] = gradient * transform_slope(z_s, transforms[:3])


def tiles(block: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Groups of rows of a block ``[n, V]``, each with the slices of the vocabulary it is visited in."""
    n, vocab_size = block.shape
    columns = min(vocab_size, TILE_COLUMNS)
    slices = [slice(i, min(i + columns, vocab_size)) for i in range(0, vocab_size, columns)]
    step = max(1, TILE_ELEMENTS // columns)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n)), slices
