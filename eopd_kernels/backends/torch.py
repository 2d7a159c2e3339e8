"""The backend ``torch``: plain PyTorch, for every device, and where no compiler was there to build the native kernels.

A block is visited in tiles, so that the temporaries stay small whatever the block's size.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..row_math.formulas import (
    Coefficients,
    Combine,
    column_gradient,
    gated_coefficients,
    gated_loss,
    mixture_column_gradient,
    open_gate,
    transform_slope,
    transformed,
    unused,
)
from ..row_math.mixture import MixtureStatistics, Skews
from ..row_math.statistics import RowStatistics
from ..tensors import on_host
from . import Block
from . import unchanged as at
from . import unchanged as problem

__all__ = ["TENSORS", "at", "description", "kernels", "problem", "takes", "unavailable"]
TENSORS = "all tensors"
# Elements of a tile: some twenty fp32 temporaries of it live at a time, 20 MiB. Loss and gradient of 256 × 49,152 on
# two cores: 0.45 s in tiles of 2^17, 0.38 of 2^18, 0.45 of 2^19, 0.36 of 2^20.
TILE_ELEMENTS = 2**18
# Elsewhere a tile is some thirty launches in each of two visits. 8,192 × 128,256 logits are 63 tiles, whose temporaries
# take 1.3 GiB; in tiles of 2^18 they would be 270,000 launches, 1.6 s at 6 µs each. Arithmetic, not measured.
GPU_TILE_ELEMENTS = 2**24
TILE_COLUMNS = 2**14


def unavailable() -> str | None:
    """None: this backend is always available."""
    return None


def description() -> str:
    """One line for ``python -m eopd_kernels.info``."""
    return "plain PyTorch in tiles, on every device"


def takes(device: torch.device) -> bool:
    """Whether tensors on ``device`` can be given to the functions."""
    return True


def kernels() -> ModuleType:
    """This module."""
    return sys.modules[__name__]


def row_statistics(block: Block, statistics: Tensor) -> None:
    """The eight numbers of every row into ``statistics`` [n, 8]."""
    for rows, tiles in row_groups(block.student):
        total = RowStatistics.empty(rows.stop - rows.start, statistics.dtype, statistics.device)
        for columns in tiles:
            total = total.merge(RowStatistics.of(*transformed_tile(block, rows, columns, statistics.dtype)))
        statistics[rows] = total.packed


def row_gradient(block: Block, statistics: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    """∂/∂x_s of Σ rows' losses into ``out`` [n, V]; ``statistics`` [n, 8], the coefficients [n]."""
    gradient_in_tiles(block, statistics, Coefficients(a, b, c), column_gradient)


def row_loss_and_gradient(
    block: Block,
    weights: Tensor,  # [n]
    gate_threshold: float,
    combine: Sequence[float],
    statistics: Tensor,  # [n, 8], written
    gate: Tensor,  # [n], written
    loss: Tensor,  # [n], written
) -> None:
    """Statistics, gate, loss and gradient of the rows whose weight is not 0."""
    row_statistics(block, statistics)
    unread = RowStatistics.empty(1, statistics.dtype, statistics.device).packed
    statistics.copy_(torch.where(weights.unsqueeze(1) == 0, unread, statistics))
    numbers = RowStatistics(statistics)
    gate.copy_(torch.where(weights == 0, 0.0, open_gate(numbers, gate_threshold)))
    loss.copy_(torch.where(weights == 0, 0.0, gated_loss(numbers, gate, Combine(*combine))))
    gradient_in_tiles(block, statistics, gated_coefficients(numbers, gate, Combine(*combine), weights), column_gradient)


def row_mixture(block: Block, statistics: Tensor, skews: Sequence[float], mixture: Tensor) -> None:
    """The four numbers of every row into ``mixture`` [n, 4]; ``statistics`` [n, 8], of whole rows."""
    mixture.zero_()
    for rows, tiles in row_groups(block.student):
        part = RowStatistics(statistics[rows])
        for columns in tiles:
            z_s, z_t = transformed_tile(block, rows, columns, statistics.dtype)
            mixture[rows] += MixtureStatistics.of(z_s, z_t, part, Skews(*skews)).packed


def row_mixture_gradient(
    block: Block,
    statistics: Tensor,  # [n, 8], of whole rows
    a: Tensor,  # [n]
    b: Tensor,  # [n]
    c: Tensor,  # [n]
    skews: Sequence[float],
) -> None:
    """∂/∂x_s of Σ rows' skewed divergences into ``out`` [n, V]."""
    gradient = functools.partial(mixture_column_gradient, skews=Skews(*skews))
    gradient_in_tiles(block, statistics, Coefficients(a, b, c), gradient)


def gradient_in_tiles(
    block: Block,
    statistics: Tensor,  # [n, 8]
    coefficients: Coefficients,  # [n] each
    gradient_of: Callable[[Tensor, Tensor, Tensor, Coefficients], Tensor],
) -> None:
    """Writes the gradient. ``gradient_of`` maps p, q, log p − log q ``[n, k]`` and coefficients ``[n, 1]`` to that of
    the transformed logits."""
    for rows, tiles in row_groups(block.student):
        part = RowStatistics(statistics[rows])
        k = Coefficients(*(k[rows].unsqueeze(1) for k in coefficients))
        for columns in tiles:
            z_s, z_t = transformed_tile(block, rows, columns, statistics.dtype)
            gradient = gradient_of(*part.probabilities(z_s, z_t), k)
            gradient = torch.where(unused(k), 0.0, gradient)
            block.out[rows, columns] = gradient * transform_slope(z_s, block.transforms[:3])


def transformed_tile(block: Block, rows: slice, columns: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The transformed logits of both sides, in the compute dtype."""
    student, teacher, transforms, _, _ = block
    return (
        transformed(student[rows, columns], transforms[:3], dtype),
        transformed(teacher[rows, columns], transforms[3:], dtype),
    )


def row_groups(logits: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Groups of rows of ``logits`` [n, V], each with the slices of the vocabulary that its tiles are."""
    n, vocab_size = logits.shape
    columns = min(vocab_size, TILE_COLUMNS)
    slices = [slice(i, min(i + columns, vocab_size)) for i in range(0, vocab_size, columns)]
    step = max(1, (TILE_ELEMENTS if on_host(logits.device) else GPU_TILE_ELEMENTS) // columns)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n)), slices
