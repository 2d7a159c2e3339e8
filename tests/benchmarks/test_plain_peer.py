"""The naive peer computes the same loss as the specification: a ratio against something else would mean nothing."""

from __future__ import annotations

import torch

from benchmarks.contenders import plain_loss
from benchmarks.problems import LogitsProblem, Shape, hidden_problem, logits_problem
from eopd_kernels import reference


def agree(problem: LogitsProblem) -> None:
    output = reference.entropy_aware_kl(problem.student, problem.teacher, **problem.heads)
    loss = plain_loss(problem)
    torch.testing.assert_close(loss, output.loss, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(loss.square(), problem.leaves)
    expected = torch.autograd.grad(output.loss.square(), problem.leaves)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-7)


def test_logits() -> None:
    agree(logits_problem(24, 1_000))


def test_hidden_states() -> None:
    agree(hidden_problem(Shape(24, 1_000, 32, 32)))


def test_the_gate_is_open_on_about_half_of_the_rows() -> None:
    logits = logits_problem(64, 4_096)
    for problem in (logits, hidden_problem(Shape(64, 4_096, 64, 64))):
        output = reference.entropy_aware_kl(problem.student, problem.teacher, **problem.heads)
        assert 0.3 <= output.gate.mean().item() <= 0.7
        assert output.forward_kl.min().item() >= -1e-5
    assert 2 < logits.student.std().item() < 4
