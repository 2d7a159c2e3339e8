"""The row functions in CUDA C++: checks, then the addresses go to the kernels of csrc/cuda; docs/cuda.md explains them.

``EOPD_CUDA_EMULATION`` names a module in which the same kernels run on a CPU, and take CPU tensors, to be tested.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ...tensors import compute_dtype
from ..built import why_not_built
from ..checks import check_gradient, check_logits, check_matrix, check_numbers, matrix
from .plan import Device, Plan, Row, device_of, resident, streaming


@functools.cache
def unavailable() -> str | None:
    """None if the kernels can be used, else why not, in one sentence."""
    try:
        count = native().device_count()
    except ImportError as error:
        return why_not_built("cuda", "the CUDA kernels", error)
    except RuntimeError as error:
        return f"there is no CUDA device ({error})"
    if count == 0:
        return "there is no CUDA device"
    if emulation() is None and torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    try:
        device_on(0 if emulation() is not None else torch.cuda.current_device())  # a context on no other device
    except RuntimeError as error:
        return f"the CUDA kernels do not run on this device ({error}); TORCH_CUDA_ARCH_LIST names others for a build"
    return None


def description() -> str:
    """One line for ``python -m eopd_kernels.info``."""
    if emulation() is not None:
        return "CUDA kernels in emulation, on CPU tensors: for tests"
    device = device_on(torch.cuda.current_device())
    kept = "rows are kept on the chip" if device.capability >= (9, 0) else "two visits per row, older than sm_90"
    return f"CUDA kernels, {device.name}; {kept}"


def takes(device: torch.device) -> bool:
    """Whether tensors on ``device`` can be given to the kernels."""
    if emulation() is not None:
        return device.type == "cpu"
    return device.type == "cuda" and torch.version.hip is None


def reads_once(device: torch.device, vocab_size: int, student: torch.dtype, teacher: torch.dtype) -> bool:
    """Whether rows of this size stay on the chip of this device between their visits."""
    return resident(Row(vocab_size, student.itemsize, teacher.itemsize), device_on(index_of(device))) is not None


def emulation() -> str | None:
    """The file of the module that runs the kernels on a CPU, if there is to be one."""
    return os.environ.get("EOPD_CUDA_EMULATION") or None


@functools.cache
def native() -> ModuleType:
    """The extension, or what emulates it."""
    file = emulation()
    if file is None:
        return importlib.import_module("eopd_kernels._cuda")
    spec = importlib.util.spec_from_file_location("_cuda", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def device_on(index: int) -> Device:
    """What the plans depend on."""
    return device_of(native().properties(index))


def index_of(device: torch.device) -> int:
    if device.type == "cpu":  # emulated
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def place_of(tensor: Tensor) -> tuple[int, int]:
    """Device and stream of a launch."""
    stream = 0 if tensor.device.type == "cpu" else torch.cuda.current_stream(tensor.device).cuda_stream
    return index_of(tensor.device), stream


def resident_or_streaming(student: Tensor, teacher: Tensor) -> Plan:
    """For both visits in one kernel."""
    device = device_on(index_of(student.device))
    row = Row(student.shape[1], student.element_size(), teacher.element_size())
    return resident(row, device) or one_visit(student)


def one_visit(student: Tensor) -> Plan:
    """For a visit by itself."""
    return streaming(student.shape[0], student.shape[1], device_on(index_of(student.device)))


def row_statistics(student: Tensor, teacher: Tensor, transforms: Sequence[float]) -> Tensor:
    """The eight numbers of every row, ``[n, 8]``; see :mod:`eopd_kernels.rows`."""
    n, vocab_size = check_logits(student, teacher)
    statistics = student.new_empty(n, 8, dtype=compute_dtype(student, teacher))
    native().row_statistics(
        matrix(student),
        matrix(teacher),
        n,
        vocab_size,
        transforms,
        one_visit(student).arguments,
        place_of(student),
        statistics.data_ptr(),
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
    n, vocab_size = check_gradient(student, teacher, statistics, a, b, c, out)
    native().row_gradient(
        matrix(student),
        matrix(teacher),
        n,
        vocab_size,
        transforms,
        one_visit(student).arguments,
        place_of(student),
        statistics.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        c.data_ptr(),
        matrix(out),
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
    n, vocab_size = check_logits(student, teacher)
    dtype = compute_dtype(student, teacher)
    check_numbers("weights", weights, (n,), dtype, student.device)
    check_matrix("out", out, student)
    statistics = student.new_empty(n, 8, dtype=dtype)
    gate = torch.empty_like(weights)
    native().row_loss_and_gradient(
        matrix(student),
        matrix(teacher),
        n,
        vocab_size,
        transforms,
        resident_or_streaming(student, teacher).arguments,
        place_of(student),
        weights.data_ptr(),
        gate_threshold,
        combine,
        statistics.data_ptr(),
        gate.data_ptr(),
        matrix(out),
    )
    return statistics, gate


def row_mixture(
    student: Tensor, teacher: Tensor, statistics: Tensor, skews: Sequence[float], transforms: Sequence[float]
) -> Tensor:
    """The four numbers of every row, ``[n, 4]``; see :mod:`eopd_kernels.rows`."""
    n, vocab_size = check_logits(student, teacher)
    check_numbers("statistics", statistics, (n, 8), compute_dtype(student, teacher), student.device)
    mixture = statistics.new_empty(n, 4)
    native().row_mixture(
        matrix(student),
        matrix(teacher),
        n,
        vocab_size,
        transforms,
        one_visit(student).arguments,
        place_of(student),
        statistics.data_ptr(),
        skews,
        mixture.data_ptr(),
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
    n, vocab_size = check_gradient(student, teacher, statistics, a, b, c, out)
    native().row_mixture_gradient(
        matrix(student),
        matrix(teacher),
        n,
        vocab_size,
        transforms,
        one_visit(student).arguments,
        place_of(student),
        statistics.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        c.data_ptr(),
        skews,
        matrix(out),
    )
