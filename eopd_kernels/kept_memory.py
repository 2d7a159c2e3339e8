"""Memory for large gradients on a CPU, which is kept when it is given back, for the next one.

A gradient of 256 × 151,936 fp32 numbers takes 30 ms to compute, and 15 more to clear its new pages, in every step (one
core of an AMD EPYC, huge pages). So what the last one lay in is kept: one stretch of memory, however many there were.
The system is told that it may take the pages where it needs them (``MADV_FREE``); they count as resident until then.
``EOPD_KEEP_MEMORY=0`` keeps nothing.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from . import tensors

SWITCH = "EOPD_KEEP_MEMORY"
LEAST_BYTES = 2 * tensors.HUGE_PAGE_BYTES  # as torch.empty is asked for huge pages from here on
KEPT: deque[mmap.mmap] = deque(maxlen=1)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns :func:`eopd_kernels.tensors.empty`, where it can in memory that was given back.

    The memory is kept again when nothing uses the tensor's storage any more, as views, numpy arrays and autograd do.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LEAST_BYTES or not keeps(device):
        return tensors.empty(shape, dtype, device)
    try:
        memory = taken(nbytes) or fresh(nbytes)
    except OSError:  # torch says better what could not be had
        return tensors.empty(shape, dtype, device)
    lease = (ctypes.c_char * nbytes).from_buffer(memory)
    weakref.finalize(lease, give_back, memory).atexit = False
    return torch.frombuffer(lease, dtype=dtype).view(*shape)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns zeros in such memory."""
    return empty(shape, dtype, device).zero_()


def keeps(device: torch.device) -> bool:
    """Returns whether memory is kept here and now.

    Not where somebody has switched it off, where torch makes fake tensors, which have none, and in deterministic mode,
    where it fills what it hands out, so that an element nobody wrote is seen.
    """
    wanted = tensors.on_host(device) and hasattr(mmap, "MADV_FREE") and os.environ.get(SWITCH, "1") != "0"
    return (
        wanted
        and not torch.are_deterministic_algorithms_enabled()
        and tensors.has_numbers(torch.empty(0, dtype=torch.uint8, device=device))
    )


def fresh(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def taken(nbytes: int) -> mmap.mmap | None:
    """Returns what is kept if the size is about right; what is not is let go."""
    try:
        memory = KEPT.pop()
    except IndexError:
        return None
    return memory if nbytes <= len(memory) <= 2 * nbytes else None


def give_back(memory: mmap.mmap) -> None:
    memory.madvise(mmap.MADV_FREE)
    KEPT.append(memory)
