"""The backend ``cuda``: the kernels of csrc/cuda, which docs/cuda.md explains."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from .. import Block
from ..native import at, matrix, why_not_built
from .plan import Device, Plan, Row, resident, streaming

__all__ = ["TENSORS", "at", "description", "kernels", "problem", "reads_once", "takes", "unavailable"]
TENSORS = "CUDA tensors, not ROCm's"


@functools.cache
def unavailable() -> str | None:
    """None if the kernels can be used, else why not, in one sentence."""
    try:
        count = kernels().device_count()
    except ImportError as error:
        return why_not_built("cuda", "the CUDA kernels", error)
    except RuntimeError as error:
        return f"there is no CUDA device ({error})"
    if count == 0:
        return "there is no CUDA device"
    if kernels().device_type == "cuda" and torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    try:
        device_on(kernels().driver.current_device())  # a context on no other device
    except RuntimeError as error:
        return f"the CUDA kernels do not run on this device ({error}); TORCH_CUDA_ARCH_LIST names others for a build"
    return None


def description() -> str:
    """One line for ``python -m eopd_kernels.info``."""
    device = device_on(kernels().driver.current_device())
    kept = "rows are kept on the chip" if device.capability >= (9, 0) else "two visits per row, older than sm_90"
    return f"CUDA kernels, {device.name}; {kept}"


def takes(device: torch.device) -> bool:
    """Whether tensors on ``device`` can be given to the kernels."""
    return device.type == kernels().device_type and torch.version.hip is None


def reads_once(device: torch.device, vocab_size: int, student: torch.dtype, teacher: torch.dtype) -> bool:
    """Whether rows of this size stay on the chip of this device between their visits."""
    return resident(Row(vocab_size, student.itemsize, teacher.itemsize), device_on(index_of(device))) is not None


@functools.cache
def kernels() -> Any:
    """The extension, with the ``device_type`` of its tensors and the ``driver`` that knows devices and streams.

    ``EOPD_CUDA_EMULATION`` names the file of another, to be tested: the kernels on a CPU, with a driver of its own.
    """
    file = os.environ.get("EOPD_CUDA_EMULATION")
    if not file:
        from ... import _cuda

        module: Any = _cuda
        module.device_type, module.driver = "cuda", torch.cuda
        return module
    spec = importlib.util.spec_from_file_location("_cuda", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def device_on(index: int) -> Device:
    """What the plans for a device depend on."""
    return Device(**kernels().properties(index))


def index_of(device: torch.device) -> int:
    """Which of the process's devices that is."""
    return kernels().driver.current_device() if device.index is None else device.index


def place_of(tensor: Tensor) -> tuple[int, int]:
    """Device and stream of a launch."""
    return index_of(tensor.device), kernels().driver.current_stream(tensor.device).cuda_stream


def resident_or_streaming(student: Tensor, teacher: Tensor) -> Plan:
    """The plan of a kernel that visits each row twice."""
    device = device_on(index_of(student.device))
    row = Row(student.shape[1], student.element_size(), teacher.element_size())
    return resident(row, device) or one_visit(student)


def one_visit(student: Tensor) -> Plan:
    """The plan of a kernel that visits each row once."""
    return streaming(student.shape[0], student.shape[1], device_on(index_of(student.device)))


def problem(block: Block) -> tuple[Any, ...]:
    """The block as the extension takes it, with the plan, the device and the stream."""
    student, teacher, transforms, out, visits = block
    plan = one_visit(student) if visits == 1 else resident_or_streaming(student, teacher)
    matrices = (matrix(student), matrix(teacher), matrix(out))
    return matrices, student.shape, transforms, plan.arguments, place_of(student)
