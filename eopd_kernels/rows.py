"""The seam: five functions of a block of rows, one set per backend, each registered as a torch.library custom op.

Everything above this file is device-independent PyTorch; everything below sees a block of logits and nothing else.

    row_statistics(student, teacher, transforms)                        -> statistics [n, 8]
    row_gradient(student, teacher, statistics, a, b, c, transforms, out)
    row_loss_and_gradient(student, teacher, weights, gate_threshold, combine, transforms, out)
                                                                        -> statistics [n, 8], gate [n], loss [n]
    row_mixture(student, teacher, statistics, skews, transforms)        -> mixture [n, 4]
    row_mixture_gradient(student, teacher, statistics, a, b, c, skews, transforms, out)

``student`` and ``teacher`` are raw logits ``[n, V]`` of any floating dtype and row stride, last stride 1.
``transforms`` are scale, softcap (0: none) and temperature of the student, then of the teacher. The compute dtype, that
of statistics, gate, weights and coefficients, is float64 if either side is, else float32. ``out`` ``[n, V]`` takes the
gradient with respect to the raw student logits, in its own dtype, and may be the student block itself. ``loss`` is that
of a row of weight 1. Rows of weight 0 count for nothing: their statistics are empty, their gate and loss 0 and their
gradient exactly 0, whatever their logits hold; so is the gradient of rows with a = b = c = 0.

The last two are the divergences against a mixture (docs/math.md, "Skewed divergences"): ``skews`` are those of the
forward and the reverse half, each in [0, 1). ``statistics`` are whole rows' even where the logits are a slice of the
vocabulary, so that the slices' four numbers (:class:`~eopd_kernels.row_math.mixture.MixtureStatistics`) simply add up.
They mean nothing of empty statistics.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import quoted
from .backends import Block, cpu, cuda, triton
from .backends import torch as torch_backend
from .tensors import compute_dtype


class RowFunctions(NamedTuple):
    """The row functions of one backend."""

    row_statistics: Callable[..., Tensor]
    row_gradient: Callable[..., None]
    row_loss_and_gradient: Callable[..., tuple[Tensor, Tensor, Tensor]]
    row_mixture: Callable[..., Tensor]
    row_mixture_gradient: Callable[..., None]


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton, "torch": torch_backend}


def implementations(name: str) -> RowFunctions:
    """The row functions of a backend, in Python: each checks its arguments, allocates its results and calls the kernels
    that write them."""
    backend = BACKENDS[name]
    at = backend.at

    def row_statistics(student: Tensor, teacher: Tensor, transforms: Sequence[float]) -> Tensor:
        block = Block(student, teacher, transforms, out=student)
        dtype = check(name, block)
        statistics = student.new_empty(student.shape[0], 8, dtype=dtype)
        backend.kernels().row_statistics(backend.problem(block), at(statistics))
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
        block = Block(student, teacher, transforms, out)
        check(name, block, statistics=statistics, a=a, b=b, c=c)
        problem = backend.problem(block)
        backend.kernels().row_gradient(problem, statistics=at(statistics), a=at(a), b=at(b), c=at(c))

    def row_loss_and_gradient(
        student: Tensor,
        teacher: Tensor,
        weights: Tensor,
        gate_threshold: float,
        combine: Sequence[float],
        transforms: Sequence[float],
        out: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        block = Block(student, teacher, transforms, out, visits=2)
        check(name, block, weights=weights)
        statistics = weights.new_empty(student.shape[0], 8)
        gate, loss = torch.empty_like(weights), torch.empty_like(weights)
        backend.kernels().row_loss_and_gradient(
            backend.problem(block),
            weights=at(weights),
            gate_threshold=gate_threshold,
            combine=combine,
            statistics=at(statistics),
            gate=at(gate),
            loss=at(loss),
        )
        return statistics, gate, loss

    def row_mixture(
        student: Tensor, teacher: Tensor, statistics: Tensor, skews: Sequence[float], transforms: Sequence[float]
    ) -> Tensor:
        block = Block(student, teacher, transforms, out=student)
        check(name, block, statistics=statistics)
        mixture = statistics.new_empty(student.shape[0], 4)
        backend.kernels().row_mixture(backend.problem(block), at(statistics), skews, at(mixture))
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
        block = Block(student, teacher, transforms, out)
        check(name, block, statistics=statistics, a=a, b=b, c=c)
        problem = backend.problem(block)
        backend.kernels().row_mixture_gradient(
            problem, statistics=at(statistics), a=at(a), b=at(b), c=at(c), skews=skews
        )

    return RowFunctions(row_statistics, row_gradient, row_loss_and_gradient, row_mixture, row_mixture_gradient)


def check(name: str, block: Block, **per_row: Tensor) -> torch.dtype:
    """Refuses what a kernel would misread, and returns the compute dtype.

    Raises:
        ValueError, TypeError: a device, shape, dtype or stride is none that the module's docstring allows.
    """
    student, teacher, _, out, _ = block
    if not BACKENDS[name].takes(student.device):
        raise ValueError(refusal(name, student.device))
    if student.ndim != 2:
        raise ValueError(f"student must be [n, V], got shape {tuple(student.shape)}")
    check_matrix("student", student, student)
    check_matrix("teacher", teacher, student)
    if out is not student:
        check_matrix("out", out, student)
    dtype = compute_dtype(student, teacher)
    for key in per_row:
        check_per_row(key, per_row[key], student, dtype)
    return dtype


def refusal(name: str, device: torch.device, said: str = "backend") -> str:
    """What is said of tensors that a backend cannot be given, where ``said`` named it."""
    return f"{said}={name!r} takes {BACKENDS[name].TENSORS}, got tensors on {device}"


def check_matrix(name: str, tensor: Tensor, student: Tensor) -> None:
    """Checks a block ``[n, V]``: the student's shape, where the student is, a dtype of ``DTYPES``, dense rows."""
    if tensor.shape != student.shape:
        raise ValueError(f"{name} must have the student's shape {tuple(student.shape)}, got {tuple(tensor.shape)}")
    if tensor.device != student.device:
        raise ValueError(f"{name} must be on the student's device {student.device}, got {tensor.device}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name} must have stride 1 along the vocabulary, got strides {tensor.stride()}")


def check_per_row(name: str, tensor: Tensor, student: Tensor, dtype: torch.dtype) -> None:
    """Checks numbers of each row, eight of statistics and else one: shape, dtype, device, contiguous."""
    shape = (student.shape[0], 8) if name == "statistics" else (student.shape[0],)
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != student.device:
        raise ValueError(
            f"{name} must be {list(shape)} of {dtype} on {student.device}, "
            f"got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


# Defined one by one rather than with torch.library.custom_op, whose first call imports torch._dynamo: 1.2 s.
# Under the package's own name, so that two copies in a process, which have two names, have ops of their own.
LIBRARY = torch.library.Library(__package__.replace(".", "_"), "DEF")
OPS: Any = getattr(torch.ops, LIBRARY.ns)


def register(name: str) -> RowFunctions:
    """Registers a backend's functions as ``eopd_kernels::<name>_<function>`` with their fakes."""

    def op(function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
        qualified = f"{name}_{function.__name__}"
        mutates = ("out",) if "gradient" in function.__name__ else ()
        LIBRARY.define(qualified + torch.library.infer_schema(function, mutates_args=mutates))
        LIBRARY.impl(qualified, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{LIBRARY.ns}::{qualified}", fake, lib=LIBRARY)
        return getattr(OPS, qualified).default

    return RowFunctions(*map(op, implementations(name), FAKES))


def _fake_statistics(student: Tensor, teacher: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(student.shape[0], 8, dtype=compute_dtype(student, teacher))


def _nothing(*arguments: Any) -> None:
    pass


FAKES = RowFunctions(
    _fake_statistics,
    _nothing,
    lambda student, teacher, weights, *rest: (
        _fake_statistics(student, teacher),
        torch.empty_like(weights),
        torch.empty_like(weights),
    ),
    lambda student, teacher, statistics, *rest: statistics.new_empty(student.shape[0], 4),
    _nothing,
)
FUNCTIONS = {name: register(name) for name in BACKENDS}


OVERRIDE = "EOPD_BACKEND"  # the environment variable that takes the place of "auto"


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


@functools.cache
def warn_of_plain_torch(device: str, reason: str) -> None:
    """Says, once in a process, that ``backend="auto"`` found no kernels for a kind of device, and what it costs."""
    cost = "2 to 10 times as long as the native kernels" if device == "cpu" else "longer than kernels, not measured"
    warnings.warn(
        f"eopd_kernels computes the loss of {device} tensors in plain PyTorch, which takes {cost}: {reason}. "
        "backend='torch' chooses it without this warning.",
        stacklevel=2,
    )


def choose(backend: str, device: torch.device, logits: Logits | None = None) -> RowFunctions:
    """The row functions for tensors on ``device``.

    ``"auto"`` is what the environment variable EOPD_BACKEND says, else :func:`automatic`.

    Raises:
        ValueError: the name is unknown, the backend is not available here, or it does not take this device's tensors.
    """
    said = "backend"
    if backend == "auto":
        said, backend = OVERRIDE, os.environ.get(OVERRIDE, "auto")
        if backend == "auto":
            name = automatic(device, logits)
            missing = {"cpu": cpu, "cuda": triton}.get(device.type) if name == "torch" else None
            if missing is not None and (reason := missing.unavailable()) is not None:
                warn_of_plain_torch(device.type, reason)
            return FUNCTIONS[name]
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{said} must be 'auto' or one of {tuple(BACKENDS)}, got {quoted(backend)}")
    reason = BACKENDS[backend].unavailable()
    if reason is not None:
        raise ValueError(f"{said}={backend!r} is not available: {reason}")
    if not BACKENDS[backend].takes(device):
        raise ValueError(refusal(backend, device, said))
    return FUNCTIONS[backend]
