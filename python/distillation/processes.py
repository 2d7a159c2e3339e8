"""What processes tell each other between steps, however long one waits for another.

A collective of the training's group ends the run when a process is later than its timeout (``--ddp-timeout``, half an
hour by default), and a share of an evaluation may take longer. So these have a group of their own, whose timeout is
beyond any job's. It is gloo's on every device: nothing watches over it meanwhile, and a process that dies closes its
connections, which ends the others' wait at once.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")
PATIENCE = timedelta(weeks=3)  # in milliseconds still a number of 31 bits


@cache
def patient_group(world: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def gathered(own: Value) -> list[Value]:
    """``own`` of each process, by rank, on every process; returns when all have come here."""
    if not dist.is_initialized():
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own, group=patient_group(dist.group.WORLD))
    return found


def wait() -> None:
    """Until every process is here."""
    gathered(None)
