"""global_num_items: the denominator that makes many ranks' and micro-batches' losses one loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import described, positive_int
from ..tensors import widest_dtype


def global_num_items(
    masks: Tensor | Sequence[Tensor], *, group: Any = None, averaged_over: int | None = None
) -> Tensor:
    """What to pass as ``num_items``: the valid tokens of all ranks and micro-batches, over the ranks of the average.

    DDP and FSDP average gradients over their ranks. With N valid tokens in the whole batch and R ranks, each rank's sum
    over its tokens is to be divided by N / R, so that the average of the gradients is that of the mean over all N
    tokens, however unevenly they lie. The average of the ranks' losses, summed over micro-batches, is that mean too.

    Args:
        masks: the mask of this rank's tokens, or one for each micro-batch of the optimizer step; any shape. A token is
            valid where it is not 0. Of labels: ``labels != -100``.
        group: the ranks among which the tokens are spread. Default: the default group; one process where there is none.
        averaged_over: by how many ranks the gradients' sum will be divided. Default: the ranks of ``group``. 1 where
            gradients are summed, as sequence or context parallelism may do.

    Returns:
        0-d fp64 on the masks' device (fp32 where the device has no fp64); one all-reduce of 8 bytes, nothing waits for
        the device.

    Raises:
        TypeError, ValueError: no mask is given, or ``averaged_over`` is less than 1.

    Example::

        masks = [torch.tensor([[1, 1, 0]]), torch.tensor([[1, 1, 1]])]  # of the micro-batches of a step
        assert global_num_items(masks) == 5
    """
    masks = [masks] if isinstance(masks, Tensor) else list(masks)
    if not masks or not all(isinstance(mask, Tensor) for mask in masks):
        raise TypeError(f"masks must be a tensor or a sequence of at least one, got {described(masks)}")
    if averaged_over is not None:
        positive_int("averaged_over", averaged_over)
    count = torch.stack([(mask != 0).sum() for mask in masks]).sum()
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count, group=group)
        ranks = dist.get_world_size(group)
    return count.to(widest_dtype(count.device)) / (ranks if averaged_over is None else averaged_over)
