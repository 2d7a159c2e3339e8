"""The row functions in Triton, for NVIDIA and AMD GPUs; under ``TRITON_INTERPRET=1`` for CPU tensors, to be tested.

Triton is imported with the first call: importing the package must neither need it nor wait for it.

    table.py                     how a row is cut into tiles, and when it is split into parts
    row_math.py                  the merge and the per-element formulas
    visits.py                    the two visits of a stretch of a row
    numbers.py                   what there is one or eight of per row
    alignment.py                 the two variants of a kernel: aligned rows, any rows
    *_kernel.py                  a kernel each
    launch.py                    from tensors to launches
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from ...tensors import compute_dtype
from ..checks import check_gradient, check_logits, check_matrix, check_numbers
from .table import interpreted


def unavailable() -> str | None:
    """None if the kernels can be used, else why not, in one sentence."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not interpreted() and not torch.cuda.is_available():
        return "there is no CUDA or ROCm device (TRITON_INTERPRET=1 runs its kernels on CPU tensors, slowly)"
    return None


def description() -> str:
    """One line for ``python -m eopd_kernels.info``."""
    if interpreted():
        return "Triton kernels in Triton's interpreter, on CPU tensors: for tests"
    return f"Triton kernels, {torch.cuda.get_device_name()}"


def takes(device: torch.device) -> bool:
    """Whether tensors on ``device`` can be given to the kernels."""
    return device.type == ("cpu" if interpreted() else "cuda")


def row_statistics(student: Tensor, teacher: Tensor, transforms: Sequence[float]) -> Tensor:
    """The eight numbers of every row, ``[n, 8]``; see :mod:`eopd_kernels.rows`."""
    from . import launch

    check_logits(student, teacher)
    return launch.row_statistics(student, teacher, transforms)


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
    from . import launch

    check_gradient(student, teacher, statistics, a, b, c, out)
    launch.row_gradient(student, teacher, statistics, a, b, c, transforms, out)


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
    from . import launch

    n, _ = check_logits(student, teacher)
    check_numbers("weights", weights, (n,), compute_dtype(student, teacher), student.device)
    check_matrix("out", out, student)
    return launch.row_loss_and_gradient(student, teacher, weights, gate_threshold, combine, transforms, out)


def row_mixture(
    student: Tensor, teacher: Tensor, statistics: Tensor, skews: Sequence[float], transforms: Sequence[float]
) -> Tensor:
    """The four numbers of every row, ``[n, 4]``; see :mod:`eopd_kernels.rows`."""
    from . import launch

    n, _ = check_logits(student, teacher)
    check_numbers("statistics", statistics, (n, 8), compute_dtype(student, teacher), student.device)
    return launch.row_mixture(student, teacher, statistics, skews, transforms)


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
    from . import launch

    check_gradient(student, teacher, statistics, a, b, c, out)
    launch.row_mixture_gradient(student, teacher, statistics, a, b, c, skews, transforms, out)
