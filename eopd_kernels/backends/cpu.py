"""The backend ``cpu``: the native kernels of csrc/cpu.

The instruction set is chosen at run time, the widest the processor has; ``EOPD_CPU_CAPABILITY=portable|avx2|avx512``
overrides that, and is read at every call.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from . import Block
from .native import at, matrix, why_not_built

__all__ = ["TENSORS", "at", "description", "kernels", "problem", "takes", "unavailable"]
TENSORS = "CPU tensors"


@functools.cache
def unavailable() -> str | None:
    """None if the native kernels can be used, else why not, in one sentence."""
    try:
        kernels()
    except ImportError as error:
        return why_not_built("cpu", "the native kernels", error)
    return None


def description() -> str:
    """One line for ``python -m eopd_kernels.info``."""
    threads = (
        f"OpenMP, {torch.get_num_threads()} threads" if kernels().openmp() else "single-threaded, built without OpenMP"
    )
    products = "; bf16 products" if kernels().multiplies_bfloat16() else ""
    return f"native kernels, {kernels().capability()} of {', '.join(kernels().capabilities())}{products}; {threads}"


def takes(device: torch.device) -> bool:
    """Whether tensors on ``device`` can be given to the kernels."""
    return device.type == "cpu"


@functools.cache
def kernels() -> ModuleType:
    """The extension. torch is imported by now, so that both share its OpenMP runtime."""
    from .. import _native

    return _native


def problem(block: Block) -> tuple[Any, ...]:
    """The block as the extension takes it, for as many threads as torch has."""
    student, teacher, transforms, out, _ = block
    return (matrix(student), matrix(teacher), matrix(out)), student.shape, transforms, torch.get_num_threads()
