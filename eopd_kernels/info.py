"""``python -m eopd_kernels.info``: the backends of this installation, and why others are missing."""

from __future__ import annotations

import platform

import torch

from . import __version__
from .backends import cpu, triton
from .rows import BACKENDS


def lines() -> list[str]:
    """The report, a line each."""
    report = [
        f"eopd_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()} "
        f"on {platform.system()} {platform.machine()}",
        "",
    ]
    for name, backend in BACKENDS.items():
        reason = backend.unavailable()
        report.append(
            f"  {name:<8}" + (f"available: {backend.description()}" if reason is None else f"not available: {reason}")
        )
    on_cpu = "cpu" if cpu.unavailable() is None else "torch"
    on_gpu = "triton" if triton.unavailable() is None and triton.takes(torch.device("cuda")) else "torch"
    report += [
        "",
        f"backend='auto' takes {on_cpu!r} for CPU tensors, {on_gpu!r} for CUDA and ROCm tensors "
        "and 'torch' for tensors on other devices.",
    ]
    return report


if __name__ == "__main__":
    print("\n".join(lines()))
