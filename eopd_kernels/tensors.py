"""Tensors: what kind of device one is on, its compute dtype, its strides, and fresh memory for large ones."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def kind(device: torch.device) -> str:
    """Returns the kind of a device: "cpu", "cuda" (CUDA and HIP), ...; a test replaces it to pretend to have a GPU."""
    return device.type


def on_host(device: torch.device) -> bool:
    """Returns whether Python may look at numbers there without waiting for a device."""
    return kind(device) == "cpu"


def readable(tensor: Tensor) -> bool:
    """Returns whether Python may look at a tensor's numbers now: they exist, and no device has to be waited for."""
    return not torch.compiler.is_compiling() and on_host(tensor.device) and has_numbers(tensor)


def may_wait(tensor: Tensor) -> bool:
    """Returns whether Python may look at a tensor's numbers by waiting for its device: they exist, and no CUDA graph is
    being captured."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or capturing) and has_numbers(tensor)


def has_numbers(tensor: Tensor) -> bool:
    """Returns whether a tensor has numbers: meta and fake tensors, which tracers send through, have none."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # whoever has such a tensor has imported it
    return not tensor.is_meta and (fake is None or not isinstance(tensor, fake.FakeTensor))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Returns the dtype in which torch.autocast wants matrix products here and now, or None outside of it."""
    name = device.type
    # Not torch.amp.is_autocast_available, which torch.compile cannot trace before torch 2.12.
    if name == "meta" or not torch.is_autocast_enabled(name):
        return None
    return torch.get_autocast_dtype(name)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Returns float64 if any tensor is float64, else float32: logits are never held in 16 bits."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def gradient_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype that autograd asks a tensor's gradient in: a leaf's ``grad_dtype``, else its own.

    FSDP2 sets it from torch 2.15 on, for parameters that it has cast: their gradients are added up in the dtype that
    they had before.
    """
    asked = tensor.grad_dtype if tensor.is_leaf else None
    return tensor.dtype if asked is None else asked


def widest_dtype(device: torch.device) -> torch.dtype:
    """Returns float64, or float32 on a device that has no float64, such as Apple's MPS."""
    try:
        return torch.empty((), dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32


def rows_of(tensor: Tensor, *inner: int) -> Tensor:
    """Returns a tensor of any strides as rows ``[N, *inner]`` that lie one after another, as the kernels read them."""
    return tensor.reshape(-1, *inner).contiguous()


def uniform_rows(tensor: Tensor) -> tuple[int, int]:
    """Returns how many leading dimensions must be indexed away before the rest is rows of one stride, and how many rows
    that leaves: (0, N) for a contiguous tensor, (1, T−1) for ``logits[:, :-1]``."""
    rows, row_stride, depth = 1, 0, tensor.dim() - 1
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size != 1:  # the stride of a dimension of one element means nothing
            if rows > 1 and stride != rows * row_stride:
                break
            row_stride = stride if rows == 1 else row_stride
            rows *= size
        depth -= 1
    return depth, rows


HUGE_PAGE_BYTES = 2 * 2**20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns ``torch.empty``, on Linux in huge pages where it is large.

    A gradient of 256 × 151,936 fp32 numbers is 38,000 pages of 4 KiB, and their faults take twice the time of the
    arithmetic; it is 76 huge ones.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= 2 * HUGE_PAGE_BYTES and has_numbers(tensor):
        advise_huge_pages(tensor)
    return tensor


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns ``torch.zeros``, on Linux in huge pages where it is large."""
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
    """Returns the system call, or None where there is no such advice."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


def overlaps_itself(tensor: Tensor) -> bool:
    """Returns whether two elements of a tensor may lie in one place, as those of an expanded or unfolded one do."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < extent:
            return True
        extent += (size - 1) * stride
    return False


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors lie in one storage, in stretches that meet."""
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or a.numel() == 0 or b.numel() == 0:
        return False
    (first_of_a, end_of_a), (first_of_b, end_of_b) = stretch(a), stretch(b)
    return first_of_a < end_of_b and first_of_b < end_of_a


def stretch(tensor: Tensor) -> tuple[int, int]:
    """Returns the first byte of a tensor in its storage, and the first after it."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return first * tensor.itemsize, (first + steps + 1) * tensor.itemsize
