"""The k largest entries of each row, at the price of reading the row once."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns per group. 64 rows of 151,936, fp32, k = 16, one thread: torch.topk of the rows 6.0 ms, groups of 64 1.8, of
# 128 1.7, of 256 2.1; reading the rows once 1.0.
GROUP = 128


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns ``[n, k]`` of the k ≤ w largest of each row of ``logits`` [n, w], largest first.

    The k largest lie in the k groups with the largest maxima, so that a row is read once for the maxima of its groups,
    and only those k groups are sorted.
    """
    groups = logits.shape[1] // GROUP
    if groups <= 2 * k:
        return logits.topk(k, dim=1)
    grouped = groups * GROUP
    maxima = logits[:, :grouped].unflatten(1, (groups, GROUP)).amax(2)  # [n, groups]
    first = maxima.topk(k, dim=1, sorted=False).indices * GROUP
    columns = (first.unsqueeze(2) + torch.arange(GROUP, device=logits.device)).flatten(1)
    ragged = torch.arange(grouped, logits.shape[1], device=logits.device).expand(len(logits), -1)
    columns = torch.cat([columns, ragged], 1)
    values, best = logits.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, best)
