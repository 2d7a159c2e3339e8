"""Memory: large fresh tensors whose first touch does not dominate the kernels that fill them, and who shares any."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 * 2**20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, on Linux in huge pages where it is large.

    A gradient of 256 × 151,936 fp32 numbers is 38,000 pages of 4 KiB, and their faults take twice the time of the
    arithmetic; it is 76 huge ones.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= 2 * HUGE_PAGE_BYTES:
        advise_huge_pages(tensor)
    return tensor


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.zeros``, likewise."""
    return empty(shape, dtype, device).zero_()


def advise_huge_pages(tensor: Tensor) -> None:
    """Asks for huge pages behind the whole pages of a fresh tensor. It is advice: the system may decline."""
    madvise = libc_madvise()
    if madvise is not None:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(start, stop - start, mmap.MADV_HUGEPAGE)


@functools.cache
def libc_madvise() -> Callable[[int, int, int], int] | None:
    """The system call, or None where there is no such advice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor may lie in one place, as those of an expanded or unfolded one do."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < extent:
            return True
        extent += (size - 1) * stride
    return False


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one storage, in stretches that meet."""
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or a.numel() == 0 or b.numel() == 0:
        return False
    (first_of_a, end_of_a), (first_of_b, end_of_b) = stretch(a), stretch(b)
    return first_of_a < end_of_b and first_of_b < end_of_a


def stretch(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the first after it."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return first * tensor.itemsize, (first + steps + 1) * tensor.itemsize
