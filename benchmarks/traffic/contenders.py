"""What is counted: ours on the GPU's path, and the Triton kernels of the installed peers.

Peers ask for a CUDA device before they take their kernels, and for products of bf16 operands with an fp32 result; those
questions are answered for them and those products given (:mod:`benchmarks.pretend`), so that the interpreter runs the
kernels on CPU tensors. Nothing else of theirs is touched. Inputs are bf16 unless the name says otherwise.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from eopd_kernels import LMHead, entropy_aware_kl
from eopd_kernels.heads import products
from eopd_kernels.rows import FUNCTIONS, implementations

from .. import pretend
from ..peers import PEERS
from ..problems import HiddenProblem
from .counter import Shape, Traffic, counting

Functions = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Args:
        name: what it is.
        loss: the loss of a problem; its backward is counted too.
        on_a_gpu: what answers its questions for a GPU while it runs.
        dtype: of the inputs.
        version: of its package, "" for ours, None where it is not installed.
    """

    name: str
    loss: Callable[[HiddenProblem], Tensor]
    on_a_gpu: Callable[[], AbstractContextManager[Any]]
    dtype: torch.dtype = torch.bfloat16
    version: str | None = ""


def ours(schedule: str) -> Callable[[HiddenProblem], Tensor]:
    def loss(problem: HiddenProblem) -> Tensor:
        return entropy_aware_kl(
            problem.student,
            problem.teacher,
            student_head=LMHead(problem.student_weight),
            teacher_head=LMHead(problem.teacher_weight),
            schedule=schedule,
            backend="triton",
        ).loss

    return loss


def project(tile: Tensor, hidden: Tensor, weight: Tensor, bias: None, start: int, end: int, dtype: torch.dtype) -> None:
    """trl's projection as it is on CUDA."""
    products.mm(hidden, weight[start:end].to(dtype).t(), out=tile)


def accumulate(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """trl's accumulation as it is on CUDA."""
    products.add_mm(a, b, out=accumulator)


@contextmanager
def trl_on_a_gpu() -> Iterator[None]:
    replaced: Functions = {"_use_triton": lambda device: True, "_project": project, "_addmm_fp32": accumulate}
    with pretend.gpu(), patched("trl.kernels.chunked_divergence", replaced):
        yield


def project_to_fp32(hidden: Tensor, weight: Tensor) -> Tensor:
    """Liger's projection as it is on CUDA."""
    out = torch.empty(len(hidden), len(weight))
    products.mm(hidden, weight.t(), out=out)
    return out


@contextmanager
def liger_on_a_gpu() -> Iterator[None]:
    with pretend.gpu(), patched("liger_kernel.ops.fused_linear_jsd", {"_project_to_float32": project_to_fp32}):
        yield


@contextmanager
def orda_on_a_gpu() -> Iterator[None]:
    """With Triton's exponentials for libdevice's, which only a GPU has, and without its search for tile sizes."""
    import triton.language as tl

    resolve = importlib.import_module("orda_kernel.api")._resolve_config
    answers = {
        "_supports_triton": lambda *arguments: True,
        "_validate_triton_model_dtype": lambda *arguments: None,
        "_resolve_config": lambda *arguments: replace(resolve(*arguments), autotune=False),
    }
    exp, log = {"tl_highprec_exp": lambda x: tl.exp(x)}, {"tl_highprec_log": lambda x: tl.log(x)}
    expm1 = {"tl_highprec_expm1": lambda x: tl.exp(x) - 1}
    with (
        pretend.gpu(),
        patched("orda_kernel.api", answers),
        patched("orda_kernel.ops._kernels.ce_kl_fwdbwd", exp | log | expm1),
        patched("orda_kernel.ops._kernels._kl_math", exp | log),
        mock.patch.object(torch.cuda, "device", lambda device: nullcontext()),
        mock.patch.object(torch.Tensor, "is_cuda", True),
    ):
        yield


@contextmanager
def patched(module: str, functions: Functions) -> Iterator[None]:
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(importlib.import_module(module), name, function))
        yield


@contextmanager
def ours_on_a_gpu() -> Iterator[None]:
    """Past torch's dispatcher, behind which the counter would not see what the backend does with torch."""
    with mock.patch.dict(FUNCTIONS, triton=implementations("triton")), pretend.gpu():
        yield


GPU_OF = {"trl": trl_on_a_gpu, "liger-kernel": liger_on_a_gpu, "orda-kernel": orda_on_a_gpu}


def of_peers(dtype: torch.dtype) -> list[Contender]:
    """In fp32 as well: some keep logits in the inputs' dtype, which halves the bytes and costs digits."""
    suffix = "" if dtype == torch.bfloat16 else ", fp32 inputs"
    return [Contender(p.name + suffix, p.loss, GPU_OF.get(p.package, nullcontext), dtype, p.version) for p in PEERS]


CONTENDERS = [
    Contender("eopd_kernels, chunked", ours("chunked"), ours_on_a_gpu),
    Contender("eopd_kernels, chunked, fp32 inputs", ours("chunked"), ours_on_a_gpu, torch.float32),
    Contender("eopd_kernels, recompute", ours("recompute"), ours_on_a_gpu),
    *of_peers(torch.bfloat16),
    *of_peers(torch.float32),
]


def problem(shape: Shape, dtype: torch.dtype) -> HiddenProblem:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    return HiddenProblem(
        random(shape.tokens, shape.student_dim).requires_grad_(),
        random(shape.tokens, shape.teacher_dim),
        random(shape.vocab, shape.student_dim).requires_grad_(),
        random(shape.vocab, shape.teacher_dim),
    )


def count(contender: Contender, shape: Shape) -> Traffic | str:
    """The contender's traffic, or why there is none: a peer may be missing, or want what only a GPU has."""
    if contender.version is None:
        return "not installed"
    given = problem(shape, contender.dtype)
    try:
        with contender.on_a_gpu(), counting(shape) as traffic:
            contender.loss(given).backward()
    except Exception as error:  # a peer may fail in any way, ours may not
        if contender.version == "":
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return traffic
