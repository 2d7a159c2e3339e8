"""Parameters of heads that are spread over data-parallel ranks: FSDP2's DTensors, DeepSpeed ZeRO-3's partitions.

              rank 0        rank 1                            every rank
         ┌─────────────┬─────────────┐                  ┌───────────────────┐
weight   │ Shard(0) of │ Shard(0) of │  one all-gather  │ the whole, for as │ ── chunks, products: nothing travels
         │ V × D       │ V × D       │ ───────────────► │ long as the call  │
         └─────────────┴─────────────┘                  └───────────────────┘
gradient: V × D on each rank ── one reduce-scatter, averaged as FSDP averages the other parameters ──► Shard(0)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Any) -> bool:
    """Returns whether a tensor is a DTensor, without importing that, which takes as long as the rest of the package."""
    module = getattr(torch.distributed, "tensor", None)  # torch.compile would look through all of sys.modules
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Gathers all of a DTensor, whose gradient becomes one of its placements: the average over all ranks of its mesh.

    Over ranks with different tokens that is what FSDP does with every parameter; over ranks that compute the same
    (a dimension for tensor parallelism) it is the gradient of each of them.
    """
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)  # type: ignore[attr-defined]


def rows_at(tensor: Tensor, ids: Tensor) -> Tensor:
    """Returns the rows ``ids`` of a tensor; of a DTensor one that is placed as it is, from a gather of its whole.

    So is the gradient, with that of all ranks' rows in it. Whether it is averaged over ranks with tokens of their own
    is decided where the rows are used, by :func:`whole`.
    """
    if not is_dtensor(tensor):
        return tensor.index_select(0, ids)
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    everywhere = [Replicate()] * mesh.ndim
    rows = tensor.full_tensor().index_select(0, ids)  # type: ignore[attr-defined]
    return DTensor.from_local(rows, mesh, everywhere, run_check=False).redistribute(mesh, placements)


def check_not_partitioned(name: str, weight: Tensor) -> None:
    """Refuses a parameter that DeepSpeed ZeRO-3 has partitioned: empty outside of its module's forward."""
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            f"{name} is partitioned by DeepSpeed ZeRO-3: {tuple(getattr(weight, 'ds_shape', ()))}, empty here; "
            "call the loss in the forward of the module given to deepspeed.initialize, where reading lm_head.weight "
            "gathers it: see docs/distributed.md"
        )
