"""The naive peer computes the same loss as the specification: a ratio against something else would mean nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.problems import hidden_problem, logits_problem
from eopd_kernels import EntropyGate, LMHead, Objective, reference

OBJECTIVE = Objective(gate=EntropyGate(0.8), alpha=0.7)


def mask_of(n: int, masked: bool) -> Tensor | None:
    return torch.arange(n) % 3 != 0 if masked else None


def agree(loss: Tensor, specified: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(loss, specified, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(loss.square(), leaves)
    expected = torch.autograd.grad(specified.square(), leaves)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("masked", [False, True])
def test_logits(masked: bool) -> None:
    problem = logits_problem(24, 1_000)
    mask = mask_of(24, masked)
    output = reference.entropy_aware_kl(problem.student, problem.teacher, mask=mask, objective=OBJECTIVE)
    loss = plain.logits_loss(problem.student, problem.teacher, mask, threshold=0.8, alpha=0.7)
    agree(loss, output.loss, problem.student)


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states(masked: bool) -> None:
    problem = hidden_problem(24, 1_000, 32)
    mask = mask_of(24, masked)
    output = reference.entropy_aware_kl(
        problem.student,
        problem.teacher,
        student_head=LMHead(problem.student_weight),
        teacher_head=LMHead(problem.teacher_weight),
        mask=mask,
        objective=OBJECTIVE,
    )
    sides = (problem.student, problem.teacher, problem.student_weight, problem.teacher_weight)
    loss = plain.hidden_loss(*sides, mask, threshold=0.8, alpha=0.7)
    agree(loss, output.loss, problem.student, problem.student_weight)


def test_nothing_valid_is_zero() -> None:
    problem = logits_problem(3, 50)
    loss = plain.logits_loss(problem.student, problem.teacher, torch.zeros(3, dtype=torch.bool))
    assert loss.item() == 0


def test_the_gate_is_open_on_about_half_of_the_rows() -> None:
    logits = logits_problem(64, 4_096)
    hidden = hidden_problem(64, 4_096, 64)
    student_head, teacher_head = LMHead(hidden.student_weight), LMHead(hidden.teacher_weight)
    for output in (
        reference.entropy_aware_kl(logits.student, logits.teacher),
        reference.entropy_aware_kl(
            hidden.student, hidden.teacher, student_head=student_head, teacher_head=teacher_head
        ),
    ):
        assert 0.3 <= output.gate.mean().item() <= 0.7
        assert output.forward_kl.min().item() >= -1e-5
    assert 2 < logits.student.std().item() < 4
