"""Vocabulary parallelism: which entries of the vocabulary a rank holds, and what it tells the others.

           rank 0         rank 1         rank 2
       ┌──────────────┬──────────────┬─────────┐       shards of consecutive entries of both heads (or of the
weight │ 0 … V_0 − 1  │ V_0 …        │   … V − 1 ░░     logits), in rank order, of any sizes; what lies beyond
       └──────────────┴──────────────┴─────────┘       vocab_size is padding and compared nowhere

hidden states, mask, labels, token_ids, …: the same on every rank
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import described
from .exchange import Exchange


@dataclass(frozen=True, eq=False)
class Shard:
    """A rank's part of a vocabulary that is spread over a group.

    Args:
        group: the ranks that hold the vocabulary together, in its order.
        offset: the first entry of this rank.
        size: how many of its entries are compared; 0 where it holds nothing but padding, or nothing at all.
        vocab_size: how many entries are compared on all ranks together.
        widest: the largest ``size`` of a rank: what every rank plans its blocks with, so that all plan the same.
        sums_hidden_gradient: whether the hidden states' gradient is summed over the ranks, or left as this rank's part.
    """

    group: Any
    offset: int
    size: int
    vocab_size: int
    widest: int
    sums_hidden_gradient: bool

    def maximum(self, tensor: Tensor) -> Travelling:
        """Starts to replace ``tensor`` by its maximum over the ranks."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def sum(self, tensor: Tensor) -> Travelling:
        """Starts to replace ``tensor`` by its sum over the ranks, the same bits on each of them."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Gathers the ranks' tensors of one shape, in rank order."""
        if tensor.numel() == 0:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, tensor, group=self.group)
        return parts

    def _reduced(self, tensor: Tensor, op: Any) -> Travelling:
        if tensor.numel() == 0:
            return Travelling(None)
        return Travelling(dist.all_reduce(tensor, op, group=self.group, async_op=True))


class Travelling(NamedTuple):
    """A collective on its way. On a GPU waiting for it holds up the stream, not the host."""

    work: Any  # None where there was nothing to send

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()


def process_group(given: Any) -> Any:
    """Returns the process group of ``tensor_parallel_group=``: itself, or that of a device mesh."""
    if dist.is_available():
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(given, dist.ProcessGroup):
            return given
        if isinstance(given, DeviceMesh):
            if given.ndim == 1:
                return given.get_group()
            raise TypeError(
                "tensor_parallel_group must have one dimension, such as mesh['tp'], got a device mesh of the shape "
                f"{tuple(given.shape)}"
            )
    raise TypeError(
        "tensor_parallel_group must be a ProcessGroup that this rank belongs to, a DeviceMesh of one dimension or "
        f"None, got {described(given)}"
    )


def local_tensor(name: str, tensor: Any, group: Any, dim: int) -> Any:
    """Returns this rank's shard of a DTensor that is sharded on ``dim`` over ``group``; anything else as it is.

    The shard is attached to the DTensor: the gradient becomes a DTensor of the same placement.
    """
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(tensor, DTensor):
        return tensor
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    same_ranks = mesh.mesh.flatten().tolist() == dist.get_process_group_ranks(group)
    if mesh.ndim != 1 or not same_ranks or placements != (Shard(dim % tensor.ndim),):
        raise ValueError(
            f"{name} must be sharded on its vocabulary, Shard({dim % tensor.ndim}), over tensor_parallel_group (ranks "
            f"{dist.get_process_group_ranks(group)}), got a DTensor with {placements} over {mesh}"
        )
    return tensor.to_local()


def shard_of(
    exchange: Exchange,
    student: int,
    teacher: int | None,
    vocab_size: int | None,
    alike: Mapping[str, Any],
    numbers: Iterable[Tensor | None],
    sums_hidden_gradient: bool,
) -> Shard:
    """Returns this rank's shard, from the sizes of all shards; what is wrong with them is raised on every rank.

    Args:
        student, teacher: the entries that this rank holds of either side; None for a teacher without logits.
        vocab_size: as the caller said.
        alike, numbers: what must be the same on every rank, as in :meth:`Exchange.table`.
    """
    own = (student, student if teacher is None else teacher, 0 if vocab_size is None else vocab_size)
    table = exchange.table(own, alike, numbers)
    compared = [row[2] for row in table]
    if len(set(compared)) > 1:
        raise ValueError(f"vocab_size must be the same on every rank of tensor_parallel_group, got {compared}")
    shards = [[row[side] for row in table] for side in (0, 1)]
    whole = min(sum(sizes) for sizes in shards) if vocab_size is None else vocab_size
    if vocab_size is not None and not 1 <= vocab_size <= min(sum(sizes) for sizes in shards):
        raise ValueError(
            "vocab_size must be between 1 and the smaller vocabulary of all ranks together (student "
            f"{sum(shards[0])}, teacher {sum(shards[1])}), got {vocab_size}"
        )
    for side, sizes in zip(("student", "teacher"), shards, strict=True):
        if vocab_size is not None and min(sizes) >= vocab_size:
            raise ValueError(
                f"{side} must be a shard of the vocabulary on each rank of tensor_parallel_group, got all of "
                f"vocab_size={vocab_size} on every rank, which hold {sizes} entries: pass each rank consecutive "
                "entries of its own of the logits or of the head, or leave tensor_parallel_group out"
            )
    cut = shards if vocab_size is None else [cut_to(vocab_size, sizes) for sizes in shards]
    if cut[0] != cut[1]:
        raise ValueError(
            "student and teacher must have shards of the same sizes on each rank of tensor_parallel_group, got student "
            f"{shards[0]} and teacher {shards[1]}; where only padding differs, pass vocab_size (got {vocab_size})"
        )
    if whole == 0:
        raise ValueError("student and teacher must have at least one entry of the vocabulary on some rank, got none")
    rank = dist.get_rank(exchange.group)
    return Shard(exchange.group, sum(cut[0][:rank]), cut[0][rank], whole, max(cut[0]), sums_hidden_gradient)


def cut_to(vocab_size: int, sizes: list[int]) -> list[int]:
    """Returns the sizes of what of each shard lies within the first ``vocab_size`` entries."""
    kept, start = [], 0
    for size in sizes:
        kept.append(max(0, min(size, vocab_size - start)))
        start += size
    return kept
