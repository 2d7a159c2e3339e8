"""Large memory on a CPU, which is kept when it is given back, for the next call: gradients, and blocks of logits.

A gradient of 256 × 151,936 fp32 numbers takes 30 ms to compute, and 15 more to clear its new pages, in every step (one
core of an AMD EPYC, huge pages). New blocks cost the loss 12 to 25 % of its time in a virtual machine whose host gives
its pages late: 512 and 2,048 tokens of V = 16,384, D = 256 took 1.14 and 1.23 times as long as their products, and 1.00
and 1.04 in blocks that were there.

So the stretches of memory that the last call lay in are kept: one of a gradient, however many there were, and a call's
blocks. The system is told that it may take the pages where it needs them (``MADV_FREE``); they count as resident until
then. ``EOPD_KEEP_MEMORY=0`` keeps nothing.
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
GRADIENTS: deque[mmap.mmap] = deque(maxlen=1)
BLOCKS: deque[mmap.mmap] = deque(maxlen=3)  # both sides' logits, and a gradient of another dtype than theirs


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, kept: deque[mmap.mmap] = GRADIENTS) -> Tensor:
    """Returns :func:`eopd_kernels.tensors.empty`, where it can in memory that was given back. ``kept``: of what kind.

    The memory is kept again when nothing uses the tensor's storage any more, as views, numpy arrays and autograd do.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LEAST_BYTES or not keeps(device):
        return tensors.empty(shape, dtype, device)
    if memory := fitting(nbytes, kept):
        return tensor_in(memory, kept, shape, dtype)
    kept.clear()
    if kept is GRADIENTS and (memory := lent(nbytes)):
        return tensor_in(memory, BLOCKS, shape, dtype)
    try:
        memory = fresh(nbytes)
    except OSError:  # torch says better what could not be had
        return tensors.empty(shape, dtype, device)
    return tensor_in(memory, kept, shape, dtype)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns zeros in such memory."""
    return empty(shape, dtype, device).zero_()


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``tensor.to(dtype)``, where it can in memory of blocks; a tracer's tensor too."""
    nbytes = tensor.numel() * dtype.itemsize
    asked = tensor.dtype != dtype and type(tensor) is Tensor and nbytes >= LEAST_BYTES and keeps(tensor.device)
    memory = lent(nbytes) if asked else None
    return tensor.to(dtype) if memory is None else tensor_in(memory, BLOCKS, tensor.shape, dtype).copy_(tensor)


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


def fitting(nbytes: int, kept: deque[mmap.mmap], most: float = 2.0) -> mmap.mmap | None:
    """Takes out the smallest of what is kept that has the size, and ``most`` times the bytes at most."""
    found = []
    try:
        while True:
            found.append(kept.popleft())
    except IndexError:  # that was all
        pass
    chosen = min((memory for memory in found if nbytes <= len(memory) <= most * nbytes), key=len, default=None)
    kept.extend(memory for memory in found if memory is not chosen)
    return chosen


def lent(nbytes: int) -> mmap.mmap | None:
    """Takes out a block's memory for a gradient, or lets go of blocks to make room for it: a larger one, else all.

    One chunk of tokens has given its logits back when its head's gradient is made, which is then all that counts.
    """
    memory = fitting(nbytes, BLOCKS)
    if memory is None and fitting(nbytes, BLOCKS, most=math.inf) is None:
        BLOCKS.clear()
    return memory


def tensor_in(memory: mmap.mmap, kept: deque[mmap.mmap], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns a tensor in memory that is kept when nothing uses it any more."""
    lease = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_buffer(memory)
    weakref.finalize(lease, give_back, memory, kept).atexit = False
    return torch.frombuffer(lease, dtype=dtype).view(*shape)


def give_back(memory: mmap.mmap, kept: deque[mmap.mmap]) -> None:
    memory.madvise(mmap.MADV_FREE)
    kept.append(memory)
