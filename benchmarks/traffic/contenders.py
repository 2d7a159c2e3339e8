"""What is counted: ours on the GPU's path, and the Triton kernels of the installed peers.

Peers ask for a CUDA device before they take their kernels, and for products of bf16 operands with an fp32 result. Those
questions are answered for them and those products given, so that the interpreter runs the kernels on CPU tensors.
Nothing else of theirs is touched.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from eopd_kernels.heads import products
from eopd_kernels.rows import FUNCTIONS, implementations
from eopd_kernels.testing import pretend

from ..contenders import GPU_PEERS, Contender, ours
from ..problems import Shape, hidden_problem
from .counter import Traffic, counting


class Entry(NamedTuple):
    """One row of the table: a contender on inputs of a dtype."""

    contender: Contender
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """The contender's name. Inputs are bf16 unless it says otherwise."""
        return self.contender.name + ("" if self.dtype == torch.bfloat16 else ", fp32 inputs")


CHUNKED, RECOMPUTE = (
    Contender(f"eopd_kernels, {schedule}", "gated", partial(ours, schedule=schedule, backend="triton"))
    for schedule in ("chunked", "recompute")
)
# Peers in fp32 as well: some keep logits in the inputs' dtype, which halves the bytes and costs digits.
ENTRIES = [
    Entry(CHUNKED),
    Entry(CHUNKED, torch.float32),
    Entry(RECOMPUTE),
    *(Entry(peer, dtype) for dtype in (torch.bfloat16, torch.float32) for peer in GPU_PEERS),
]


def count(entry: Entry, shape: Shape) -> Traffic | str:
    """Counts the traffic of a contender, or says why not: a peer may be missing, or need what only a GPU has."""
    contender = entry.contender
    if contender.version is None:
        return "not installed"
    problem = hidden_problem(shape, entry.dtype)
    assert contender.loss is not None
    try:
        with pretend.gpu(), ON_A_GPU.get(contender.package, nullcontext)(), counting(shape) as traffic:
            contender.loss(problem).backward()
    except Exception as error:  # a peer may fail in any way, ours may not
        if contender.package is None:
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return traffic


def project(tile: Tensor, hidden: Tensor, weight: Tensor, bias: None, start: int, end: int, dtype: torch.dtype) -> None:
    """trl's projection as it is on CUDA."""
    products.mm(hidden, weight[start:end].to(dtype).t(), out=tile)


def accumulate(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """trl's accumulation as it is on CUDA."""
    products.add_mm(a, b, out=accumulator)


def project_to_fp32(hidden: Tensor, weight: Tensor) -> Tensor:
    """Liger's projection as it is on CUDA."""
    out = torch.empty(len(hidden), len(weight))
    products.mm(hidden, weight.t(), out=out)
    return out


def patched(module: str, **functions: Any) -> AbstractContextManager[Any]:
    """Replaces functions of a module."""
    return mock.patch.multiple(importlib.import_module(module), **functions)


@contextmanager
def orda_on_a_gpu() -> Iterator[None]:
    """Gives orda Triton's exponentials for libdevice's, which need a GPU, and leaves out its search for tile sizes."""
    import triton.language as tl

    resolve = importlib.import_module("orda_kernel.api")._resolve_config
    answers: dict[str, Any] = {
        "_supports_triton": lambda *arguments: True,
        "_validate_triton_model_dtype": lambda *arguments: None,
        "_resolve_config": lambda *arguments: replace(resolve(*arguments), autotune=False),
    }
    exp, log, expm1 = (lambda x: tl.exp(x)), (lambda x: tl.log(x)), (lambda x: tl.exp(x) - 1)
    functions: dict[str, Any] = {"tl_highprec_exp": exp, "tl_highprec_log": log}
    with (
        patched("orda_kernel.api", **answers),
        patched("orda_kernel.ops._kernels._kl_math", **functions),
        patched("orda_kernel.ops._kernels.ce_kl_fwdbwd", **functions, tl_highprec_expm1=expm1),
        mock.patch.object(torch.cuda, "device", lambda device: nullcontext()),
        mock.patch.object(torch.Tensor, "is_cuda", True),
    ):
        yield


@contextmanager
def ours_on_a_gpu() -> Iterator[None]:
    """Goes past torch's dispatcher, behind which the counter would not see what the backend does with torch."""
    with mock.patch.dict(FUNCTIONS, triton=implementations("triton")):
        yield


# What answers the questions of a package for a GPU.
ON_A_GPU: dict[str | None, Callable[[], AbstractContextManager[Any]]] = {
    None: ours_on_a_gpu,
    "trl": partial(
        patched,
        "trl.kernels.chunked_divergence",
        _use_triton=lambda device: True,
        _project=project,
        _addmm_fp32=accumulate,
    ),
    "liger-kernel": partial(patched, "liger_kernel.ops.fused_linear_jsd", _project_to_float32=project_to_fp32),
    "orda-kernel": orda_on_a_gpu,
}
