"""The row functions in plain PyTorch: for every device, and where no compiler was there to build the native ones.

A block is visited in tiles, so that the temporaries stay small whatever the block's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..head import compute_dtype
from ..objective import Coefficients, Combine, gradient_coefficients, open_gate
from ..statistics import RowStatistics, centred_exp, weighted

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
    dtype = statistics.dtype
    numbers = RowStatistics(statistics)
    for rows, slices in tiles(student):
        part = RowStatistics(statistics[rows])
        coefficients = Coefficients(*(k[rows].unsqueeze(1) for k in (a, b, c)))
        log_sum_ratio = numbers.log_sum_ratio[rows].unsqueeze(1)
        for columns in slices:
            z_s = transformed(student[rows, columns], transforms[:3], dtype)
            z_t = transformed(teacher[rows, columns], transforms[3:], dtype)
            gradient = element_gradient(z_s, z_t, part, log_sum_ratio, coefficients)
            out[rows, columns] = gradient * transform_slope(z_s, transforms[:3])


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
    gate = open_gate(statistics, gate_threshold)
    coefficients = gradient_coefficients(statistics, gate, Combine(*combine), weights)
    row_gradient(student, teacher, statistics.packed, *coefficients, transforms, out)
    return statistics.packed, gate


def element_gradient(
    z_s: Tensor, z_t: Tensor, statistics: RowStatistics, log_sum_ratio: Tensor, coefficients: Coefficients
) -> Tensor:
    """p·(a + b·(log p − log q)) − c·q for transformed logits ``[n, k]`` and columns ``[n, 1]`` of numbers per row."""
    a, b, c = coefficients
    s, e_s = centred_exp(z_s, statistics.student_max)
    t, e_t = centred_exp(z_t, statistics.teacher_max)
    p = e_s / statistics.student_sum.unsqueeze(1)
    q = e_t / statistics.teacher_sum.unsqueeze(1)
    log_ratio = (s - t) - log_sum_ratio
    gradient = weighted(p, a + weighted(b, log_ratio)) - weighted(c, q)
    unused = (a == 0) & (b == 0) & (c == 0)
    return torch.where(unused, 0.0, gradient)


def transformed(logits: Tensor, transform: Sequence[float], dtype: torch.dtype) -> Tensor:
    """z = softcap·tanh(scale·x / softcap) / T in the compute dtype; without a softcap (0) z = scale·x / T."""
    scale, softcap, temperature = transform
    logits = logits.to(dtype)
    if softcap != 0:
        return torch.tanh(logits * (scale / softcap)) * (softcap / temperature)
    return logits if scale == temperature else logits * (scale / temperature)


def transform_slope(z: Tensor, transform: Sequence[float]) -> Tensor | float:
    """dz/dx, read off z itself: scale·(1 − tanh²) / T."""
    scale, softcap, temperature = transform
    if softcap != 0:
        return (1 - (z * (temperature / softcap)) ** 2) * (scale / temperature)
    return scale / temperature


def tiles(block: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Groups of rows of a block ``[n, V]``, each with the slices of the vocabulary it is visited in."""
    n, vocab_size = block.shape
    columns = min(vocab_size, TILE_COLUMNS)
    slices = [slice(i, min(i + columns, vocab_size)) for i in range(0, vocab_size, columns)]
    step = max(1, TILE_ELEMENTS // columns)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n)), slices
