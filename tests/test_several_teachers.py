"""Several teachers: each token has its own, or all of them have a say; docs/guides/teachers.md."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import LMHead, Objective, entropy_aware_kl, reference
from eopd_kernels.heads import products
from tests.conftest import make_case, relative_error

V, SIZES = 97, (40, 28, 33)


def teachers() -> list[tuple[Tensor, LMHead]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (3 * torch.randn(3, 11, dim, generator=generator), LMHead(torch.randn(V, dim, generator=generator) / dim**0.5))
        for dim in SIZES
    ]


def logits(hidden: Tensor, head: LMHead) -> Tensor:
    return hidden.double() @ head.weight.double().t()


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("objective", [Objective(), Objective.jsd(0.3), Objective(temperature=(1.0, 2.0))], ids=str)
def test_each_token_has_its_own_teacher(objective: Objective, schedule: str) -> None:
    case = make_case(leading=(3, 11), vocab_size=V, masked=True)
    assert case.mask is not None and case.student_head is not None
    owner = torch.arange(33).view(3, 11) % 3
    count = case.mask.sum()
    total = sum(
        entropy_aware_kl(
            case.student,
            hidden,
            student_head=case.student_head,
            teacher_head=head,
            mask=case.mask & (owner == index),
            num_items=count,
            objective=objective,
            schedule=schedule,
        ).loss
        for index, (hidden, head) in enumerate(teachers())
    )
    assert isinstance(total, Tensor)
    exact = case.to(torch.float64)
    of_each = torch.stack([logits(*teacher) for teacher in teachers()])
    own = of_each.gather(0, owner[None, ..., None].expand(1, 3, 11, V)).squeeze(0)
    truth = reference.entropy_aware_kl(
        exact.student, own, student_head=exact.student_head, mask=case.mask, objective=objective
    ).loss
    assert relative_error(total, truth) < 3e-6
    pairs = zip(torch.autograd.grad(total, case.leaves), torch.autograd.grad(truth, exact.leaves), strict=True)
    for gradient, expected in pairs:
        assert relative_error(gradient, expected) < 2e-5


def test_a_teachers_call_pays_for_its_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(leading=(3, 11), vocab_size=V)
    owner, rows, project = torch.arange(33).view(3, 11) % 3, [], products.project

    def counted(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        rows.append(len(hidden))
        project(hidden, weight, out)

    monkeypatch.setattr(products, "project", counted)
    for index, (hidden, head) in enumerate(teachers()):
        mask = owner == index
        entropy_aware_kl(case.student, hidden, student_head=case.student_head, teacher_head=head, mask=mask)
    assert sum(rows) == 2 * 33


def test_one_teacher_of_all_tokens_is_the_plain_call_to_the_last_bit() -> None:
    case = make_case(leading=(3, 11), vocab_size=V, masked=True)
    assert case.mask is not None
    plain = entropy_aware_kl(case.student, case.teacher, **case.arguments).loss
    everywhere: dict[str, Any] = replace(case, mask=case.mask & torch.ones_like(case.mask)).arguments
    alone = entropy_aware_kl(case.student, case.teacher, **everywhere, num_items=case.mask.sum()).loss
    assert torch.equal(plain, alone)
    gradients = [torch.autograd.grad(loss, case.leaves) for loss in (plain, alone)]
    assert all(map(torch.equal, *gradients))


def test_all_teachers_have_a_say() -> None:
    """The mean of their losses: one step of the optimizer sees the mean of their gradients."""
    case = make_case(leading=(3, 11), vocab_size=V)
    shares = (0.5, 0.3, 0.2)
    total = sum(
        share * entropy_aware_kl(case.student, hidden, student_head=case.student_head, teacher_head=head).loss
        for share, (hidden, head) in zip(shares, teachers(), strict=True)
    )
    exact = case.to(torch.float64)
    truth = sum(
        share * reference.entropy_aware_kl(exact.student, logits(*teacher), student_head=exact.student_head).loss
        for share, teacher in zip(shares, teachers(), strict=True)
    )
    assert isinstance(total, Tensor) and isinstance(truth, Tensor)
    assert relative_error(total, truth) < 3e-6
    pairs = zip(torch.autograd.grad(total, case.leaves), torch.autograd.grad(truth, exact.leaves), strict=True)
    assert all(relative_error(gradient, expected) < 2e-5 for gradient, expected in pairs)
