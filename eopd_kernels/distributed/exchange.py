"""What the ranks of a tensor_parallel_group tell each other in each call: four numbers, once, before anything else.

          entries held of       compared in all    options of the call,
         student   teacher        (vocab_size)     numbers of the tokens
rank 0    75,968    75,968           151,936        9f3c1a07 51d2e8b4       the last is to be the same on every rank
rank 1    75,968    75,968           151,936        9f3c1a07 51d2e8b4
rank 2        −1        −1                −1                        0       its own checks failed: the others raise too
"""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import tensors

Row = tuple[int, int, int]  # entries of the student, entries of the teacher, vocab_size
REFUSED: Row = (-1, -1, -1)


class Known(NamedTuple):
    """What a group said when a rank of it last had these numbers."""

    own: Tensor  # [3]
    rows: Tensor  # [ranks, 3]
    table: list[list[int]]


# Only for devices that the host would have to wait for, and only what the device then confirms.
CONFIRMED: weakref.WeakKeyDictionary[Any, dict[tuple[Row, torch.device], Known]] = weakref.WeakKeyDictionary()


class Exchange:
    """The one exchange of the ranks in each call.

    A rank whose checks fail before it takes part all the same, so that none waits for it.

    Args:
        group: the ranks.
        device: where their tensors are; None if that is not known, because what this rank was given is no tensor.
    """

    def __init__(self, group: Any, device: torch.device | None) -> None:
        self.group, self.device = group, device
        self.begun = False

    def refuse(self) -> None:
        """Tells the ranks that wait for this one that it has refused the call; nothing if they wait no more."""
        if self.begun or self.device is None or dist.get_world_size(self.group) == 1:
            return
        with contextlib.suppress(RuntimeError):  # the group has no backend for the device, or lost a rank
            self._gathered(torch.tensor((*REFUSED, 0), device=self.device))

    def table(self, own: Row, alike: Mapping[str, Any], numbers: Iterable[Tensor | None]) -> list[list[int]]:
        """Returns every rank's numbers, in rank order.

        One all_gather per call. A CPU reads what comes. A GPU's host would have to wait for it: it does so the first
        time, and afterwards takes the ranks' numbers to be those that came with the same numbers of its own before.
        They are still sent, and the device asserts that nothing has changed: one rank's hit and another's miss both
        send the same, so that a stale entry is an error, not a hang.

        Args:
            own: this rank's.
            alike: options that must be the same on every rank, or the ranks would wait for different things or compute
                different losses. Their ``repr`` must not depend on the process.
            numbers: what was said of the tokens, likewise, to the bit.

        Raises:
            ValueError: the group has no backend for the device, a rank refused the call, or they are not ``alike``.
        """
        group, device = self.group, self.device
        assert device is not None
        self.begun = True
        try:
            group._get_backend(device)
        except RuntimeError as error:
            raise ValueError(
                f"tensor_parallel_group has no backend for tensors on {device} (CPU tensors need gloo): {error}"
            ) from None
        # repr is the same in every process; hash() is not. The upper half is the options', the lower the tokens'.
        options = zlib.crc32(repr(sorted(alike.items())).encode()) - 2**31 << 32
        fingerprint = digest(numbers) + options
        known = None if tensors.on_host(device) else CONFIRMED.setdefault(group, {}).get((own, device))
        sizes = torch.tensor(own, device=device) if known is None else known.own
        rows = self._gathered(torch.cat([sizes, fingerprint]))
        if known is not None:
            torch._assert_async((rows[:, :-1] == known.rows).all() & (rows[:, -1] == fingerprint).all())
            return known.table
        table = rows.tolist()
        check_alike(table, dist.get_rank(group), alike)
        table = [row[:-1] for row in table]
        if not tensors.on_host(device):
            CONFIRMED[group][own, device] = Known(sizes, rows[:, :-1], table)
        return table

    def _gathered(self, row: Tensor) -> Tensor:
        """Gathers the ranks' rows, ``[ranks, 4]``."""
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(rows, row, group=self.group)
        return torch.stack(rows)


def check_alike(table: list[list[int]], rank: int, alike: Mapping[str, Any]) -> None:
    """Refuses what a rank refused, and ranks that were called otherwise than ``rank``."""
    refused = [r for r, row in enumerate(table) if tuple(row[:-1]) == REFUSED]
    if refused:
        raise ValueError(f"ranks {refused} of tensor_parallel_group refused this call: see the error of each")
    others = {r: row[-1] for r, row in enumerate(table) if row[-1] != table[rank][-1]}
    if not others:
        return
    of_options = [r for r, fingerprint in others.items() if fingerprint >> 32 != table[rank][-1] >> 32]
    raise ValueError(
        "every rank of tensor_parallel_group must be called with the same tokens and options; ranks "
        f"{of_options or list(others)} were called otherwise than this one, rank {rank}: "
        + (
            ", ".join(f"{name}={value}" for name, value in alike.items())
            if of_options
            else "the options are the same, but not every number of a token (mask, labels, num_items, token_ids, "
            "old_log_probs, advantages, gate, reverse_weights, forward_weights, a TopKTeacher's), which must be the "
            "same to the bit"
        )
    )


def digest(tensors: Iterable[Tensor | None]) -> Tensor:
    """Returns a hash ``[1]`` int64 below 2³² of every bit of the tensors and its place. No device is waited for."""
    bits = torch.cat([as_integers(tensor).reshape(-1) for tensor in tensors if tensor is not None])
    # A multiplicative hash of each number and its place (products and sums wrap around at 64 bits), and their sum.
    bits.add_(torch.arange(1, len(bits) + 1, device=bits.device).mul_(-0x61C8864680B583EB))
    for _ in range(2):
        bits.bitwise_xor_(bits >> 31).mul_(-0x40A7B892E31B1A47)
    total = bits.sum(dim=0, keepdim=True)
    return (total ^ total >> 32) & 0xFFFFFFFF


def as_integers(tensor: Tensor) -> Tensor:
    """Returns the bits of floating-point numbers as int64; integers as they are."""
    if tensor.is_floating_point():
        return tensor.view(torch.int64 if tensor.dtype == torch.float64 else torch.int32).long()
    return tensor.long()
