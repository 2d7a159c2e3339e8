"""What a backend refuses before an address is passed: shapes, dtypes, devices and strides a kernel would misread."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import compute_dtype

# As the extensions number them (csrc/problem.h).
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
DTYPES = tuple(DTYPE_CODES)


def check_logits(student: Tensor, teacher: Tensor) -> tuple[int, int]:
    """The common shape (n, V)."""
    if student.ndim != 2:
        raise ValueError(f"student must be [n, V], got shape {tuple(student.shape)}")
    check_matrix("student", student, student)
    check_matrix("teacher", teacher, student)
    return student.shape[0], student.shape[1]


def check_matrix(name: str, tensor: Tensor, student: Tensor) -> None:
    """``[n, V]`` as the student is, where it is."""
    if tensor.shape != student.shape:
        raise ValueError(f"{name} must have the student's shape {tuple(student.shape)}, got {tuple(tensor.shape)}")
    if tensor.device != student.device:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {tensor.device}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} must have stride 1 along the vocabulary, got strides {tensor.stride()}")


def check_gradient(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    out: Tensor,
) -> tuple[int, int]:
    """The common shape (n, V) of what a gradient is taken of, from and into."""
    n, vocab_size = check_logits(student, teacher)
    dtype = compute_dtype(student, teacher)
    check_numbers("statistics", statistics, (n, 8), dtype, student.device)
    for name, k in (("a", a), ("b", b), ("c", c)):
        check_numbers(name, k, (n,), dtype, student.device)
    check_matrix("out", out, student)
    return n, vocab_size


def check_numbers(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """The same for what there is one or eight of per row."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} must be {list(shape)} of {dtype} on {device}, "
            f"got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def matrix(tensor: Tensor) -> tuple[int, int, int]:
    """Address, dtype code and row stride: what the extensions take for a tensor that was checked."""
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.stride(0)
