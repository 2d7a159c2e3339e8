"""Our loss and the plain one as functions of a problem: the mean over its tokens, with a graph to go backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from eopd_kernels import LMHead, Objective, entropy_aware_kl

from . import plain
from .problems import HiddenProblem, LogitsProblem


def fused_logits(problem: LogitsProblem, objective: Objective | None = None) -> Tensor:
    """entropy_aware_kl of logits."""
    return entropy_aware_kl(problem.student, problem.teacher, objective=objective).loss


def inplace_logits(problem: LogitsProblem) -> Tensor:
    """The same, its gradient in the memory of a copy of the logits."""
    return entropy_aware_kl(problem.student * 1, problem.teacher, inplace=True).loss


def fused_hidden(
    problem: HiddenProblem,
    objective: Objective | None = None,
    schedule: str = "auto",
    workspace_bytes: int | None = None,
    gradient_filter: float | None = None,
) -> Tensor:
    """entropy_aware_kl of hidden states."""
    return entropy_aware_kl(
        problem.student,
        problem.teacher,
        student_head=LMHead(problem.student_weight),
        teacher_head=LMHead(problem.teacher_weight),
        objective=objective,
        schedule=schedule,
        workspace_bytes=workspace_bytes,
        gradient_filter=gradient_filter,
    ).loss


def plain_logits(problem: LogitsProblem) -> Tensor:
    """The plain loss of logits."""
    return plain.logits_loss(problem.student, problem.teacher)


def plain_hidden(problem: HiddenProblem) -> Tensor:
    """The plain loss of hidden states."""
    return plain.hidden_loss(problem.student, problem.teacher, problem.student_weight, problem.teacher_weight)


def compiled_logits(problem: LogitsProblem) -> Tensor:
    """The plain loss of logits under torch.compile."""
    return compiled(plain.logits_loss)(problem.student, problem.teacher)


def compiled_hidden(problem: HiddenProblem) -> Tensor:
    """The plain loss of hidden states under torch.compile."""
    sides = (problem.student, problem.teacher, problem.student_weight, problem.teacher_weight)
    return compiled(plain.hidden_loss)(*sides)


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """One per process; a new shape compiles anew."""
    return torch.compile(function, fullgraph=True, dynamic=False)
