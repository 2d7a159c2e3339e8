"""The steps that are timed: each function prepares one of a problem and returns it.

A step returns what it has computed, so that freeing it falls outside the clock. A loss ends in a plain ``backward()``,
as in training; what an upstream gradient other than 1 adds is measured by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eopd_kernels import LMHead, Objective, entropy_aware_kl, tensors
from eopd_kernels.heads.products import add_mm, mm, project, widening
from eopd_kernels.rows import choose
from eopd_kernels.schedules.gradient_filter import FilteredGradient
from eopd_kernels.schedules.sides import HiddenSide
from eopd_kernels.schedules.student_gradient import HiddenGradient
from eopd_kernels.schedules.workspace import tiling

from .problems import HiddenProblem, LogitsProblem, gradients

Step = Callable[[], object]
# Scale, softcap (none) and temperature of either side, of raw logits.
TRANSFORMS = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]


@dataclass(frozen=True)
class Prepared:
    """A step that uses something up, and what lays it out anew before each time, outside the clock."""

    prepare: Callable[[], object]
    step: Step

    def __call__(self) -> object:
        return self.step()


def of_loss(loss: Callable[[Any], Tensor], problem: LogitsProblem) -> Step:
    """A loss of the problem and the gradients of the problem's leaves, forward and backward."""
    return lambda: gradients(loss(problem), problem.leaves)


def inplace_logits(problem: LogitsProblem) -> Step:
    """entropy_aware_kl with ``inplace=True``: the gradient overwrites the logits, laid out anew before each step."""
    values = problem.student.detach()
    leaf = torch.zeros((), requires_grad=True)
    memory = torch.zeros_like(values)
    student = memory

    def prepare() -> None:
        nonlocal student
        student = memory.detach().copy_(values).add_(leaf)  # logits that some operation has computed

    def step() -> Tensor:
        loss = entropy_aware_kl(student, problem.teacher, inplace=True).loss
        return torch.autograd.grad(loss, student)[0]

    return Prepared(prepare, step)


def add(problem: LogitsProblem) -> Step:
    """Two reads and one write for each logit, into memory that exists already."""
    a, b, c = problem.student.detach(), problem.teacher, torch.zeros_like(problem.teacher)
    return lambda: torch.add(a, b, out=c)


def first_touch(problem: LogitsProblem) -> Step:
    """A new tensor of the gradient's size, filled."""
    return lambda: torch.empty_like(problem.teacher).fill_(1)


def first_touch_in_huge_pages(problem: LogitsProblem) -> Step:
    """A new tensor of the gradient's size, in the memory that the loss asks for, filled."""
    teacher = problem.teacher
    return lambda: tensors.empty(teacher.shape, teacher.dtype, teacher.device).fill_(1)


def scale_in_place(problem: LogitsProblem) -> Step:
    """A gradient times a number: what an upstream gradient other than 1 adds."""
    gradient, factor = torch.zeros_like(problem.teacher), problem.teacher.new_tensor(0.999)
    return lambda: gradient.mul_(factor)


def row_kernel(problem: LogitsProblem) -> Step:
    """The row function behind the loss, into an output that exists already."""
    out = torch.zeros_like(problem.teacher)
    functions = choose("auto", problem.student.device)
    objective = Objective()
    weights = problem.teacher.new_ones(len(problem.student))
    student = problem.student.detach()
    return lambda: functions.row_loss_and_gradient(
        student,
        problem.teacher,
        weights,
        objective.gate_threshold(student.shape[1]),
        list(objective.combination),
        TRANSFORMS,
        out,
    )


def products(problem: HiddenProblem, chunked: bool = True, workspace_bytes: int | None = None) -> Step:
    """The four matrix products of the loss and nothing else, with all buffers there already.

    ``chunked``: as many tokens at a time as entropy_aware_kl takes within ``workspace_bytes``; else all at once.
    """
    tokens = chunk_tokens(problem, workspace_bytes) if chunked else len(problem.student)
    student, student_weight = problem.student.detach(), problem.student_weight.detach()
    (n, dim), vocab_size = student.shape, len(student_weight)
    # As the loss has them: logits and accumulators are fp32 where there are products with such a result.
    wide = torch.float32 if widening(student.device, student.dtype) else student.dtype
    student_logits, teacher_logits = student.new_empty(2, tokens, vocab_size, dtype=wide)
    gradient = student_logits if wide == student.dtype else student.new_empty(tokens, vocab_size)
    grad_hidden, grad_weight = student.new_zeros(n, dim, dtype=wide), student.new_zeros(vocab_size, dim, dtype=wide)

    def step() -> None:
        for start in range(0, n, tokens):
            rows = slice(start, min(start + tokens, n))
            few = slice(rows.stop - start)
            project(student[rows], student_weight, out=student_logits[few])
            project(problem.teacher[rows], problem.teacher_weight, out=teacher_logits[few])
            mm(gradient[few], student_weight, out=grad_hidden[rows])
            add_mm(gradient[few].t(), student[rows], out=grad_weight)

    return step


def grad_hidden_product(problem: HiddenProblem, dtype: torch.dtype, tokens: int = 128) -> Step:
    """The product behind dX for ``tokens`` tokens, in ``dtype``."""
    weight = problem.student_weight.detach().to(dtype)
    grad_logits = weight.new_ones(tokens, len(weight))
    return lambda: grad_logits @ weight


def backward_products(problem: HiddenProblem, gradient_filter: float | None = None) -> Step:
    """The two products behind dX and dW for the first chunk of tokens, with the real gradient of its logits."""
    tokens = chunk_tokens(problem)
    student, head = problem.student.detach()[:tokens], LMHead(problem.student_weight.detach())
    logits = (student @ head.weight.t()).requires_grad_()
    teacher = problem.teacher[:tokens] @ problem.teacher_weight.t()
    (of_logits,) = torch.autograd.grad(entropy_aware_kl(logits, teacher, reduction="sum").loss, logits)
    side, needs = HiddenSide(student, head, len(head.weight)), (True, True, False)
    if gradient_filter is None:
        gradient = HiddenGradient(side, needs, of_logits.numel())
    else:
        gradient = FilteredGradient(side, needs, of_logits.numel(), torch.tensor(gradient_filter))

    def step() -> None:
        gradient.begin(slice(0, tokens), student)
        gradient.add(slice(0, len(head.weight)), of_logits)
        gradient.end()

    return step


def chunk_tokens(problem: HiddenProblem, workspace_bytes: int | None = None) -> int:
    """Returns the number of tokens that entropy_aware_kl takes at a time."""
    student = HiddenSide(problem.student, LMHead(problem.student_weight), len(problem.student_weight))
    teacher = HiddenSide(problem.teacher, LMHead(problem.teacher_weight), len(problem.teacher_weight))
    n, device = len(problem.student), problem.student.device
    return tiling("chunked", n, student, teacher, False, workspace_bytes, device).tokens
