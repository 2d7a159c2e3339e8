"""Gradients that are kept in fp16: what of a token's weight waits until the upstream gradient is known.

What underflows in fp16 is decided by token weight times upstream gradient over N, and a loss scaler's upstream gradient
of 65,536 comes last. So the gradients are stored as those of weights of one size, and multiplied by the rest in
backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What a row's gradient is stored at in fp16: entries from 2^-29 on are kept, up to 4,094, a KL of thousands of nats.
FP16_WEIGHT = 16.0


def within_fp16(factors: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """Splits the tokens' factors ``[N]`` into what enters gradients in fp16 and what multiplies them later.

    A gradient of logits waits for its row's whole factor, ``[N]``, and is stored as that of one weight for all. A block
    that goes into products has one factor for all rows, their largest, 0-d: the sums over rows are in fp32.
    """
    if per_row:
        return (factors != 0).to(factors.dtype) * FP16_WEIGHT, factors / FP16_WEIGHT
    largest = factors.abs().amax() if len(factors) else factors.new_zeros(())
    largest = torch.where(largest == 0, 1.0, largest)
    return factors / largest, largest


def outstanding(upstream: Tensor, later: Tensor | None, leading: torch.Size) -> Tensor:
    """Returns what backward multiplies stored gradients by: 0-d, or ``[..., 1]`` for those of logits in fp16."""
    if later is None:
        return upstream
    factor = upstream * later
    return factor if factor.dim() == 0 else factor.view(*leading, 1)
