"""Vocabulary parallelism: which entries of the vocabulary a rank holds, and what it tells the others.

           rank 0         rank 1         rank 2
       ┌──────────────┬──────────────┬─────────┐       shards of consecutive entries of both heads (or of the
weight │ 0 … V_0 − 1  │ V_0 …        │   … V − 1 ░░     logits), in rank order, of any sizes; what lies beyond
       └──────────────┴──────────────┴─────────┘       vocab_size is padding and compared nowhere

hidden states, mask, labels, token_ids, …: the same on every rank
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import devices
from .arguments import described
from .head import LMHead


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
        """The ranks' tensors of one shape, in rank order."""
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
    """The process group of ``tensor_parallel_group=``, itself or that of a device mesh."""
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
    """A rank's shard of a DTensor that is sharded on ``dim`` over ``group``, attached to it: the gradient becomes a
    DTensor of the same placement. Anything else as it is."""
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


def local_head(name: str, head: Any, group: Any) -> Any:
    """A head whose tensors are this rank's shards."""
    if not isinstance(head, LMHead):
        return head
    weight = local_tensor(f"{name}.weight", head.weight, group, 0)
    bias = local_tensor(f"{name}.bias", head.bias, group, 0)
    if weight is head.weight and bias is head.bias:
        return head
    return LMHead(weight, bias, scale=head.scale, softcap=head.softcap)


def shard_of(
    group: Any,
    student: int,
    teacher: int | None,
    vocab_size: int | None,
    alike: Mapping[str, Any],
    device: torch.device,
    sums_hidden_gradient: bool,
) -> Shard:
    """This rank's shard, from the sizes of all ranks' shards; whatever is wrong with them is raised on every rank.

    Args:
        student, teacher: the entries that this rank holds of either side; None for a teacher without logits.
        vocab_size: as the caller said.
        alike: what must be the same on every rank, or the ranks would wait for different things.
    """
    own = (student, student if teacher is None else teacher, 0 if vocab_size is None else vocab_size)
    table = exchanged(group, own, alike, device)
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
    cut = shards if vocab_size is None else [cut_to(vocab_size, sizes) for sizes in shards]
    if cut[0] != cut[1]:
        raise ValueError(
            "student and teacher must have shards of the same sizes on each rank of tensor_parallel_group, got student "
            f"{shards[0]} and teacher {shards[1]}; where only padding differs, pass vocab_size (got {vocab_size})"
        )
    if whole == 0:
        raise ValueError("student and teacher must have at least one entry of the vocabulary on some rank, got none")
    rank = dist.get_rank(group)
    return Shard(group, sum(cut[0][:rank]), cut[0][rank], whole, max(cut[0]), sums_hidden_gradient)


def cut_to(vocab_size: int, sizes: list[int]) -> list[int]:
    """What is left of shards of these sizes within the first ``vocab_size`` entries."""
    kept, start = [], 0
    for size in sizes:
        kept.append(max(0, min(size, vocab_size - start)))
        start += size
    return kept


Row = tuple[int, ...]


class Exchange(NamedTuple):
    """What a group said when a rank of it last had these numbers."""

    own: Tensor  # [k]
    rows: Tensor  # [ranks, k]
    table: list[list[int]]


# Only for devices that the host would have to wait for, and only what the device then confirms.
CONFIRMED: weakref.WeakKeyDictionary[Any, dict[tuple[Row, torch.device], Exchange]] = weakref.WeakKeyDictionary()


def exchanged(group: Any, own: Row, alike: Mapping[str, Any], device: torch.device) -> list[list[int]]:
    """Every rank's numbers, in rank order.

    One all_gather per call. A CPU reads what comes. A GPU's host would have to wait for it: it does so the first time,
    and afterwards takes the ranks' numbers to be those that came with the same numbers of its own before. They are
    still sent, and the device asserts that nothing has changed: one rank's hit and another's miss both send the same,
    so that a stale entry is an error, not a hang.

    Raises:
        ValueError: the group has no backend for the device, or the ranks are not ``alike``.
    """
    try:
        group._get_backend(device)
    except RuntimeError as error:
        raise ValueError(
            f"tensor_parallel_group has no backend for tensors on {device} (CPU tensors need gloo): {error}"
        ) from None
    # repr is the same in every process; hash() is not.
    fingerprint = torch.full((1,), zlib.crc32(repr(sorted(alike.items())).encode()), dtype=torch.int64, device=device)
    known = None if devices.on_host(device) else CONFIRMED.setdefault(group, {}).get((own, device))
    numbers = torch.tensor(own, device=device) if known is None else known.own
    mine = torch.cat([numbers, fingerprint])
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    gathered = torch.stack(rows)
    if known is not None:
        torch._assert_async((gathered[:, :-1] == known.rows).all() & (gathered[:, -1] == fingerprint).all())
        return known.table
    table = gathered.tolist()
    different = [rank for rank, row in enumerate(table) if row[-1] != table[dist.get_rank(group)][-1]]
    if different:
        raise ValueError(
            "every rank of tensor_parallel_group must be called with the same tokens and options; ranks "
            f"{different} were called otherwise than this one, rank {dist.get_rank(group)}: "
            + ", ".join(f"{name}={value}" for name, value in alike.items())
        )
    table = [row[:-1] for row in table]
    if not devices.on_host(device):
        CONFIRMED[group][own, device] = Exchange(numbers, gathered[:, :-1], table)
    return table
