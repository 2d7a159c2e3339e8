"""Heads whose parameters are spread over data-parallel ranks: FSDP2's DTensors, DeepSpeed ZeRO-3's partitions.

              rank 0        rank 1                            every rank
         ┌─────────────┬─────────────┐                  ┌───────────────────┐
weight   │ Shard(0) of │ Shard(0) of │  one all-gather  │ the whole, for as │ ── chunks, products: nothing travels
         │ V × D       │ V × D       │ ───────────────► │ long as the call  │
         └─────────────┴─────────────┘                  └───────────────────┘
gradient: V × D on each rank ── one reduce-scatter, averaged as FSDP averages the other parameters ──► Shard(0)
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from .head import LMHead


def is_dtensor(tensor: Any) -> bool:
    """Without importing DTensor, which takes as long as the rest of the package: whoever has one has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(head: LMHead | None) -> LMHead | None:
    """The head with its whole weight and bias on each rank: one collective for each of them that is a DTensor."""
    if head is None or not (is_dtensor(head.weight) or is_dtensor(head.bias)):
        return head
    bias = None if head.bias is None else whole(head.bias)
    return LMHead(whole(head.weight), bias, scale=head.scale, softcap=head.softcap)


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor. Its gradient becomes one of the same placements: the average over all ranks of its mesh.

    Over ranks with different tokens that is what FSDP does with every parameter; over ranks that compute the same
    (a dimension for tensor parallelism) it is the gradient of each of them.
    """
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)  # type: ignore[attr-defined]
