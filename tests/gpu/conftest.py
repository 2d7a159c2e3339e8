"""Tests that need a GPU: ``pytest -m gpu``; skipped where there is none."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from eopd_kernels import LMHead
from eopd_kernels.rows import choose
from tests.conftest import Case

# torch's deterministic algorithms, under which the suite runs, want this before the first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def on_gpu(backend: str, cuda: torch.device) -> str:
    """Every backend that takes the GPU's tensors."""
    try:
        choose(backend, cuda)
    except ValueError as refused:
        pytest.skip(str(refused))
    return backend


def moved(case: Case, device: torch.device) -> Case:
    """The same numbers on a device, as new leaves."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

    def head(of: LMHead | None) -> LMHead | None:
        if of is None:
            return None
        bias = None if of.bias is None else move(of.bias)
        return LMHead(move(of.weight), bias, scale=of.scale, softcap=of.softcap)

    return replace(
        case,
        student=move(case.student),
        teacher=move(case.teacher),
        student_head=head(case.student_head),
        teacher_head=head(case.teacher_head),
        mask=None if case.mask is None else case.mask.to(device),
        per_token={name: tensor.to(device) for name, tensor in case.per_token.items()},
    )
