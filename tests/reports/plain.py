"""What a report's library should have given: the definitions in fp64, a line each, and nothing of this package."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eopd_kernels import entropy_aware_kl


class Plain(NamedTuple):
    """Of each token, in nats, differentiable."""

    forward_kl: Tensor
    reverse_kl: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor


def plain(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Plain:
    """Of logits ``[..., V]``; a column without mass adds nothing."""
    log_p = torch.log_softmax(student.double() / temperature, -1)
    log_q = torch.log_softmax(teacher.double() / temperature, -1)

    def mean(log_mass: Tensor, value: Tensor) -> Tensor:
        return (log_mass.exp() * value.masked_fill(log_mass == -torch.inf, 0.0)).sum(-1)

    return Plain(mean(log_q, log_q - log_p), mean(log_p, log_p - log_q), -mean(log_q, log_q), -mean(log_p, log_p))


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """Numbers spread like logits."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def solved(student: Tensor, teacher: Any, upstream: float = 1.7, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss of logits, and their gradient where what comes from upstream is not 1."""
    leaf = student.detach().clone().requires_grad_()
    loss = entropy_aware_kl(leaf, teacher, **options).loss
    return loss.detach(), torch.autograd.grad(upstream * loss.sum(), leaf)[0]


def gradient(loss: Tensor, leaf: Tensor, upstream: float = 1.7) -> Tensor:
    """The gradient of a plain loss under the same upstream gradient."""
    return torch.autograd.grad(upstream * loss.sum(), leaf)[0]


def close(value: Tensor, truth: Tensor, relative: float = 1e-5) -> None:
    """Every number within a small part of the largest; NaN and infinities nowhere."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape
    assert value.isfinite().all() and truth.isfinite().all()
    assert (value - truth).abs().max() <= relative * truth.abs().max() + 1e-12
