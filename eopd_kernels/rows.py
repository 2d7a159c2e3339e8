"""The seam: five functions of a block of rows, one set per backend, each registered as a torch.library custom op.

Everything above this file is device-independent PyTorch; everything below sees a block of logits and nothing else.

    row_statistics(student, teacher, transforms)                        -> statistics [n, 8]
    row_gradient(student, teacher, statistics, a, b, c, transforms, out)
    row_loss_and_gradient(student, teacher, weights, gate_threshold, combine, transforms, out)
                                                                        -> statistics [n, 8], gate [n]
    row_mixture(student, teacher, statistics, skews, transforms)        -> mixture [n, 4]
    row_mixture_gradient(student, teacher, statistics, a, b, c, skews, transforms, out)

``student`` and ``teacher`` are raw logits ``[n, V]`` of any floating dtype and row stride, last stride 1.
``transforms`` are scale, softcap (0: none) and temperature of the student, then of the teacher. The compute dtype, that
of statistics, gate, weights and coefficients, is float64 if either side is, else float32. ``out`` ``[n, V]`` takes the
gradient with respect to the raw student logits, in its own dtype, and may be the student block itself. Rows of weight 0
count for nothing: their statistics are empty, their gate 0 and their gradient exactly 0, whatever their logits hold; so
is the gradient of rows with a = b = c = 0.

The last two are the divergences against a mixture (docs/math.md, "Skewed divergences"): ``skews`` are those of the
forward and the reverse half, each in [0, 1). ``statistics`` are whole rows' even where the logits are a slice of the
vocabulary, so that the slices' four numbers (:class:`~eopd_kernels.row_math.mixture.MixtureStatistics`) simply add up.
They mean nothing of empty statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import quoted
from .backends import cpu, cuda, triton
from .backends import torch as torch_backend
from .tensors import compute_dtype


class RowFunctions(NamedTuple):
    """The row functions of one backend."""

    row_statistics: Callable[..., Tensor]
    row_gradient: Callable[..., None]
    row_loss_and_gradient: Callable[..., tuple[Tensor, Tensor]]
    row_mixture: Callable[..., Tensor]
    row_mixture_gradient: Callable[..., None]


# Defined one by one rather than with torch.library.custom_op, whose first call imports torch._dynamo: 1.2 s.
LIBRARY = torch.library.Library("eopd_kernels", "DEF")


def register(name: str, backend: ModuleType) -> RowFunctions:
    """Registers a backend's functions as ``eopd_kernels::<name>_<function>`` with their fakes."""

    def op(function: str, mutates: tuple[str, ...], fake: Callable[..., Any]) -> Any:
        implementation = getattr(backend, function)
        qualified = f"{name}_{function}"
        LIBRARY.define(qualified + torch.library.infer_schema(implementation, mutates_args=mutates))
        LIBRARY.impl(qualified, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"eopd_kernels::{qualified}", fake, lib=LIBRARY)
        return getattr(torch.ops.eopd_kernels, qualified).default

    return RowFunctions(
        op("row_statistics", (), lambda student, teacher, transforms: _fake_statistics(student, teacher)),
        op("row_gradient", ("out",), lambda *arguments: None),
        op(
            "row_loss_and_gradient",
            ("out",),
            lambda student, teacher, weights, *rest: (_fake_statistics(student, teacher), torch.empty_like(weights)),
        ),
        op("row_mixture", (), lambda student, teacher, statistics, *rest: statistics.new_empty(student.shape[0], 4)),
        op("row_mixture_gradient", ("out",), lambda *arguments: None),
    )


def _fake_statistics(student: Tensor, teacher: Tensor) -> Tensor:
    return student.new_empty(student.shape[0], 8, dtype=compute_dtype(student, teacher))


BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton, "torch": torch_backend}
FUNCTIONS = {name: register(name, backend) for name, backend in BACKENDS.items()}


class Logits(NamedTuple):
    """What the kernels will be given: the width of the rows, and the dtype of either side."""

    vocab_size: int
    student: torch.dtype
    teacher: torch.dtype


def automatic(device: torch.device, logits: Logits | None = None) -> str:
    """What ``backend="auto"`` means for tensors on ``device``.

    On a CPU the native kernels, where they were built. On a GPU the CUDA kernels where they keep a row of these logits
    on the chip and so read it once (sm_90 or newer, no fp64); otherwise, and where ``logits`` are not known, Triton's.
    Plain torch everywhere else.
    """
    if device.type == "cpu":
        return "cpu" if cpu.unavailable() is None else "torch"
    if device.type != "cuda":
        return "torch"
    if logits is not None and cuda.unavailable() is None and cuda.takes(device) and cuda.reads_once(device, *logits):
        return "cuda"
    return "triton" if triton.unavailable() is None and triton.takes(device) else "torch"


def choose(backend: str, device: torch.device, logits: Logits | None = None) -> RowFunctions:
    """The row functions for tensors on ``device``; ``"auto"`` is :func:`automatic`.

    Raises:
        ValueError: the name is unknown, the backend is not available here, or it does not take this device's tensors.
    """
    if backend == "auto":
        backend = automatic(device, logits)
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {tuple(BACKENDS)}, got {quoted(backend)}")
    reason = BACKENDS[backend].unavailable()
    if reason is not None:
        raise ValueError(f"backend={backend!r} is not available: {reason}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend='cpu' takes CPU tensors, got tensors on {device}")
    if backend == "cuda" and not cuda.takes(device):
        raise ValueError(f"backend='cuda' takes CUDA tensors, not ROCm's, got tensors on {device}")
    if backend == "triton" and not triton.takes(device):
        raise ValueError(
            "backend='triton' takes CUDA and ROCm tensors, and CPU tensors under TRITON_INTERPRET=1 only, "
            f"got tensors on {device}"
        )
    return FUNCTIONS[backend]
