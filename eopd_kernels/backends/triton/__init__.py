"""The backend ``triton``: kernels for NVIDIA and AMD GPUs; under ``TRITON_INTERPRET=1`` for CPU tensors, to be tested.

Triton is imported with the first call: importing the package must neither need it nor wait for it.

    table.py                     how a row is cut into tiles, and when it is split into parts
    row_math.py                  the merge and the per-element formulas
    visits.py                    the two visits of a stretch of a row
    numbers.py                   loads and stores of a row's numbers; which part of a row a program visits
    alignment.py                 the two variants of a kernel: aligned rows, any rows
    *_kernel.py                  a kernel each
    launch.py                    from tensors to launches
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch

from .. import unchanged as at
from .. import unchanged as problem
from .table import interpreted

__all__ = ["TENSORS", "at", "description", "kernels", "problem", "takes", "unavailable"]
TENSORS = "CUDA and ROCm tensors, and CPU tensors under TRITON_INTERPRET=1 only"


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


def kernels() -> ModuleType:
    """The module that launches the kernels, and imports Triton."""
    from . import launch

    return launch
