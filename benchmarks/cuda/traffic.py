"""The bytes that the CUDA kernels move, counted by what emulates them: each load of a logit, each store of a gradient.

The plans are those of a GPU, threads, clusters and all; only the instructions run on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import torch

from eopd_kernels.backends import cuda
from eopd_kernels.backends.cuda.plan import KEPT, Plan, Row, resident, streaming
from eopd_kernels.rows import FUNCTIONS

from ..results import markdown_table
from .occupancy import DEVICES, VOCABULARIES

ROWS = 2
IDENTITY, ADD, THRESHOLD = [1.0, 0.0, 1.0] * 2, [1.0, 0.0, 0.0, 1.0], 0.8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Traffic:
    """Bytes per logit pair, and how many of the loads were of a single logit."""

    plan: Plan
    loads: float
    stores: float
    scalar_loads: int


def count(vocab_size: int, student: torch.dtype, out: torch.dtype, device: str, keeps: bool = True) -> Traffic:
    """Of loss and gradient as ``device`` would be given them; ``keeps=False`` for two visits all the same."""
    row = Row(vocab_size, student.itemsize, student.itemsize)
    kept = resident(row, DEVICES[device]) if keeps else None
    plan = kept or streaming(ROWS * DEVICES[device].multiprocessors, vocab_size, DEVICES[device])
    blocks = [torch.randn(ROWS, vocab_size, generator=torch.Generator().manual_seed(i)).to(student) for i in range(2)]
    native = cuda.kernels()
    native.reset_counters()
    with mock.patch.object(cuda, "resident_or_streaming", lambda *blocks: plan):
        gradient = torch.empty(ROWS, vocab_size, dtype=out)
        FUNCTIONS["cuda"].row_loss_and_gradient(
            blocks[0], blocks[1], torch.ones(ROWS), THRESHOLD, ADD, IDENTITY, gradient
        )
    counted = native.counters()
    pairs = ROWS * vocab_size
    return Traffic(plan, counted["logit_bytes"] / pairs, counted["gradient_bytes"] / pairs, counted["scalar_loads"])


def table() -> str:
    rows = []
    for logits, gradient in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
        for vocab_size in VOCABULARIES:
            for device, keeps in (("H100", True), ("H100", False)):
                traffic = count(vocab_size, DTYPES[logits], DTYPES[gradient], device, keeps)
                figures = (traffic.loads, traffic.stores, traffic.loads + traffic.stores)
                kept = f"{KEPT[traffic.plan.kept]}, {traffic.plan.cluster}"
                rows.append([f"{logits} → {gradient}", f"{vocab_size:,}", kept, *(f"{figure:g}" for figure in figures)])
    return markdown_table(("logits → gradient", "V", "kept in, cluster", "loads", "stores", "together"), rows)
