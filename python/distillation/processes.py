"""What processes tell each other between steps, however long one waits for another.

A collective of the training's group fails where a process is later than its timeout (``--ddp-timeout``, half an hour by
default), and a share of an evaluation may take longer. So these have a group of their own, of gloo on any device, with
a timeout beyond any job's: a process that dies closes its connections, which ends the others' wait at once.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist


@cache
def patient_group(world: Any) -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(weeks=3))  # in milliseconds still a number of 31 bits


def gathered(own: Any) -> list[Any]:
    """``own`` of each process, by rank, on every process; returns when all have come here."""
    found = [own] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(found, own, group=patient_group(dist.group.WORLD))
    return found


def wait() -> None:
    """Until every process is here."""
    gathered(None)
