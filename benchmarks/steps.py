"""The contenders: each function prepares one and returns the step that is timed.

A step returns what it has computed, so that freeing it falls outside the clock. It ends in a plain ``backward()``, as a
training step does; what an upstream gradient other than 1 adds is measured by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eopd_kernels import LMHead, Objective, entropy_aware_kl
from eopd_kernels.rows import choose
from eopd_kernels.schedules import tiling
from eopd_kernels.sides import HiddenSide

from . import plain
from .problems import HiddenProblem, LogitsProblem

Step = Callable[[], object]


@dataclass(frozen=True)
class Prepared:
    """A step that uses something up, and what has to be done before each time."""

    prepare: Callable[[], object]
    step: Step

    def __call__(self) -> object:
        return self.step()


def plain_logits(problem: LogitsProblem, *, compiled: bool = False) -> Step:
    """The plain loss of logits and its gradient, as it is or under torch.compile."""

    loss = torch.compile(plain.logits_loss, fullgraph=True, dynamic=False) if compiled else plain.logits_loss
    return lambda: gradients(loss(problem.student, problem.teacher), problem.student)


def fused_logits(problem: LogitsProblem) -> Step:
    """entropy_aware_kl of logits, forward and backward."""
    return lambda: gradients(entropy_aware_kl(problem.student, problem.teacher).loss, problem.student)


def inplace_logits(problem: LogitsProblem) -> Step:
    """The same with ``inplace=True``: the gradient overwrites the logits, which are laid out anew before each step."""
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


def row_kernel(problem: LogitsProblem, out: Tensor) -> Step:
    """The row function behind it, into an output that exists already."""
    functions = choose("auto", problem.student.device)
    objective = Objective()
    weights = torch.ones(len(problem.student))
    transforms = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    student = problem.student.detach()
    return lambda: functions.row_loss_and_gradient(
        student,
        problem.teacher,
        weights,
        objective.gate_threshold(student.shape[1]),
        list(objective.combination),
        transforms,
        out,
    )


def plain_hidden(problem: HiddenProblem) -> Step:
    """The plain loss of hidden states, and the gradients of the student's hidden states and head."""
    sides = (problem.student, problem.teacher, problem.student_weight, problem.teacher_weight)
    return lambda: gradients(plain.hidden_loss(*sides), problem.student, problem.student_weight)


def fused_hidden(problem: HiddenProblem, workspace_bytes: int | None = None) -> Step:
    """entropy_aware_kl of hidden states, forward and backward."""
    student_head, teacher_head = LMHead(problem.student_weight), LMHead(problem.teacher_weight)

    def step() -> list[Tensor]:
        output = entropy_aware_kl(
            problem.student,
            problem.teacher,
            student_head=student_head,
            teacher_head=teacher_head,
            workspace_bytes=workspace_bytes,
        )
        return gradients(output.loss, problem.student, problem.student_weight)

    return step


def products(problem: HiddenProblem, tokens: int) -> Step:
    """The four matrix products of the loss and nothing else, a chunk of tokens at a time, all buffers there already."""
    student, student_weight = problem.student.detach(), problem.student_weight.detach()
    (n, _), vocab_size = student.shape, len(student_weight)
    student_logits, teacher_logits = torch.empty(tokens, vocab_size), torch.empty(tokens, vocab_size)
    grad_hidden, grad_weight = torch.zeros_like(student), torch.zeros_like(student_weight)

    def step() -> None:
        for start in range(0, n, tokens):
            rows = slice(start, min(start + tokens, n))
            block = student_logits[: rows.stop - start]
            torch.mm(student[rows], student_weight.t(), out=block)
            torch.mm(problem.teacher[rows], problem.teacher_weight.t(), out=teacher_logits[: rows.stop - start])
            torch.mm(block, student_weight, out=grad_hidden[rows])
            grad_weight.addmm_(block.t(), student[rows])

    return step


def grad_hidden_product(problem: HiddenProblem, tokens: int, dtype: torch.dtype) -> Step:
    """The product behind dX for a chunk of tokens, in this dtype."""
    weight = problem.student_weight.detach().to(dtype)
    grad_logits = torch.ones(tokens, len(weight), dtype=dtype)
    return lambda: grad_logits @ weight


def chunk_tokens(problem: HiddenProblem, workspace_bytes: int | None = None) -> int:
    """The tokens that entropy_aware_kl takes at a time."""
    student = HiddenSide(problem.student, LMHead(problem.student_weight), len(problem.student_weight))
    teacher = HiddenSide(problem.teacher, LMHead(problem.teacher_weight), len(problem.teacher_weight))
    n = len(problem.student)
    return tiling("chunked", n, student, teacher, gathered=False, workspace_bytes=workspace_bytes).tokens


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    """backward(), and the leaves' gradients taken off them."""
    loss.backward()
    taken = []
    for leaf in leaves:
        assert leaf.grad is not None
        taken.append(leaf.grad)
        leaf.grad = None
    return taken
