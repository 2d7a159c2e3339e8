"""Loss and gradients in fp64, for each objective that an implementation computes, and how far a result is from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from .gpu.truth import TRUTHS, forward, product, reverse
from .problems import HiddenProblem, LogitsProblem, Problem

# Tokens at a time: some ten fp64 tensors of so many rows live at once.
CHUNK = 32


def soft_entropy_gate(log_p: Tensor, log_q: Tensor) -> Tensor:
    """orda-kernel's entropy_adaptive with its defaults: H_t / log V against 0.5, blended by a sigmoid of width 0.1."""
    entropy = -(log_q.exp() * log_q).sum(-1) / math.log(log_q.shape[-1])
    gate = torch.sigmoid((entropy - 0.5) / 0.1)
    return gate * forward(log_p, log_q) + (1 - gate) * reverse(log_p, log_q)


def soft_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """−Σ q log p: the forward KL without the teacher's entropy, and with the same gradient."""
    return -(log_q.exp() * log_p).sum(-1)


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **TRUTHS,
    "soft entropy gate": soft_entropy_gate,
    "soft cross-entropy": soft_cross_entropy,
}


@dataclass(frozen=True, eq=False)
class Truth:
    """The mean loss of a problem and its gradients by the problem's leaves, fp64."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


class Errors(NamedTuple):
    """Relative errors: |L − L'| / |L'| of the loss, ‖G − G'‖ / ‖G'‖ of dX (or of dlogits) and of dW."""

    loss: float
    student: float
    weight: float | None


def first_tokens(problem: Problem, tokens: int) -> Problem:
    """The same problem with fewer tokens, as leaves of their own."""
    student = problem.student.detach()[:tokens].requires_grad_()
    if isinstance(problem, LogitsProblem):
        return LogitsProblem(student, problem.teacher[:tokens])
    return HiddenProblem(student, problem.teacher[:tokens], problem.student_weight, problem.teacher_weight)


def truth(problem: Problem, objective: str) -> Truth:
    """In fp64, a few tokens at a time.

    Raises:
        KeyError: ``objective`` is none of :data:`OBJECTIVES`.
    """
    loss_of, tokens = OBJECTIVES[objective], len(problem.student)
    student = problem.student.detach().double().requires_grad_()
    leaves = [student]
    if isinstance(problem, HiddenProblem):
        leaves.append(problem.student_weight.detach().double().requires_grad_())
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for rows in torch.arange(tokens, device=student.device).split(CHUNK):
        log_p = log_softmax(student[rows] @ leaves[1].t() if len(leaves) > 1 else student[rows], -1)
        with torch.no_grad():
            teacher = problem.teacher[rows].double()
            log_q = log_softmax(
                product(teacher, problem.teacher_weight) if isinstance(problem, HiddenProblem) else teacher, -1
            )
        loss = loss_of(log_p, log_q).sum() / tokens
        loss.backward()
        total += loss.detach()
    return Truth(total, tuple(leaf.grad for leaf in leaves if leaf.grad is not None))


def errors(loss: Tensor, gradients: list[Tensor], exact: Truth) -> Errors:
    """How far a loss and its gradients are from the truth."""
    of_loss = (loss.detach().double() - exact.loss).abs() / exact.loss.abs()
    of_gradients = [distance(value, true) for value, true in zip(gradients, exact.gradients, strict=True)]
    return Errors(float(of_loss), of_gradients[0], of_gradients[1] if len(of_gradients) > 1 else None)


def distance(value: Tensor, true: Tensor) -> float:
    """‖value − true‖ / ‖true‖, some rows at a time: in fp64 a large dW is not copied whole."""
    squares = sum(
        float((a.double() - b).square().sum())
        for a, b in zip(value.split(2**14), true.to(value.device).split(2**14), strict=True)
    )
    return math.sqrt(squares) / float(true.norm())
