"""What autograd hands in and expects back, and whether it is the same every time."""

from __future__ import annotations

import pytest
import torch

from eopd_kernels import LMHead, Objective, entropy_aware_kl
from tests.reports.plain import close, normal, plain, solved

JEFFREYS = Objective.jeffreys()


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_the_same_call_gives_the_same_bits(schedule: str) -> None:
    """ml-explore/mlx-lm#1700: two gradients of the same input differed in 26 of 50 trials: a race over shared
    memory."""
    student, teacher = normal(6, 151_936, seed=1), normal(6, 151_936, seed=2)
    torch.set_num_threads(2)
    try:
        runs = [solved(student, teacher, objective=JEFFREYS, schedule=schedule) for _ in range(4)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(loss, runs[0][0]) and torch.equal(g, runs[0][1]) for loss, g in runs)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_gradient_is_linear_in_what_comes_from_upstream(hidden: bool, schedule: str) -> None:
    """ashawkey/stable-dreamfusion#158: a gradient that was computed in forward ignored a GradScaler's factor. The
    square of the loss has 2·loss as its upstream gradient."""
    student = normal(5, 8, seed=1)
    teacher, weight = normal(5, 31 if hidden else 8, seed=2), normal(31, 8, seed=3)
    leaf = student.clone().requires_grad_()
    head = LMHead(weight) if hidden else None
    loss = entropy_aware_kl(leaf, teacher, student_head=head, objective=JEFFREYS, schedule=schedule).loss
    ours = torch.autograd.grad(2.0**16 * loss.square(), leaf)[0]
    exact = student.double().requires_grad_()
    kls = plain(exact @ weight.double().t() if hidden else exact, teacher)
    truth = (kls.forward_kl + kls.reverse_kl).mean()
    close(ours, torch.autograd.grad(2.0**16 * truth.square(), exact)[0])


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_upstream_gradient_of_0(dtype: torch.dtype, schedule: str) -> None:
    """unslothai/unsloth-zoo#610: a loss scaled by 0 came back as NaN, 0 / 0, where it is to be left out of a sum."""
    student, teacher = normal(5, 20, seed=1).to(dtype), normal(5, 20, seed=2).to(dtype)
    _, ours = solved(student, teacher, 0.0, objective=JEFFREYS, schedule=schedule)
    assert not ours.any()


def test_the_value_does_not_depend_on_who_asks_for_a_gradient() -> None:
    """linkedin/Liger-Kernel#507: without requires_grad on its input the loss was 0."""
    student, teacher = normal(4, 3, seed=1), normal(4, 3, seed=2)
    kls = plain(student, teacher)
    truth = (kls.forward_kl + kls.reverse_kl).mean()
    assert truth > 0.1
    close(entropy_aware_kl(student, teacher, objective=JEFFREYS).loss, truth)
    with torch.no_grad():
        close(entropy_aware_kl(student.requires_grad_(), teacher, objective=JEFFREYS).loss, truth)
    with torch.inference_mode():
        close(entropy_aware_kl(student.detach(), teacher, objective=JEFFREYS).loss, truth)


def test_a_checkpointed_loss_meets_its_logits_as_they_were() -> None:
    """unslothai/unsloth#5002: where forward runs again under checkpointing, logits that a backward wrote over are
    gone."""
    base, teacher = normal(5, 20, seed=1), normal(5, 20, seed=2)
    leaf = base.clone().requires_grad_()

    def twice(student: torch.Tensor) -> torch.Tensor:
        logits = student * 2.0
        first = entropy_aware_kl(logits, teacher, objective=Objective.forward_kl()).loss
        return first + 3.0 * entropy_aware_kl(logits, teacher, objective=Objective.reverse_kl()).loss

    loss = torch.utils.checkpoint.checkpoint(twice, leaf, use_reentrant=False)
    exact = base.double().requires_grad_()
    kls = plain(2.0 * exact, teacher)
    truth = (kls.forward_kl + 3.0 * kls.reverse_kl).mean()
    close(loss, truth)
    close(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(truth, exact)[0])
