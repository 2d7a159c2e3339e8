"""The row functions on a CPU: checks, then the addresses go to the native kernels of csrc/cpu.

The instruction set is chosen at run time, the widest the processor has; ``EOPD_CPU_CAPABILITY=portable|avx2|avx512``
overrides that, and is read at every call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..tensors import compute_dtype
from .built import why_not_built
from .checks import check_gradient, check_logits, check_matrix, check_numbers, matrix


@functools.cache
def unavailable() -> str | None:
    """None if the native kernels can be used, else why not, in one sentence."""
    try:
        native()
    except ImportError as error:
        return why_not_built("cpu", "the native kernels", error)
    return None


def description() -> str:
    """One line for ``python -m eopd_kernels.info``."""
    threads = (
        f"OpenMP, {torch.get_num_threads()} threads" if native().openmp() else "single-threaded, built without OpenMP"
    )
    return f"native kernels, {native().capability()} of {', '.join(native().capabilities())}; {threads}"


@functools.cache
def native() -> ModuleType:
    """The extension. torch is imported by now, so that both share its OpenMP runtime."""
    return importlib.import_module("eopd_kernels._native")


def row_statistics(student: Tensor, teacher: Tensor, transforms: Sequence[float]) -> Tensor:
    """The eight numbers of every row, ``[n, 8]``; see :mod:`eopd_kernels.rows`."""
    n, vocab_size = check_cpu_logits(student, teacher)
    statistics = torch.empty(n, 8, dtype=compute_dtype(student, teacher), device=student.device)
    native().row_statistics(
        matrix(student), matrix(teacher), n, vocab_size, transforms, statistics.data_ptr(), torch.get_num_threads()
    )
    return statistics


def row_gradient(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    transforms: Sequence[float],
    out: Tensor,
) -> None:
    """∂/∂x_s of Σ rows' losses into ``out`` [n, V]; see :mod:`eopd_kernels.rows`."""
    check_on_cpu(student)
    n, vocab_size = check_gradient(student, teacher, statistics, a, b, c, out)
    native().row_gradient(
        matrix(student),
        matrix(teacher),
        n,
        vocab_size,
        transforms,
        statistics.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        c.data_ptr(),
        matrix(out),
        torch.get_num_threads(),
    )


def row_loss_and_gradient(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    gate_threshold: float,
    combine: Sequence[float],
    transforms: Sequence[float],
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Statistics ``[n, 8]`` and gate ``[n]``, and the gradient into ``out``; see :mod:`eopd_kernels.rows`."""
    n, vocab_size = check_cpu_logits(student, teacher)
    dtype = compute_dtype(student, teacher)
    check_numbers("weights", weights, (n,), dtype, student.device)
    check_matrix("out", out, student)
    statistics = weights.new_empty(n, 8)
    gate = torch.empty_like(weights)
    native().row_loss_and_gradient(
        matrix(student),
        matrix(teacher),
        n,
        vocab_size,
        transforms,
        weights.data_ptr(),
        gate_threshold,
        combine,
        statistics.data_ptr(),
        gate.data_ptr(),
        matrix(out),
        torch.get_num_threads(),
    )
    return statistics, gate


def row_mixture(
    student: Tensor, teacher: Tensor, statistics: Tensor, skews: Sequence[float], transforms: Sequence[float]
) -> Tensor:
    """The four numbers of every row, ``[n, 4]``; see :mod:`eopd_kernels.rows`."""
    n, vocab_size = check_cpu_logits(student, teacher)
    check_numbers("statistics", statistics, (n, 8), compute_dtype(student, teacher), student.device)
    mixture = statistics.new_empty(n, 4)
    native().row_mixture(
        matrix(student),
        matrix(teacher),
        n,
        vocab_size,
        transforms,
        statistics.data_ptr(),
        skews,
        mixture.data_ptr(),
        torch.get_num_threads(),
    )
    return mixture


def row_mixture_gradient(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skews: Sequence[float],
    transforms: Sequence[float],
    out: Tensor,
) -> None:
    """∂/∂x_s of Σ rows' losses into ``out`` [n, V]; see :mod:`eopd_kernels.rows`."""
    check_on_cpu(student)
    n, vocab_size = check_gradient(student, teacher, statistics, a, b, c, out)
    native().row_mixture_gradient(
        matrix(student),
        matrix(teacher),
        n,
        vocab_size,
        transforms,
        statistics.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        c.data_ptr(),
        skews,
        matrix(out),
        torch.get_num_threads(),
    )


def check_cpu_logits(student: Tensor, teacher: Tensor) -> tuple[int, int]:
    """The common shape (n, V)."""
    check_on_cpu(student)
    return check_logits(student, teacher)


def check_on_cpu(student: Tensor) -> None:
    """Where the student is, everything else is checked to be."""
    if student.device.type != "cpu":
        raise ValueError(f"student must be on the CPU, got {student.device}")
