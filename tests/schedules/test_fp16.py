"""Gradients in fp16: what underflows is decided by token weight times upstream gradient, as in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import entropy_aware_kl, reference
from tests.conftest import interpreted, make_case, relative_error

SCALE = 65536.0  # GradScaler's first


def weights(kind: str, leading: torch.Size) -> Tensor:
    if kind == "small":
        return torch.full(leading, 1e-3)
    lengths = torch.logspace(0, 4, leading.numel()).view(leading)
    return 1 / lengths  # of sequences of 1 to 10,000 tokens


@pytest.mark.parametrize("graph", ["freed", "retained"])
@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("kind", ["small", "of lengths"])
def test_small_weights_under_a_loss_scale(kind: str, schedule: str, graph: str, backend: str) -> None:
    shape: dict[str, Any] = {"vocab_size": 2000} if backend in ("cpu", "torch") else {"vocab_size": 67}
    shape |= {"leading": (3, 4)} if interpreted(backend) else {}
    case = make_case(student="logits", teacher="logits", **shape).to(torch.float16)
    mask = weights(kind, case.student.shape[:-1])
    arguments: dict[str, Any] = {**case.arguments, "mask": mask, "reduction": "sum"}
    loss = entropy_aware_kl(case.student, case.teacher, **arguments, schedule=schedule, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, case.student, torch.tensor(SCALE), retain_graph=graph == "retained")
    exact = case.to(torch.float64)
    truth = reference.entropy_aware_kl(exact.student, exact.teacher, **{**arguments, "mask": mask.double()}).loss
    (expected,) = torch.autograd.grad(truth, exact.student, torch.tensor(SCALE, dtype=torch.float64))
    rows, true_rows = gradient.double().flatten(0, -2), expected.flatten(0, -2)
    # Each row by itself: its own largest entry sets what counts.
    error = (rows - true_rows).abs().amax(1) / true_rows.abs().amax(1).clamp_min(2**-24)
    assert error.max() < 4 * 2**-11
    of_weight_1 = true_rows.abs() / (SCALE * mask.reshape(-1, 1))
    representable = (true_rows.abs() > 2**-23) & (of_weight_1 > 2**-28)
    assert representable.double().mean() > 0.5 and (rows[representable] != 0).all()


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
def test_large_weights_do_not_overflow_before_a_small_upstream_gradient(schedule: str) -> None:
    case = make_case(student="logits", teacher="logits").to(torch.float16)
    mask = torch.full(case.student.shape[:-1], 1e6)
    arguments: dict[str, Any] = {**case.arguments, "mask": mask, "reduction": "sum", "schedule": schedule}
    loss = entropy_aware_kl(case.student, case.teacher, **arguments).loss
    (gradient,) = torch.autograd.grad(loss, case.student, torch.tensor(1e-6))
    (expected,) = torch.autograd.grad(
        entropy_aware_kl(case.student, case.teacher, **{**arguments, "mask": None}).loss, case.student
    )
    assert gradient.isfinite().all() and relative_error(gradient, expected) < 4 * 2**-11
