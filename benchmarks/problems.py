"""Random problems spread like a language model's: student logits of a standard deviation near 3, a teacher that
differs by noise, and every other row so sure of one token that the teacher's entropy stays below the gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

NOISE = 0.3
# Above log Σ exp of all the other logits, so that the token takes nearly all the mass.
PEAK = 25.0


@dataclass(frozen=True, eq=False)
class LogitsProblem:
    """Two sides of logits ``[N, V]``; the student's ask for a gradient."""

    student: Tensor
    teacher: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What a gradient is taken of."""
        return (self.student,)


@dataclass(frozen=True, eq=False)
class HiddenProblem:
    """Two sides of hidden states ``[N, D]`` with heads ``[V, D]``; the student's ask for a gradient."""

    student: Tensor
    teacher: Tensor
    student_weight: Tensor
    teacher_weight: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What a gradient is taken of."""
        return (self.student, self.student_weight)


Problem = LogitsProblem | HiddenProblem


def logits_problem(n: int, vocab_size: int) -> LogitsProblem:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(n, vocab_size, generator=generator) * row_scales(n, generator)
    sure = torch.arange(0, n, 2)
    student[sure, torch.randint(vocab_size, sure.shape, generator=generator)] += PEAK
    teacher = student + NOISE * torch.randn(n, vocab_size, generator=generator)
    return LogitsProblem(student.requires_grad_(), teacher)


def hidden_problem(
    n: int,
    vocab_size: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    teacher_dim: int | None = None,
    noise: float = NOISE,
) -> HiddenProblem:
    """``teacher_dim``: ``dim`` or more; ``noise``: how far the teacher is from the student."""
    generator = torch.Generator().manual_seed(0)
    student_weight = torch.randn(vocab_size, dim, generator=generator) / dim**0.5
    student = torch.randn(n, dim, generator=generator) * row_scales(n, generator)
    sure = torch.arange(0, n, 2)
    # A head's row has a norm near 1, so that adding it PEAK times lifts its own logit by about PEAK.
    student[sure] += PEAK * student_weight[torch.randint(vocab_size, sure.shape, generator=generator)]
    wider = (teacher_dim or dim) - dim
    # Dimensions that the student does not have hold noise alone, and the logits stay near the student's.
    teacher = pad(student, (0, wider)) + noise * torch.randn(n, dim + wider, generator=generator)
    teacher_weight = torch.randn(vocab_size, dim + wider, generator=generator).mul_(0.1 * noise / dim**0.5)
    teacher_weight[:, :dim] += student_weight
    return HiddenProblem(
        student.to(dtype).requires_grad_(),
        teacher.to(dtype),
        student_weight.to(dtype).requires_grad_(),
        teacher_weight.to(dtype),
    )


def row_scales(n: int, generator: torch.Generator) -> Tensor:
    """2 to 4 for each row, ``[N, 1]``."""
    return 2 + 2 * torch.rand(n, 1, generator=generator)
