"""What the run is held to. What of ours was not run has failed; a peer that failed is compared with nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from eopd_kernels.schedules.workspace import GPU_USUAL_MIN_TOKENS, GPU_WORKSPACE_BYTES

from .cell import Cell
from .matrix import Size

# dX in bf16: the block of gradients is rounded once, the result once more.
MOST_ERROR = 3 * 2**-8
# fp32 logits of both sides and the gradient in bf16.
BYTES_PER_LOGIT = 4 + 4 + 2
# For what is small beside the blocks: row statistics, a chunk's hidden states, the allocator's rounding. The products'
# workspaces are of fixed size.
SLACK, PRODUCTS_WORKSPACE = 1.05, 64 * 2**20


@dataclass(frozen=True)
class Check:
    """One thing that has to hold."""

    name: str
    passed: bool
    detail: str = ""


def most_memory(size: Size) -> int:
    """What the schedules may take: blocks within the budget, fp32 accumulators, and the gradients in bf16."""
    blocks = max(GPU_WORKSPACE_BYTES, GPU_USUAL_MIN_TOKENS * size.vocab * BYTES_PER_LOGIT)
    gradients = (size.vocab + size.tokens) * size.student_dim * (4 + 2)
    return int(SLACK * (blocks + gradients)) + PRODUCTS_WORKSPACE


def checks(cells: Sequence[Cell], ours: Sequence[str], sizes: Sequence[Size]) -> list[Check]:
    """Of every size: ours ran, as exactly and in as little memory as stated, and took no longer than plain PyTorch."""
    found = {(cell.contender, cell.size): cell for cell in cells}
    made = []
    for size in sizes:
        plain = found.get(("plain PyTorch", size))
        for name in ours:
            cell = found.get((name, size), Cell(name, size, failure="was not run"))
            title = f"{name}, {size}"
            made.append(Check(f"{title}: runs", cell.failure is None, cell.failure or ""))
            if cell.failure is not None:
                continue
            exact = cell.error is not None and cell.error <= MOST_ERROR
            made.append(Check(f"{title}: dX", exact, f"error {cell.error}, at most {MOST_ERROR:.4f}"))
            most = most_memory(size)
            made.append(
                Check(f"{title}: memory", cell.peak <= most, f"{cell.peak / 2**20:.0f} of {most / 2**20:.0f} MiB")
            )
            if name == ours[0] and plain is not None and plain.failure is None:
                ratio = statistics.median(cell.seconds) / statistics.median(plain.seconds)
                made.append(Check(f"{title}: time", ratio <= 1, f"{ratio:.2f} of plain PyTorch's"))
    return made
