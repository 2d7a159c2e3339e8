"""A device without fp64, which is pretended: the backend "torch" computes in fp32 there, under every objective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from eopd_kernels import Objective, TopKTeacher, entropy_aware_kl, global_num_items, reference
from eopd_kernels.testing import pretend
from tests.conftest import make_case, relative_error, upstream_for
from tests.test_no_sync import OBJECTIVES


@pytest.mark.parametrize("schedule", ["auto", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_as_exact_as_fp32(name: str, kind: str, dtype: torch.dtype, schedule: str) -> None:
    case = replace(make_case(student=kind, teacher=kind, dtype=dtype, masked=True), objective=OBJECTIVES[name])
    shape = case.student.shape[:-1]
    said: dict[str, Any] = {"token_ids": torch.arange(111).view(shape), "old_log_probs": torch.full(shape, -2.0)}
    of_double = case.to(torch.float64)
    truth = reference.entropy_aware_kl(of_double.student, of_double.teacher, **of_double.arguments, **said).loss
    exact = torch.autograd.grad(truth, of_double.leaves)
    with pretend.WithoutFp64():
        out = entropy_aware_kl(case.student, case.teacher, **case.arguments, **said, schedule=schedule, backend="torch")
        gradients = torch.autograd.grad(out.loss, case.leaves)
    assert relative_error(out.loss, truth) < 2e-5
    for gradient, expected in zip(gradients, exact, strict=True):
        assert relative_error(gradient, expected) < (2e-5 if dtype == torch.float32 else 3 * 2**-8)


def test_a_served_teacher_and_counts_need_no_fp64() -> None:
    case = make_case(masked=True)
    shape = case.student.shape[:-1]
    ids = torch.arange(444).view(*shape, 4)
    teacher = TopKTeacher(ids, torch.full(ids.shape, -1.5), token_log_probs=torch.full(shape, -2.5))
    options: dict[str, Any] = {"token_ids": ids[..., 0], "old_log_probs": torch.full(shape, -2.0)}
    assert case.mask is not None
    upstream = upstream_for(torch.zeros(()))
    with pretend.WithoutFp64():
        count = global_num_items(case.mask)
        arguments = {**case.arguments, "teacher_head": None, "objective": Objective.eopd_paper()}
        out = entropy_aware_kl(case.student, teacher, **arguments, **options, num_items=count, backend="torch")
        out.loss.backward(upstream)
    assert count.dtype == torch.float32 and int(count) == int(case.mask.sum())
    assert case.student.grad is not None and case.student.grad.isfinite().all()


def test_the_pretended_device_refuses_fp64() -> None:
    with pytest.raises(TypeError, match="no float64"), pretend.WithoutFp64():
        torch.zeros(3).double()
