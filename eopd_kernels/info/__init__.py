"""``python -m eopd_kernels.info``: the backends of this installation, and why others are missing."""

from __future__ import annotations

import os
import platform

import torch

from .. import __version__
from ..rows import BACKENDS, OVERRIDE, automatic

WAIT_POLICY = "OMP_WAIT_POLICY"  # OpenMP reads it when torch is imported


def lines() -> list[str]:
    """The lines of the report."""
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
    if BACKENDS["cpu"].unavailable() is None and os.environ.get(WAIT_POLICY, "").upper() != "PASSIVE":
        report += ["", f"{WAIT_POLICY} is not PASSIVE: threads spin while they wait, slow where cores are busy."]
    on_cpu, on_gpu = automatic(torch.device("cpu")), automatic(torch.device("cuda"))
    report += [
        "",
        f"backend='auto' takes {on_cpu!r} for CPU tensors, {gpu_choice(on_gpu)} for CUDA and ROCm tensors "
        "and 'torch' for tensors on other devices, in fp32 where they have no fp64.",
        f"fp32 heads on a GPU: products in {fp32_products()}; 16-bit heads give exact products in fp32 whatever it is.",
    ]
    if (forced := os.environ.get(OVERRIDE)) is not None:
        report.append(f"{OVERRIDE}={forced}: every 'auto' means that.")
    return report


def fp32_products() -> str:
    """What CUDA's products of fp32 operands compute in, which is the user's to set, in words."""
    rounded = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "TF32, as torch.backends.cuda.matmul says: logits have 10 bits" if rounded else "fp32"


def gpu_choice(otherwise: str) -> str:
    """The backend for tensors on a GPU, in words: where there are CUDA kernels it depends on the logits."""
    cuda = BACKENDS["cuda"]
    if cuda.unavailable() is not None or not cuda.takes(torch.device("cuda")):
        return repr(otherwise)
    return f"'cuda' where a row fits on the chip (sm_90 and newer, no fp64), else {otherwise!r},"
