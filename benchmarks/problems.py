"""Random problems spread like a language model's.

Student logits have a standard deviation near 3, the teacher differs from the student by noise, and every other row is
so sure of one token that the teacher's entropy stays below the gate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from eopd_kernels import LMHead

NOISE = 0.3
# Above log Σ exp of all the other logits, so that the token takes nearly all the mass.
PEAK = 25.0


@dataclass(frozen=True)
class Shape:
    """N tokens, V entries of the vocabulary, and the hidden dimensions of both sides, 0 where logits come in."""

    tokens: int
    vocab: int
    student_dim: int = 0
    teacher_dim: int = 0

    def __str__(self) -> str:
        dims = f"{self.student_dim:,}"
        if self.teacher_dim != self.student_dim:
            dims += f"/{self.teacher_dim:,}"
        return f"N={self.tokens:,}, V={self.vocab:,}, D={dims}"


@dataclass(frozen=True, eq=False)
class LogitsProblem:
    """Logits ``[N, V]`` of both sides. The student's require a gradient."""

    student: Tensor
    teacher: Tensor

    @property
    def sides(self) -> dict[str, Tensor]:
        """The tensors by name, in the order of the constructor."""
        return dict(vars(self))

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are computed."""
        return [side for side in self.sides.values() if side.requires_grad]

    @property
    def heads(self) -> dict[str, Any]:
        """The heads, as arguments of :func:`eopd_kernels.entropy_aware_kl`."""
        return {}

    def first(self, tokens: int) -> Self:
        """Returns the problem of the first tokens, with a student that is a leaf of its own."""
        student = self.student.detach()[:tokens].requires_grad_()
        return replace(self, student=student, teacher=self.teacher[:tokens])

    def with_sides(self, sides: dict[str, Tensor]) -> Self:
        """Returns a problem of these tensors, in which the same ones require a gradient."""
        return type(self)(
            **{name: side.detach().requires_grad_(self.sides[name].requires_grad) for name, side in sides.items()}
        )


@dataclass(frozen=True, eq=False)
class HiddenProblem(LogitsProblem):
    """Hidden states ``[N, D]`` of both sides, and their heads ``[V, D]``. The student's require a gradient."""

    student_weight: Tensor
    teacher_weight: Tensor

    @property
    def heads(self) -> dict[str, Any]:
        return {"student_head": LMHead(self.student_weight), "teacher_head": LMHead(self.teacher_weight)}


def logits_problem(n: int, vocab_size: int) -> LogitsProblem:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(n, vocab_size, generator=generator) * row_scales(n, generator)
    sure = torch.arange(0, n, 2)
    student[sure, torch.randint(vocab_size, sure.shape, generator=generator)] += PEAK
    teacher = student + NOISE * torch.randn(n, vocab_size, generator=generator)
    return LogitsProblem(student.requires_grad_(), teacher)


def hidden_problem(
    shape: Shape, dtype: torch.dtype = torch.float32, *, noise: float = NOISE, device: str = "cpu"
) -> HiddenProblem:
    """Makes a problem of hidden states on ``device``.

    ``noise`` is how far the teacher is from the student, and its dimension is the student's or more.
    """
    n, vocab_size, dim = shape.tokens, shape.vocab, shape.student_dim
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    student_weight = randn(vocab_size, dim) / dim**0.5
    student = randn(n, dim) * row_scales(n, generator)
    sure = torch.arange(0, n, 2, device=device)
    # A head's row has a norm near 1, so that adding it PEAK times lifts its own logit by about PEAK.
    tokens = torch.randint(vocab_size, sure.shape, generator=generator, device=device)
    student[sure] += PEAK * student_weight[tokens]
    wider = shape.teacher_dim - dim
    # Dimensions that the student does not have hold noise alone, and the logits stay near the student's.
    teacher = pad(student, (0, wider)) + noise * randn(n, dim + wider)
    teacher_weight = randn(vocab_size, dim + wider).mul_(0.1 * noise / dim**0.5)
    teacher_weight[:, :dim] += student_weight
    return HiddenProblem(
        student.to(dtype).requires_grad_(),
        teacher.to(dtype),
        student_weight.to(dtype).requires_grad_(),
        teacher_weight.to(dtype),
    )


def row_scales(n: int, generator: torch.Generator) -> Tensor:
    """Returns a factor from 2 to 4 for each row, ``[N, 1]``."""
    return 2 + 2 * torch.rand(n, 1, generator=generator, device=generator.device)


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Runs ``backward()`` and takes the gradients off the leaves."""
    loss.backward()
    taken = []
    for leaf in leaves:
        assert leaf.grad is not None
        taken.append(leaf.grad)
        leaf.grad = None
    return taken
